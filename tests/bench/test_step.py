"""The benchmark of the whole step, at toy size."""

import json
import os
import sys
from pathlib import Path

import pytest
from small_audiobox import write_small_audiobox
from tiny_policy import make_policy
from tiny_soundfont import write_soundfont

pytest.importorskip("trl", reason="TRL is a development dependency: pip install -e .[dev]")
import step
from harness import Ceilings

from fastsmart.machine import cpu_affinity
from fastsmart.machine.packed_linear import bfloat16_is_fast
from fastsmart.reward.audiobox.cpu import int8_is_fast
from fastsmart.tokens.vocabulary import Vocabulary


@pytest.mark.slow
def test_all_contenders_take_their_steps(
    vocab: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(step, "playing_policy", lambda size: make_policy(vocab))
    monkeypatch.setattr(step, "make_random_weights", lambda path: write_small_audiobox(path, monkeypatch))
    monkeypatch.setattr(step, "measured_ceilings", lambda device: Ceilings(1.0, 1.0))
    cores, taken = os.sched_getaffinity(0), []
    # as on a GPU, where the training thread keeps one core to itself
    monkeypatch.setattr(cpu_affinity, "split_cores", lambda cores, on_gpu: (list(cores[:1]), list(cores)))
    close = step.OwnStep.close
    monkeypatch.setattr(step.OwnStep, "close", lambda self: taken.append(self.cores) or close(self))
    out, font = tmp_path / "step.json", write_soundfont(tmp_path / "tiny.sf2")
    size = ["--prompts", "2", "--group", "2", "--tokens", "16", "--runs", "2"]
    monkeypatch.setattr(sys, "argv", ["step.py", "--peer", "all", "--soundfont", str(font), "--out", str(out), *size])
    step.main()
    runs = {"float32": True, "int8": int8_is_fast(), "bfloat16": bfloat16_is_fast()}  # in this order they take turns
    ours = [f"fastsmart {dtype}" for dtype, here in runs.items() if here]
    assert taken == [{min(cores)}] * 2 * len(ours)
    assert os.sched_getaffinity(0) == cores
    figures = json.loads(out.read_text())
    assert figures["clips"]["number"] == 4
    assert set(figures["stages"]) == set(step.STAGES)
    assert figures["stages"]["whole"]["floor_s"] > 0
    for stage, stage_figures in figures["stages"].items():
        names = set(stage_figures["contenders"])
        overlapped = {f"{name}, overlapped" for name in ours} if stage == "whole" else set()
        peers = {} if stage == "sync" else step.PEERS
        assert names == {step.REFERENCE, *ours, *overlapped, *peers}
        for contender in stage_figures["contenders"].values():
            assert len(contender["each_s"]) == 2
            assert contender["min_s"] > 0
    assert figures["public_over"]["whole"]["public"] == [1.0, 1.0, 1.0]
    assert bool(figures["left_out"]) != int8_is_fast()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{ours[-1]}, overlapped")
