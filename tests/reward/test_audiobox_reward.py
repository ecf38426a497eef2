"""The Audiobox reward by itself: its files, its refusals, and what it does with odd clips. Parity is in tests/peers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsmart.audio.batch import AudioBatch
from fastsmart.errors import UserError
from fastsmart.machine.packed_linear import bfloat16_is_fast
from fastsmart.reward import Clips, RewardBlend, RewardSettings, load_reward
from fastsmart.reward.audiobox import make_random_weights, read_weights
from fastsmart.reward.audiobox import reward as audiobox_reward
from fastsmart.reward.audiobox.architecture import Size, encoder_shapes
from fastsmart.reward.audiobox.cpu import CpuEncoder, int8_is_fast, quantised
from fastsmart.reward.audiobox.heads import stacked
from fastsmart.reward.audiobox.reward import fastest_dtype

RATE = 16_000
AXES = ("CE", "CU", "PC", "PQ")
SMALL = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_random_weights(tmp_path / "checkpoint.pt", size=SMALL)


def clips(*seconds: float, rate: int = RATE) -> Clips:
    rng = np.random.default_rng(0)
    lengths = np.array([round(s * rate) for s in seconds], np.int64)
    samples = np.zeros((len(seconds), int(lengths.max())), np.float32)
    for k, length in enumerate(lengths):
        t = np.arange(length) / rate
        samples[k, :length] = 0.2 * np.sin(2 * np.pi * (220 + 110 * k) * t) + 0.02 * rng.normal(size=length)
    # this reward never looks at the notes, so any object of that length stands for them
    return Clips(notes=range(len(seconds)), audio=AudioBatch(samples, lengths, rate))  # type: ignore[arg-type]


def test_the_reward_is_the_weighted_sum_of_the_axes_over_ten(checkpoint: Path) -> None:
    batch = clips(2.0, 1.0)
    reward = load_reward("audiobox", checkpoint=checkpoint, axes={"CE": 1.0, "PC": 0.5})
    ratings = reward.rate(batch)
    values = reward(batch)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, 0.1 * (ratings["CE"] + 0.5 * ratings["PC"]), rtol=1e-6)
    settings = RewardSettings(terms={"audiobox": 2.0}, audiobox_checkpoint=str(checkpoint), audiobox_batch=1)
    scores = RewardBlend(settings)(batch)
    np.testing.assert_allclose(scores.total, 0.2 * ratings["CE"], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_odd_clips_do_not_spoil_the_batch(checkpoint: Path, dtype: str) -> None:
    if dtype == "int8" and not int8_is_fast():
        pytest.skip("no 8-bit products here")
    batch = clips(1.0, 0.0, 1.0, 1.0, 1.0, 1 / RATE)
    batch.audio.samples[2] = np.nan  # was not rendered
    batch.audio.samples[3, 800] = np.nan
    batch.audio.samples[4, 800] = np.inf
    reward = load_reward("audiobox", checkpoint=checkpoint, dtype=dtype)
    values = reward(batch)
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, True, True, False])
    np.testing.assert_allclose(values[0], reward(clips(1.0))[0], rtol=1e-6)
    assert values[1] == np.float32(0.1)  # of no length: the lowest rating
    nothing = Clips(notes=range(1), audio=AudioBatch(np.zeros((1, 0), np.float32), np.zeros(1, np.int64), RATE))
    np.testing.assert_array_equal(reward(nothing), np.float32([0.1]))


def test_what_the_encoder_hears_does_not_depend_on_the_neighbours_to_the_last_bit(checkpoint: Path) -> None:
    encoder = load_reward("audiobox", checkpoint=checkpoint).encoder
    audio = clips(3.0, 9.5, 0.7).audio
    together = encoder([audio.clip(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(encoder([audio.clip(i)])[0], together[i])
        assert torch.equal(encoder([audio.clip(i)])[0], together[i])


def test_a_batch_takes_the_next_larger_graph_and_all_are_recorded_beforehand(checkpoint: Path) -> None:
    """With captured graphs whose replays do the job again, as a GPU's would, into the tensors of the first time."""

    class Replayed:
        def __init__(self, job: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
            self.job, self.results = job, job()

        def replay(self) -> None:
            for result, again in zip(self.results, self.job(), strict=True):
                result.copy_(again)

    recorded: list[int] = []

    def capture(job: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Replayed, tuple]:
        graph = Replayed(job)
        recorded.append(len(graph.results[0]))
        return graph, graph.results

    encoder = load_reward("audiobox", checkpoint=checkpoint, dtype="float16", batch_size=6).encoder
    encoder.capture = capture
    rng = np.random.default_rng(0)
    windows = [rng.normal(size=rng.integers(2_000, 40_000)).astype(np.float32) for _ in range(6)]
    with torch.inference_mode():
        forward = {n: encoder(windows[:n]) for n in range(1, 7)}
        ratings = encoder.rate(windows)
        encoder.replays = True
        encoder.prepare()
        assert recorded == [6, 4, 2, 1]
        for n, means in forward.items():  # rows beside a window may change its last bits
            torch.testing.assert_close(encoder(windows[:n]), means, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(encoder.rate(windows), ratings, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(encoder.heads(forward[6]), ratings)
    assert recorded == [6, 4, 2, 1]


@pytest.mark.parametrize("norms", [True, False])
def test_heads_together_rate_as_each_does(checkpoint: Path, norms: bool) -> None:
    """As on a GPU, with the norms of the published perceptrons and without."""
    heads = load_reward("audiobox", checkpoint=checkpoint).heads
    if not norms:
        heads.perceptrons = [[pair for pair in modules if pair[0].dim() == 2] for modules in heads.perceptrons]
    means = torch.randn(5, SMALL.layers + 1, SMALL.width, generator=torch.Generator().manual_seed(0))
    each = heads(means)
    heads.together = stacked(heads.perceptrons)
    torch.testing.assert_close(heads(means), each)
    assert (each.std(0) > 0).all()


@pytest.mark.skipif(not int8_is_fast(), reason="no 8-bit products here")
def test_int8_is_near_float32_and_not_the_same(checkpoint: Path) -> None:
    batch = clips(3.0, 2.0, 11.0)
    full, eight = (load_reward("audiobox", checkpoint=checkpoint, dtype=d).rate(batch) for d in ("float32", "int8"))
    for axis in AXES:
        np.testing.assert_allclose(eight[axis], full[axis], atol=0.25)
        assert not np.array_equal(eight[axis], full[axis])


LARGEST_PRODUCTS = """
import torch
from fastsmart.reward.audiobox import cpu
if cpu.onednn_8_bit() != "saturating":
    raise SystemExit(f"products are {cpu.onednn_8_bit()}")
weight = torch.ones(32, 64)
for most in (cpu._MOST_INT8["saturating"], 127):
    cpu._MOST_INT8["saturating"] = most
    y = cpu._Int8Linear(weight, None).product(torch.full((16, 64), 255, dtype=torch.uint8), 1.0, 0)
    print(float((y - 64 * 255).abs().max()) < 1.0)
"""


@pytest.mark.skipif(not int8_is_fast(), reason="no 8-bit products here")
def test_without_vnni_no_sum_of_two_products_is_lost() -> None:
    """The largest products there can be; with 8-bit weights they are lost, which shows that the check sees it."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", LARGEST_PRODUCTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.skipif(not bfloat16_is_fast(), reason="no fast 16-bit products here")
def test_bfloat16_is_near_float32_and_no_neighbour_changes_it(checkpoint: Path) -> None:
    batch = clips(3.0, 2.0, 11.0)
    full, half = (load_reward("audiobox", checkpoint=checkpoint, dtype=d) for d in ("float32", "bfloat16"))
    assert isinstance(half.encoder, CpuEncoder)
    exact, found = full.rate(batch), half.rate(batch)
    for axis in AXES:
        np.testing.assert_allclose(found[axis], exact[axis], atol=0.03)
        assert not np.array_equal(found[axis], exact[axis])
    windows = [batch.audio.clip(i)[: 10 * RATE] for i in range(3)]
    for i, means in enumerate(half.encoder(windows)):
        assert torch.equal(half.encoder([windows[i]])[0], means)


def test_auto_is_16_bit_where_that_is_fast(checkpoint: Path, monkeypatch) -> None:
    here = fastest_dtype(torch.device("cpu"))
    rated = [load_reward("audiobox", checkpoint=checkpoint, dtype=d).rate(clips(1.0)) for d in ("auto", here)]
    assert rated[0] == rated[1]
    for fast, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(audiobox_reward, "bfloat16_is_fast", lambda fast=fast: fast)
        assert fastest_dtype(torch.device("cpu")) == chosen
        assert fastest_dtype(torch.device("cuda")) == "float16"


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core_vnni"])
def test_onednn_held_back_has_no_fast_16_bit(monkeypatch, limit: str) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert not bfloat16_is_fast()


@pytest.mark.parametrize("from_gelu", [False, True])
def test_bytes_stand_for_numbers_to_half_a_step(from_gelu: bool) -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 300.0):
        x = torch.tensor(scale * rng.normal(size=(50, 30)), dtype=torch.float32)
        if from_gelu:
            x = torch.nn.functional.gelu(x)
        integers, step, offset = quantised(x, from_gelu, len(x))
        assert torch.allclose(step * (integers.float() - offset), x, atol=0.501 * step, rtol=0)
        filled = torch.cat([x, 100 * x.abs()])  # rows that do not count
        found, *range_ = quantised(filled, from_gelu, len(x))
        assert range_ == [step, offset]
        assert torch.equal(found[: len(x)], integers)


def test_random_weights_are_the_same_for_a_seed_and_say_what_they_are(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.pt", "b.safetensors", "c.pt")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        make_random_weights(path, seed, SMALL)
    a, b, c = (read_weights(path) for path in paths)
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    assert not torch.equal(a.state["layer_weights.CE"], c.state["layer_weights.CE"])
    assert a.random
    assert b.random
    content = torch.load(paths[0], weights_only=True)
    del content["random_seed"]
    torch.save(content, paths[0])
    assert not read_weights(paths[0]).random


def test_the_default_size_is_wavlm_base() -> None:
    """94.4 M weights, as WavLM's paper (arXiv 2110.13900, section 5.1) has it: 94.70 M with its pre-training head."""
    assert sum(int(np.prod(shape)) for shape in encoder_shapes(Size()).values()) == 94_381_936


def test_safetensors_give_the_same_as_the_checkpoint(checkpoint: Path) -> None:
    folder = checkpoint.parent / "hub"
    make_random_weights(folder / "model.safetensors", size=SMALL)
    batch = clips(1.5)
    expected = load_reward("audiobox", checkpoint=checkpoint)(batch)
    for path in (folder, folder / "model.safetensors", checkpoint.parent):
        np.testing.assert_array_equal(load_reward("audiobox", checkpoint=path)(batch), expected)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.safetensors and config\.json"):
        load_reward("audiobox", checkpoint=folder)
    (folder / "config.json").write_text(json.dumps({"target_transform": {}}))
    with pytest.raises(UserError, match="mean and std of every axis"):
        load_reward("audiobox", checkpoint=folder)


def test_loading_and_scoring_leave_the_random_states_alone(checkpoint: Path) -> None:
    torch.manual_seed(1)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_reward("audiobox", checkpoint=checkpoint)(clips(0.5))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002


class _Malice:
    """Unpickled without care, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    mark = checkpoint.parent / "it_ran"
    torch.save(content | {"model_cfg": _Malice(mark)}, checkpoint)
    with pytest.raises(UserError, match="nothing in it was run"):
        load_reward("audiobox", checkpoint=checkpoint)
    assert not mark.exists()


def _not_finite(content: dict) -> None:
    content["state_dict"]["model.wavlm_model.layer_norm.bias"][3] = torch.nan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("state_dict"), "lacks 'state_dict'"),
        (lambda c: c["model_cfg"].pop("nth_layer"), "lacks 'nth_layer'"),
        (lambda c: c["target_transform"].pop("PQ"), "mean and std of every axis"),
        (lambda c: c["state_dict"].pop("model.layer_weights.CE"), r"layer_weights\.CE is missing"),
        (lambda c: c["state_dict"].pop("model.wavlm_model.encoder.pos_conv.0.weight_v"), "lacks .*weight_v"),
        (lambda c: c["state_dict"].update({"model.extra": torch.zeros(1)}), "extra is unknown"),
        (lambda c: c["state_dict"].update({"model.layer_weights.CE": torch.zeros(9)}), r"shape \(9,\) and not \(3,\)"),
        (lambda c: c["state_dict"].update({"model.layer_weights.CE": torch.zeros(3).long()}), "no tensor of floats"),
        (lambda c: c["model_cfg"].update(proj_num_layer=2), "another model"),
        (lambda c: c["model_cfg"].update(proj_act_fn="relu"), "proj_act_fn is 'relu'"),
        (lambda c: c["model_cfg"].update(nth_layer=2), "nth_layer is 2"),
        (_not_finite, "not finite"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    checkpoint: Path, change: Callable[[dict], object], says: str
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match=says) as error:
        load_reward("audiobox", checkpoint=checkpoint)
    assert str(checkpoint) in str(error.value)


def test_missing_and_broken_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoint.read_bytes()
    broken = {"start.pt": whole[:5000], "most.pt": whole[:-700], "empty.pt": b"", "text.pt": b"no weights here\n" * 50}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a complete checkpoint"):
            load_reward("audiobox", checkpoint=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not an Audiobox checkpoint"):
        load_reward("audiobox", checkpoint=tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"no Audiobox weights at .*nowhere\.pt; download"):
        load_reward("audiobox", checkpoint=tmp_path / "nowhere.pt")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        load_reward("audiobox", checkpoint=tmp_path / "bare")
    safe = make_random_weights(tmp_path / "safe" / "model.safetensors", size=SMALL)
    safe.write_bytes(safe.read_bytes()[:-700])
    with pytest.raises(UserError, match="cannot read Audiobox weights"):
        load_reward("audiobox", checkpoint=safe)


def test_without_a_network_the_published_weights_are_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for checkpoint in ("", "facebook/audiobox-aesthetics"):
        with pytest.raises(UserError, match=r"config\.json and model\.safetensors .*reward\.audiobox_checkpoint"):
            load_reward("audiobox", checkpoint=checkpoint)


def test_a_damaged_file_in_the_hubs_cache_is_found_by_its_checksum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import hashlib

    from huggingface_hub import constants

    snapshot = tmp_path / "models--facebook--audiobox-aesthetics" / "snapshots" / "abc"
    made = make_random_weights(tmp_path / "made" / "model.safetensors", size=SMALL)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    blob = snapshot.parents[1] / "blobs" / digest
    for folder in (snapshot, blob.parent, snapshot.parents[1] / "refs"):
        folder.mkdir(parents=True)
    blob.write_bytes(made.read_bytes())
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_bytes(made.with_name("config.json").read_bytes())
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_weights("").random
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    with pytest.raises(UserError, match=f"checksum is wrong; delete .*{digest}"):
        read_weights("")


def test_wrong_axes_dtypes_and_sample_rates_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="no axis 'XX'"):
        load_reward("audiobox", checkpoint=checkpoint, axes={"XX": 1.0})
    with pytest.raises(UserError, match="not in 'int3'"):
        load_reward("audiobox", checkpoint=checkpoint, dtype="int3")
    with pytest.raises(UserError, match="runs on a CPU, not on cuda"):
        load_reward("audiobox", checkpoint=checkpoint, dtype="int8", device="cuda")
    with pytest.raises(UserError, match="these clips are at 48000 Hz"):
        load_reward("audiobox", checkpoint=checkpoint)(clips(0.1, rate=48_000))


def test_random_is_a_name_for_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsmart.reward.audiobox import weights

    monkeypatch.setattr(weights, "Size", lambda: SMALL)
    reward = load_reward("audiobox", checkpoint="random")
    assert reward.random
    assert np.isfinite(reward(clips(0.3))).all()
