"""The stage scripts, at toy sizes, and the arithmetic their floors are made of."""

import importlib
import json
import sys
from functools import partial

import harness
import numpy as np
import pytest
import suite
import torch
from harness import Ceilings, parser
from peers.engines import ENGINES, Engines, PlainEncoder
from results import write_result
from stages import decoding_work, made, one_pass, parse, phi3, played, update_work
from tiny_policy import make_policy
from tiny_soundfont import write_soundfont
from torch.utils.flop_counter import FlopCounterMode
from vllm_policy import make_vllm_policy

from fastsmart.errors import UserError
from fastsmart.reward.audiobox import AudioboxReward, cpu, make_random_weights, read_weights
from fastsmart.reward.audiobox.architecture import WINDOW, Size
from fastsmart.reward.audiobox.cpu import int8_is_fast
from fastsmart.reward.audiobox.encoder import encoder_weights

SMALL = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)
TOY = {
    "sampling": ["--prompts", "1", "--tokens", "6", "--peer", "generate"],
    "decode": ["--pieces", "3", "--tokens", "24", "--peer", "miditok"],
    "score": ["--batches", "2", "--no-memory"],
    "logprob": ["--sizes", "smart", "--completions", "1", "--no-memory", "--peer", "eager", "--peer", "trl"],
    "update": ["--completions", "8", "--tokens", "12", "--peer", "transformers", "--peer", "whole-logits"],
    "sync": ["--peer", "checkpoint"],
}
CONTENDERS = {  # ours, then the peers
    "sampling": ["native", "transformers generate"],
    "decode": ["numba, one batch", "numba, piece by piece", "MidiTok and symusic"],
    "score": ["float32", *(["int8"] if int8_is_fast() else [])],
    "logprob": ["fastsmart", "torch eager", "trl", "products"],
    "update": ["fastsmart", "transformers", "ours, whole logits"],
    "sync": ["native", "checkpoint"],
    "render": ["bank", "bank, pool, 1 process", "bank, pool, 2 processes", "fluidsynth, 48 kHz resampled",
               "symusic, 16 kHz mono"],
}  # fmt: skip


