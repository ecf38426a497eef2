"""The Audiobox reward against the upstream package, on random weights in exactly the published formats.

The published network has 94 M weights. Most tests shrink it by putting a small WavLM configuration where upstream keeps
its own; keys, layout of the files and every line of ours and upstream's code stay the same. One slow test is full-size.
"""

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsmart.audio.batch import AudioBatch
from fastsmart.errors import UserError
from fastsmart.reward import Clips, RewardMix, RewardSettings, load_reward

aes = pytest.importorskip("audiobox_aesthetics.model.aes")

RATE, WINDOW = 16_000, 160_000
AXES = ("CE", "CU", "PC", "PQ")
SMALL = {
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
TARGET = {axis: {"mean": 5.0 + k, "std": 1.5 + 0.1 * k} for k, axis in enumerate(AXES)}


def model_config(layers: int) -> dict:
    return {
        "proj_num_layer": 3,
        "proj_ln": True,
        "proj_act_fn": "gelu",
        "proj_dropout": 0.1,
        "nth_layer": layers + 1,
        "use_weighted_layer_sum": True,
        "precision": "bf16",
        "normalize_embed": True,
        "output_dim": 1,
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = aes.WavLMConfig(vars(aes.DEFAULT_AUDIO_CFG) | SMALL)
    monkeypatch.setattr(aes, "DEFAULT_AUDIO_CFG", config)


def write_checkpoint(path: Path, layers: int = 2) -> Path:
    """A `checkpoint.pt` as published, every tensor random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = aes.AesMultiOutput(**model_config(layers), target_transform=TARGET)
        for name, parameter in model.named_parameters():
            if name.startswith("layer_weights"):
                torch.nn.init.normal_(parameter)
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "model_cfg": model_config(layers), "target_transform": TARGET}, path)
    return path


@pytest.fixture
def checkpoint(small: None, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint.pt")


def clips(*seconds: float, rate: int = RATE) -> Clips:
    rng = np.random.default_rng(0)
    lengths = np.array([round(s * rate) for s in seconds], np.int64)
    samples = np.zeros((len(seconds), int(lengths.max())), np.float32)
    for k, length in enumerate(lengths):
        t = np.arange(length) / rate
        samples[k, :length] = 0.2 * np.sin(2 * np.pi * (220 + 110 * k) * t) + 0.02 * rng.normal(size=length)
    # this reward never looks at the notes, so any object of that length stands for them
    return Clips(notes=range(len(seconds)), audio=AudioBatch(samples, lengths, rate))  # type: ignore[arg-type]


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, AudioBatch], dict[str, list[float]]]:
    """Ratings by upstream's own predictor.

    It imports torchaudio, to read files and to resample; at 16 kHz, where torchaudio's resampling returns its input,
    a stand-in for that one function is enough.
    """
    torchaudio = types.ModuleType("torchaudio")

    def resample(wav: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
        assert orig_freq == new_freq
        return wav

    torchaudio.functional = types.SimpleNamespace(resample=resample)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "audiobox_aesthetics.infer", raising=False)
    from audiobox_aesthetics.infer import AesPredictor

    def rate(checkpoint: Path, audio: AudioBatch) -> dict[str, list[float]]:
        predictor = AesPredictor(checkpoint_pth=str(checkpoint))
        clips = [torch.from_numpy(audio.clip(i).copy())[None] for i in range(len(audio))]
        rows = predictor.forward([{"path": clip, "sample_rate": audio.sample_rate} for clip in clips])
        return {axis: [row[axis] for row in rows] for axis in AXES}

    return rate


def test_ratings_agree_with_upstreams_predictor(checkpoint: Path, upstream: Callable) -> None:
    batch = clips(10.0, 3.7, 0.4, 23.5, 9.99)  # whole, padded, and three windows with a short last one
    expected = upstream(checkpoint, batch.audio)
    actual = load_reward("audiobox", checkpoint=checkpoint, batch_size=3).rate(batch)
    for axis in AXES:
        np.testing.assert_allclose(actual[axis], expected[axis], atol=2e-5)
        assert np.ptp(expected[axis]) > 1e-3  # the clips are told apart, so agreement means something


def test_the_reward_is_the_weighted_sum_of_the_axes_over_ten(checkpoint: Path) -> None:
    batch = clips(2.0, 1.0)
    reward = load_reward("audiobox", checkpoint=checkpoint, axes={"CE": 1.0, "PC": 0.5})
    ratings = reward.rate(batch)
    values = reward(batch)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, 0.1 * (ratings["CE"] + 0.5 * ratings["PC"]), rtol=1e-6)
    settings = RewardSettings(terms={"audiobox": 2.0}, audiobox_checkpoint=str(checkpoint), audiobox_batch=1)
    scores = RewardMix(settings)(batch)
    np.testing.assert_allclose(scores.total, 0.2 * ratings["CE"], rtol=1e-5)


def test_unrendered_clips_are_nan_and_clips_of_no_length_have_the_lowest_rating(checkpoint: Path) -> None:
    batch, alone = clips(1.0, 0.0, 1.0), clips(1.0)
    batch.audio.samples[2] = np.nan
    reward = load_reward("audiobox", checkpoint=checkpoint)
    values = reward(batch)
    np.testing.assert_allclose(values, [reward(alone)[0], 0.1, np.nan], rtol=1e-6)
    nothing = Clips(notes=range(1), audio=AudioBatch(np.zeros((1, 0), np.float32), np.zeros(1, np.int64), RATE))
    np.testing.assert_array_equal(reward(nothing), np.float32([0.1]))


def test_half_precision_is_near_full_precision(checkpoint: Path) -> None:
    batch = clips(3.0, 2.0)
    full, half = (load_reward("audiobox", checkpoint=checkpoint, dtype=d).rate(batch) for d in ("float32", "bfloat16"))
    for axis in AXES:
        np.testing.assert_allclose(half[axis], full[axis], atol=0.1)
        assert not np.array_equal(half[axis], full[axis])


def test_safetensors_give_the_same_as_the_checkpoint(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    folder = checkpoint.parent / "hub"
    folder.mkdir()
    save_file({k.removeprefix("model."): t for k, t in content["state_dict"].items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content["model_cfg"] | {"target_transform": TARGET}))
    batch = clips(1.5)
    expected = load_reward("audiobox", checkpoint=checkpoint)(batch)
    for path in (folder, folder / "model.safetensors", checkpoint.parent):
        np.testing.assert_array_equal(load_reward("audiobox", checkpoint=path)(batch), expected)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.safetensors and config\.json"):
        load_reward("audiobox", checkpoint=folder)


def test_loading_and_scoring_leave_torchs_random_state_alone(checkpoint: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_reward("audiobox", checkpoint=checkpoint)(clips(0.5))
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("state_dict"), "lacks 'state_dict'"),
        (lambda c: c["model_cfg"].pop("nth_layer"), "lacks 'nth_layer'"),
        (lambda c: c["target_transform"].pop("PQ"), "mean and std of every axis"),
        (lambda c: c["state_dict"].pop("model.layer_weights.CE"), "another model"),
        (lambda c: c["state_dict"].update({"model.extra": torch.zeros(1)}), "another model"),
        (lambda c: c["state_dict"].update({"model.layer_weights.CE": torch.zeros(9)}), "another model"),
        (lambda c: c["model_cfg"].update(precision="int3"), "another model"),
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
    broken = {"truncated.pt": checkpoint.read_bytes()[:5000], "empty.pt": b"", "text.pt": b"no weights here\n" * 50}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not a complete checkpoint"):
            load_reward("audiobox", checkpoint=tmp_path / name)
    (tmp_path / "list.pt").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not an Audiobox checkpoint"):
        load_reward("audiobox", checkpoint=tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"no Audiobox weights at .*nowhere\.pt; download"):
        load_reward("audiobox", checkpoint=tmp_path / "nowhere.pt")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        load_reward("audiobox", checkpoint=tmp_path / "bare")


def test_without_a_network_the_published_weights_are_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for checkpoint in ("", "facebook/audiobox-aesthetics"):
        with pytest.raises(UserError, match=r"config\.json and model\.safetensors .*reward\.audiobox_checkpoint"):
            load_reward("audiobox", checkpoint=checkpoint)


def test_without_the_package_the_command_that_installs_it_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "audiobox_aesthetics.model.aes", None)
    with pytest.raises(UserError, match=r"pip install 'fastsmart\[audiobox\]'"):
        load_reward("audiobox", checkpoint=checkpoint)


def test_wrong_axes_and_wrong_sample_rates_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="no axis 'XX'"):
        load_reward("audiobox", checkpoint=checkpoint, axes={"XX": 1.0})
    with pytest.raises(UserError, match="these clips are at 48000 Hz"):
        load_reward("audiobox", checkpoint=checkpoint)(clips(0.1, rate=48_000))


@pytest.mark.slow
def test_ratings_agree_with_upstreams_predictor_at_full_size(tmp_path: Path, upstream: Callable) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint.pt", layers=12)
    batch = clips(10.0, 4.0)
    expected = upstream(checkpoint, batch.audio)
    actual = load_reward("audiobox", checkpoint=checkpoint).rate(batch)
    checkpoint.unlink()  # 378 MB
    for axis in AXES:
        np.testing.assert_allclose(actual[axis], expected[axis], atol=1e-4)
