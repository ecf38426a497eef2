"""What happens to a run that lasts: gradients that are not finite, full disks, workers that die or hang."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import psutil
import pytest
import torch
from small_run import SYMBOLIC, comparable, config_for, write_config

from fastsmart import UserError, train
from fastsmart.machine.files import JsonLines
from fastsmart.machine.gc_control import gc_at_steps
from fastsmart.policy.checkpoints import Checkpoints, Snapshot
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.run.display import Silent
from fastsmart.trainer import grpo


class AtStep(Silent):
    """Does something when a step's line has been written."""

    def __init__(self, actions):
        self.actions, self.said = actions, []

    def line(self, line):
        self.actions.get(line["step"], lambda: None)()

    def message(self, text):
        self.said.append(text)


def poison(monkeypatch, *steps):
    """The advantages of these steps are infinite, and so the gradient is not finite."""
    honest, count = grpo.advantages, iter(range(1, 100))

    def advantages(batch, config):
        advantage = honest(batch, config)
        return advantage * float("inf") if next(count) in steps else advantage

    monkeypatch.setattr(grpo, "advantages", advantages)


def weights(run, step):
    return list(load_policy(run / "checkpoints" / f"step-{step:06d}").parameters())


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(checkpoint, tmp_path, monkeypatch):
    poison(monkeypatch, 3, 4, 6)
    keep = {"train": {"save_every": 1, "keep": 9, "steps": 6}}
    result = train(config_for(checkpoint, SYMBOLIC, keep), tmp_path / "run")
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl").lines()
    assert [line["skipped"] for line in lines[1:]] == [False, False, True, True, False, True]
    assert lines[3]["grad_norm"] is None
    assert lines[5]["grad_norm"] > 0
    two, four, five = (weights(tmp_path / "run", step) for step in (2, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(two, four, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(four, five, strict=True))
    assert result.step == 6


def test_three_in_a_row_end_the_run_with_the_batch_kept(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "run"
    config = config_for(checkpoint, SYMBOLIC, {"train": {"save_every": 0, "eval_every": 0}})
    with monkeypatch.context() as patch:
        poison(patch, 2, 3, 4)
        with pytest.raises(UserError, match=r"3 steps in a row.*nothing has been learnt since step 1.*npz"):
            train(config, out)
    (dump,) = (out / "failed").iterdir()
    batch = np.load(dump)
    assert dump.name == "step-000004-rank-0.npz"
    assert batch["ids"].shape == batch["logprobs"].shape
    assert not np.isfinite(batch["advantage"]).all()
    assert "term_variety" in batch.files
    assert all(p.isfinite().all() for p in weights(out, 4))
    assert train(config, out, resume=True).step == 6  # when what was wrong has been mended, it goes on


def test_the_best_checkpoint_stays_beside_the_last(policy, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    optimizer = make_optimizer(policy, 1e-3, (0.9, 0.999), 0.0)
    for step, reward in enumerate([0.1, 0.7, None, 0.5, None, 0.6], start=1):
        record = {} if reward is None else {"held_out_reward": reward}
        checkpoints.write(Snapshot.of(step, policy, optimizer, record))
    assert [p.name for p in checkpoints.all()] == ["step-000002", "step-000005", "step-000006"]
    assert checkpoints.best() == (tmp_path / "step-000002", 0.7)
    assert (tmp_path / "best").resolve() == tmp_path / "step-000002"
    assert checkpoints.step == 6
    load_policy(tmp_path / "best")


def test_a_snapshot_is_out_of_reach_of_later_steps(policy, tmp_path):
    optimizer = make_optimizer(policy, 1e-3, (0.9, 0.999), 0.0)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [p.detach().clone() for p in policy.parameters()]
    snapshot = Snapshot.of(1, policy, optimizer)
    moments = {name: tensor.clone() for name, tensor in snapshot.optimizer.items()}
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot.policy.parameters(), before, strict=True))
    assert all(torch.equal(snapshot.optimizer[name], tensor) for name, tensor in moments.items())


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from fastsmart import train
    from fastsmart.config import read_config
    from fastsmart.run.display import Silent

    out = Path(sys.argv[2])

    class Disk(Silent):
        def line(self, line):
            if line["step"] == 2:  # room for half a line of metrics more, and for no checkpoint
                size = (out / "metrics.jsonl").stat().st_size + 100
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            if line["step"] == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        def message(self, text):
            print(text)

    train(read_config(sys.argv[1]), out, display=Disk())
"""


@pytest.mark.usefixtures("light_runs")
def test_a_disk_that_is_full_for_a_while_costs_nothing_but_checkpoints(checkpoint, tmp_path):
    often = {"train": {"save_every": 1, "eval_every": 0}}
    settings = write_config(tmp_path, checkpoint, SYMBOLIC, often)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(settings), str(tmp_path / "full")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "metrics wait in memory" in said
    assert "a checkpoint could not be saved" in said
    train(config_for(checkpoint, SYMBOLIC, often), tmp_path / "free")
    assert comparable(tmp_path / "full") == comparable(tmp_path / "free")
    lines = JsonLines(tmp_path / "full" / "metrics.jsonl").lines()
    assert sum(line["health"].get("failed_saves", 0) for line in lines) >= 1
    assert any("checkpoint" in note for line in lines for note in line["health"].get("notes", []))
    assert [p.name for p in sorted((tmp_path / "full" / "checkpoints").glob("step-*"))][-1] == "step-000006"


def test_lines_that_found_the_disk_full_come_later_and_whole(tmp_path):
    script = """
        import resource, sys
        from pathlib import Path
        from fastsmart.errors import UserError
        from fastsmart.machine.files import JsonLines
        metrics = JsonLines(Path(sys.argv[1]))
        metrics.append({"step": 0})
        for limit in (40, resource.RLIM_INFINITY):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            for step in (1, 2, 3):
                try:
                    metrics.append({"step": step if limit == 40 else step + 3, "text": "x" * 40})
                except UserError:
                    print(metrics.path.read_text())
    """
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split() == ['{"step":', "0}"] * 3  # never half a line
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("sign", "fate", "timeout_s"), [(signal.SIGKILL, "died", 60.0), (signal.SIGSTOP, "hung", 5.0)])
@pytest.mark.usefixtures("light_runs")
def test_a_worker_that_dies_or_hangs_is_named_replaced_and_changes_nothing(checkpoint, tmp_path, sign, fate, timeout_s):
    patient = {"audio": {"clip_timeout_s": timeout_s}, "train": {"steps": 3, "eval_every": 0}}

    def strike():
        workers = [p for p in psutil.Process().children() if "fastsmart.audio.worker" in p.cmdline()]
        os.kill(workers[0].pid, sign)

    display = AtStep({1: strike})
    train(config_for(checkpoint, patient), tmp_path / "struck", display=display)
    train(config_for(checkpoint, patient), tmp_path / "calm")
    assert comparable(tmp_path / "struck") == comparable(tmp_path / "calm")
    lines = JsonLines(tmp_path / "struck" / "metrics.jsonl").lines()
    assert sum(line["health"].get("workers_replaced", 0) for line in lines) == 1
    (note,) = [note for line in lines for note in line["health"].get("notes", [])]
    assert note.startswith("render worker 0 (process ")
    assert fate in note
    assert note in display.said


@pytest.mark.usefixtures("light_runs")
def test_what_happened_in_steps_that_are_done_again_stays_in_the_account(checkpoint, tmp_path):
    out, config = tmp_path / "run", config_for(checkpoint, SYMBOLIC, {"train": {"eval_every": 0}})
    train(config, out)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    metrics = JsonLines(out / "metrics.jsonl")
    lines = metrics.lines()
    for line in lines[4:]:  # after the last checkpoint there is
        line["health"] |= {"workers_replaced": 1, "notes": [f"a worker died in step {line['step']}"]}
    metrics.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(config, out, resume=True)
    after = metrics.lines()
    assert [line["step"] for line in after] == list(range(7))
    assert after[5]["health"]["workers_replaced"] == 2
    assert after[5]["health"]["notes"] == [
        "a worker died in step 5", "a worker died in step 6", "resumed after step 4"
    ]  # fmt: skip
    assert after[4]["health"]["workers_replaced"] == 1


def test_memory_is_collected_at_steps_only():
    assert gc.isenabled()
    with gc_at_steps() as collect:
        assert not gc.isenabled()
        loops = [[] for _ in range(3)]
        for one in loops:
            one.append(one)
        del loops, one
        collect(1)
        assert gc.collect(0) == 0
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


HEAP_IN_PIECES = """
    import psutil
    from fastsmart.machine.gc_control import give_back_memory

    resident = psutil.Process().memory_info
    blocks = [bytes(4000) for _ in range(50_000)]
    full = resident().rss
    del blocks[:-1]  # the last one holds the heap's end where it is
    left = resident().rss
    give_back_memory()
    print((full - left) / 2e8, (full - resident().rss) / 2e8)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc gives back what it is asked for")
def test_memory_that_is_free_between_kept_blocks_is_given_back():
    command = [sys.executable, "-c", textwrap.dedent(HEAP_IN_PIECES)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of_itself, asked = map(float, printed.split())
    assert of_itself < 0.1
    assert asked > 0.9
