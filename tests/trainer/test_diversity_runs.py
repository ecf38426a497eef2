"""Runs with every part of [diversity] on: a killed one goes on to the same digits, and two ranks are one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import started
from small_run import SYMBOLIC, command, comparable, write_config

from fastsmart import train
from fastsmart.config import read_config
from fastsmart.policy.checkpoints import best_of
from fastsmart.trainer.evaluate import held_out_distance

FLOOR = 0.95
CHANGES = (
    SYMBOLIC,
    {"reward": {**SYMBOLIC["reward"], "normalize": "none"}},
    # of 160 tokens some forty notes: enough for a clip to be in the target, and for excerpts of 32
    {"sampling": {"group": 2, "max_tokens": 160}},
    {"train": {"steps": 5, "prompts": 4, "eval_every": 2, "eval_prompts": 4, "save_every": 2, "listen": 0}},
    {
        "diversity": {
            **{"stratify": 0.25, "weight": 4.0, "floor": FLOOR, "gate": 0.25},  # the witness acts from the first step
            **{"rehearse": 3, "rehearse_weight": 0.3, "clips": 64},
        }
    },
    {"grpo": {"kl": "k2"}},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run never killed, with its settings beside it."""
    folder = tmp_path_factory.mktemp("diversity")
    train(read_config(write_config(folder, Path("pop909-tiny"), *CHANGES)), folder / "run")
    return folder / "run"


def weights(run: Path) -> bytes:
    return (sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors").read_bytes()


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_digits(whole, tmp_path):
    killed, settings = tmp_path / "run", str(whole.parent / "small.toml")
    with started(
        command(killed, "--config", settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        begun = time.monotonic()
        while process.poll() is None and lines_of(killed) < 4 and time.monotonic() - begun < 300:
            time.sleep(0.01)  # until step 3 has been told: behind it lies the checkpoint of step 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command(killed, "--resume"), check=True, capture_output=True, timeout=600)
    lines = comparable(whole)
    assert all(line["diversity"]["weight"] > 0 for line in lines[1:])
    assert comparable(killed) == lines
    assert weights(killed) == weights(whole)
    states = [sorted((run / "checkpoints").glob("step-*"))[-1] / "state.json" for run in (killed, whole)]
    assert json.loads(states[0].read_text()) == json.loads(states[1].read_text())


def test_the_best_checkpoint_is_the_best_of_those_that_keep_the_floor(whole):
    evaluations = {line["step"]: line["eval"] for line in comparable(whole) if "eval" in line}
    distance = {step: held_out_distance(found["diversity"]) for step, found in evaluations.items()}
    assert list(distance) == [0, 2, 4, 5]
    assert all(0 < value < 1 for value in distance.values())
    evaluated = {}
    for path in (whole / "checkpoints").glob("step-*"):
        state = json.loads((path / "state.json").read_text())
        assert state["held_out_diversity_of_base"] == distance[0]
        if "held_out_reward" not in state:  # the last one, where it was neither better nor due
            continue
        assert state["held_out_diversity_kept"] == pytest.approx(distance[state["step"]] / distance[0])
        evaluated[path.name] = state["held_out_reward"], state["held_out_diversity_kept"]
    assert evaluated
    best, link = best_of(evaluated, FLOOR), whole / "checkpoints" / "best"
    assert link.resolve().name == best if best else not link.exists()


def numbers(value, path=""):
    """Every number of a line under its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif value is not None:
        yield path, float(value)


@pytest.mark.slow
def test_two_ranks_are_one(whole, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launch += ["--nproc-per-node", "2", "-m", "fastsmart", "train", "--out", str(tmp_path / "two")]
    launch += ["--config", str(whole.parent / "small.toml")]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = comparable(whole), comparable(tmp_path / "two")
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        expected = dict(numbers(one))
        assert dict(numbers(two)) == pytest.approx(expected, rel=1e-5, abs=1e-5), one["step"]