@pytest.fixture
def toy(vocab, monkeypatch):
    """Call a script with a tiny policy, Audiobox and reference kernel, and ceilings that are not measured."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(harness, "reference_kernel", lambda device: lambda: None)

    def call(stage, *options, size=SMALL):
        script = importlib.import_module(stage)
        monkeypatch.setattr(script, "measured_ceilings", lambda *_: Ceilings(100.0, 10.0))
        monkeypatch.setattr(
            script, "paper_policy", lambda device: make_vllm_policy(vocab, max_positions=64), raising=False
        )
        monkeypatch.setattr(script, "make_random_weights", partial(make_random_weights, size=size), raising=False)
        return script.main(["--runs", "1", "--device", "cpu", "--threads", "2", *options])

    yield call
    torch.set_num_threads(threads)


def check(figures, stage, path):
    written = json.loads(path.read_text())
    assert written["stage"] == stage
    assert {"command", "commit", "machine", "packages"} <= written.keys()
    assert figures["left_out"].keys() == ({"int8"} if stage == "score" and not int8_is_fast() else set())
    (case,) = figures["cases"].values()
    assert list(case["contenders"])[:-1] == CONTENDERS[stage]
    assert case["ours"] == CONTENDERS[stage][0]
    assert case["floor_s"] > 0
    assert ("int8_floor" in case) is ("int8" in CONTENDERS[stage])
    assert written["cases"].keys() == figures["cases"].keys()


@pytest.mark.parametrize("stage", TOY)
def test_a_stage_is_measured_beside_its_peers(toy, stage, tmp_path):
    path = tmp_path / "result.json"
    check(toy(stage, *TOY[stage], "--out", str(path)), stage, path)


def test_what_the_processor_cannot_do_is_left_out_by_name(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "int8_is_fast", lambda: False)
    path = tmp_path / "result.json"
    toy("score", *TOY["score"], "--out", str(path))
    written = json.loads(path.read_text())
    assert list(written["left_out"]) == ["int8"]
    assert "AVX2" in written["left_out"]["int8"]
    assert list(written["cases"]["batch 2"]["windows_per_s"]) == ["float32"]
    with pytest.raises(UserError, match="AVX2"):
        toy("score", *TOY["score"], "--dtypes", "int8")


def test_a_result_names_the_chip_and_how_busy_the_machine_was(tmp_path):
    write_result(tmp_path / "result.json", {})
    machine = json.loads((tmp_path / "result.json").read_text())["machine"]
    assert {"processor", "family", "instruction_sets", "held_back_by", "load_average", "cores"} <= machine.keys()
    assert machine["family"]
    assert len(machine["load_average"]) == 3


def test_an_encoder_that_errs_does_not_pass(toy, monkeypatch):
    """What a GPU runs is held against the float32 encoder of a CPU, here its twin in 16 bit."""
    from fastsmart.reward.audiobox import gpu

    options = ["--batches", "1", "--no-memory", "--dtypes", "float16"]
    figures = toy("score", *options)
    assert figures["passed"]
    assert 0 < figures["encoder_error"]["float16"] < 1e-3
    blocks = gpu.key_blocks
    monkeypatch.setattr(gpu, "key_blocks", lambda bias: blocks(bias.mT))  # distances with the wrong sign
    wrong = toy("score", *options)
    assert not wrong["passed"]
    assert wrong["encoder_error"]["float16"] > 10 * figures["encoder_error"]["float16"]


ENGINE_PEERS = [word for name in ENGINES for word in ("--peer", name)]


def test_engines_whose_package_is_missing_are_left_out_by_name(toy, monkeypatch):
    for package in ("onnxruntime", "openvino", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    figures = toy("score", *TOY["score"], "--dtypes", "float32", *ENGINE_PEERS)
    assert list(figures["left_out"]) == list(ENGINES)
    assert all(name.partition("-")[0] in reason for name, reason in figures["left_out"].items())
    assert list(figures["cases"]["batch 2"]["windows_per_s"]) == ["float32"]


def test_an_engine_that_computes_something_else_has_no_turn(toy, monkeypatch):
    monkeypatch.setattr(Engines, "encoder", lambda engines, name: lambda window: np.ones((1, 3, 32), np.float32))
    figures = toy("score", *TOY["score"], "--dtypes", "float32", "--peer", "onnxruntime")
    assert "errs by" in figures["left_out"]["onnxruntime"]
    assert figures["peer_error"]["onnxruntime"] > 0.5
    assert list(figures["cases"]["batch 2"]["windows_per_s"]) == ["float32"]


def test_engines_are_made_from_the_encoder_that_ours_is(tmp_path):
    checkpoint = make_random_weights(tmp_path / "checkpoint.pt", size=SMALL)
    windows = np.random.default_rng(0).normal(size=(2, WINDOW)).astype(np.float32)
    with torch.no_grad():
        exact = AudioboxReward(checkpoint).encoder(list(windows))
        plain = PlainEncoder(encoder_weights(read_weights(checkpoint).state))(torch.from_numpy(windows))
    torch.testing.assert_close(plain, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8", "openvino", "torchao-int8"])
def test_an_engine_rates_as_ours_does(toy, name):
    """Those of OpenVINO with fewer bits err too much with so small a network, and say so."""
    pytest.importorskip(name.partition("-")[0], reason="not installed: see bench/README.md", exc_type=ImportError)
    figures = toy("score", *TOY["score"], "--dtypes", "float32", "--peer", name)
    (case,) = figures["cases"].values()
    assert not figures["left_out"]
    assert figures["peer_error"][name] < (1e-5 if "int8" not in name else 0.05)
    assert max(case["largest_difference"][name].values()) < (1e-3 if "int8" not in name else 0.5)


def test_rendering_is_measured_beside_its_peers(toy, tmp_path, monkeypatch):
    import render

    monkeypatch.setattr(render, "played", lambda pieces: played(pieces, 24))  # few notes to be stored first
    font, path = write_soundfont(tmp_path / "tiny.sf2"), tmp_path / "result.json"
    options = ["--quick", "--clips", "2", "--soundfont", str(font), "--peer", "fluidsynth", "--peer", "symusic"]
    check(toy("render", *options, "--out", str(path)), "render", path)


@pytest.mark.slow
def test_the_rest_of_what_rendering_measures(toy, tmp_path):
    font = str(write_soundfont(tmp_path / "tiny.sf2"))
    figures = toy("render", "--clips", "2", "--soundfont", font)
    assert "bank, exact, its notes kept" in figures["cases"]["2 clips"]["contenders"]
    assert figures["fidelity"]["tiny.sf2"]["stored_snr_db"]["median"] > 20
    assert figures["cold"]["keys"] == 88
    assert toy("render", "--clips", "2", "--soundfont", font, "--leak", "8")["leak"]["segments_left"] == 0


@pytest.mark.slow
def test_the_suite_runs_a_script_and_reads_its_result(tmp_path):
    assert suite.measure("decode", tmp_path)
    (name,) = suite.read_rows(tmp_path)
    assert name == "decode 64 x 256"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sampling", "sync"])
def test_vllm_takes_its_turns(toy, stage):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    importlib.import_module(stage)
    (case,) = toy(stage, *TOY[stage], "--peer", "vllm")["cases"].values()
    assert "vllm" in case["contenders"]


@pytest.mark.slow
def test_scoring_at_its_real_size_agrees_with_the_package_beside_it(toy):
    (case,) = toy("score", "--batches", "1", "--no-memory", "--peer", "upstream", size=Size())["cases"].values()
    assert set(case["windows_per_s"]) == {*CONTENDERS["score"], "upstream"}
    assert max(case["largest_difference"]["float32"].values()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score", "logprob"])
def test_memory_is_measured_in_a_process_of_its_own(toy, stage):
    figures = toy(stage, *(option for option in TOY[stage] if option != "--no-memory"))
    (peaks,) = [figures.get("peak_mib_of_one_window") or case["peak_mib"] for case in figures["cases"].values()]
    assert all(mib >= 0 for mib in peaks.values())
    assert len(peaks) == len(CONTENDERS[stage])


@pytest.mark.slow
def test_the_public_pipelines_trainer_updates_on_the_same_completions(toy):
    pytest.importorskip("peers.public", reason="the peers are not installed: make bench-peers")
    (case,) = toy("update", "--completions", "8", "--tokens", "12", "--peer", "trl")["cases"].values()
    assert "trl" in case["contenders"]


def test_ours_and_transformers_update_alike(vocab):
    """Not only as long as each other: the same loss, before and after the first step."""
    import update

    policy = make_policy(vocab, spread=2.0)
    rollout = update.made_up(policy, 8, 12)
    advantage = torch.randn(8, generator=torch.Generator().manual_seed(1))
    ours = update.ours(policy, rollout, advantage, torch.float32)
    theirs = update.plain(policy, rollout, advantage, torch.float32)
    for _ in range(2):
        assert ours().stats["loss"] == pytest.approx(theirs(), rel=1e-4)


def test_quick_changes_defaults_and_not_what_was_asked_for():
    def options(*arguments):
        made = parser("", 5)
        made.add_argument("--size", type=int, default=100)
        return parse(made, {"size": 10, "runs": 2}, ["--threads", str(torch.get_num_threads()), *arguments])

    assert (options().size, options().runs) == (100, 5)
    assert (options("--quick").size, options("--quick").runs) == (10, 2)
    assert options("--quick", "--size", "50").size == 50


def test_a_peer_that_is_missing_is_left_out_with_the_reason(capsys):
    def missing():
        raise ImportError("No module named 'nothing'")

    options = parser("", 1, ["a", "b"]).parse_args(["--peer", "all"])
    jobs, left_out = made({"a": missing, "b": lambda: {"b": len}}, options)
    assert list(jobs) == ["b"]
    assert left_out == {"a": "No module named 'nothing'"}
    assert "a is left out: No module named 'nothing'" in capsys.readouterr().out


def test_one_pass_divides_the_contenders_that_repeat():
    assert one_pass({"a": [4.0], "b": [3.0]}, {"a": 4}) == {"a": [1.0], "b": [3.0]}


def test_pieces_are_always_the_same():
    (one, _), (other, _) = played(2, 8), played(2, 8)
    assert one.ids.shape == (2, 8)
    assert (one.ids == other.ids).all()


@pytest.fixture
def counted(vocab):
    """A policy, and GFLOP that torch itself counts of transformers' twin on 2 x 16 tokens: matrix products of an update
    with its reference pass, and attention of one pass, of all pairs, also those the mask takes out."""
    policy, ids = make_policy(vocab), torch.zeros(2, 16, dtype=torch.int64)
    model = phi3(policy)
    model.set_attn_implementation("eager")  # whose attention is products that torch counts
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            model(ids)
        attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
        model(ids).logits.sum().backward()
    return policy, 1e-9 * counter.get_flop_counts()["Global"][torch.ops.aten.mm], 1e-9 * attention


def test_an_update_takes_what_torch_counts(counted):
    policy, products, attention = counted
    work = update_work(policy, 2, 16)
    assert work[0].gflop == pytest.approx(products)
    assert work[1].gflop == pytest.approx(4 * attention / 2, rel=0.1)  # half of all pairs, four times


def test_drawing_a_token_takes_a_forward_pass(counted):
    """Without the prompt, whose last position draws the first token: 16 tokens are 16 positions."""
    policy, products, attention = counted
    work = decoding_work(policy, 2, 0, 16, 4)
    assert work[0].gflop == pytest.approx(products / 4)
    assert work[1].gflop == pytest.approx(attention * 17 / 32, rel=0.1)  # 1 + 2 + ... + 16 keys of 16 x 16
