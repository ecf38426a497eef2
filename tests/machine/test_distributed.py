"""Several ranks do what one does: the same trajectory, whoever draws a completion; a rank that dies costs nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from processes import started
from small_run import SYMBOLIC, comparable, config_for, write_config
from tiny_policy import make_policy

from fastsmart import UserError, train
from fastsmart.config import read_config
from fastsmart.machine.cpu_affinity import parse_cores, rank_cores, split_cores
from fastsmart.machine.distributed import Ranks, of_this_attempt
from fastsmart.machine.files import JsonLines
from fastsmart.policy.hf_format import save_policy
from fastsmart.trainer.rollout_worker import RolloutWorker

# Ranks round otherwise than one does alone. Where a random number lies within that of the border between two tokens, as
# once with seed 0 (0.32497549 and a border at 0.32497552), they draw another and are apart from there on
TWENTY = {
    "train": {"seed": 1, "steps": 20, "prompts": 4, "eval_every": 10, "eval_prompts": 7, "save_every": 5},
    "sampling": {"group": 4, "max_tokens": 40},
}


def torchrun(out: Path, *options: str, ranks: int = 2, restarts: int = 0) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launch += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    return [*launch, "-m", "fastsmart", "train", "--out", str(out), *options]


def environment() -> dict[str, str]:
    return os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def launch(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(value, path=""):
    """Every number of a line under its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif value is not None:
        yield path, float(value)


def assert_close(run: Path, other: Path, tolerance: float) -> None:
    ours, theirs = comparable(run), comparable(other)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        a, b = dict(numbers(a)), dict(numbers(b))
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["/step"], key)


@pytest.fixture(scope="module")
def alone(vocab, tmp_path_factory) -> Path:
    """The folder of a run on one rank, with its settings beside it."""
    folder = tmp_path_factory.mktemp("alone")
    save_policy(make_policy(vocab), folder / "tiny")
    train(read_config(write_config(folder, folder / "tiny", TWENTY)), folder / "run")
    return folder / "run"


def test_two_ranks_are_one_to_five_digits_over_twenty_steps(alone, tmp_path):
    two = tmp_path / "two"
    said = launch(torchrun(two, "--config", str(alone.parent / "small.toml")))
    assert_close(alone, two, 1e-5)
    assert said.count("step 20/20") == 1  # rank 0 alone talks
    assert {p.name for p in alone.iterdir()} == {p.name for p in two.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"advantage_scale": "batch"}, {"pipeline": "one-step-off"}, {"prompts": 5}])
def test_and_so_they_are_whatever_is_set(checkpoint, tmp_path, change):
    settings = str(write_config(tmp_path, checkpoint, TWENTY, {"train": change}))
    for ranks in (1, 2):
        launch(torchrun(tmp_path / str(ranks), "--config", settings, ranks=ranks))
    assert_close(tmp_path / "1", tmp_path / "2", 1e-5)


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_is_started_again_and_the_run_ends_the_same(alone, tmp_path):
    killed, settings = tmp_path / "killed", ["--config", str(alone.parent / "small.toml")]
    with started(
        torchrun(killed, *settings, "--resume", "auto", restarts=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
        text=True,
    ) as agent:
        assert agent.stdout
        workers: set[int] = set()
        for line in agent.stdout:
            if line.startswith("step 7/"):
                ranks = [p for p in psutil.Process(agent.pid).children() if "fastsmart" in p.cmdline()]
                assert len(ranks) == 2
                workers = {worker.pid for rank in ranks for worker in rank.children()}
                os.kill(max(rank.pid for rank in ranks), signal.SIGKILL)
                break
        rest = agent.stdout.read()
        assert agent.wait(timeout=300) == 0
    assert "step 6/20" in rest or "step 7/20" in rest, "it went on from its last checkpoint"
    assert_close(alone, killed, 1e-5)
    assert workers
    assert not any(psutil.pid_exists(pid) for pid in workers), "render workers die with their rank"


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_at_one_step_on_all_ranks(checkpoint, tmp_path):
    many = {"train": {"steps": 5000, "eval_every": 0, "save_every": 0, "prompts": 2, "listen": 0}}
    settings = ["--config", str(write_config(tmp_path, checkpoint, many))]
    with started(
        torchrun(tmp_path / "run", *settings), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
        text=True,
    ) as agent:  # fmt: skip
        assert agent.stdout
        for line in agent.stdout:
            if line.startswith("step 3/"):
                agent.send_signal(signal.SIGTERM)
                break
        rest = agent.stdout.read()
        agent.wait(timeout=60)
    assert "SIGTERM: saved at step" in rest
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert JsonLines(tmp_path / "run" / "metrics.jsonl").lines()[-1]["step"] == int(saved.name.removeprefix("step-"))


def test_ranks_started_again_find_each_other_and_not_the_dead():
    """torchrun hands every attempt the same store; here two attempts died at different moments before the third."""
    world, store = 3, dist.HashStore()

    def attempt(alive: range) -> list[dist.Store]:
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(lambda rank: of_this_attempt(store, rank, world), alive))

    for store_of_rank in attempt(range(world)):
        store_of_rank.set("address", "of the dead")
    store.set("rank 2", "a word whose rank died before it was answered")
    stores = attempt(range(world))
    assert not any(s.check(["address"]) for s in stores)
    stores[2].set("address", "of rank 2")
    assert [s.get("address") for s in stores] == [b"of rank 2"] * world


def test_shares_cover_everything_once_in_order():
    for world in (1, 2, 3, 8):
        for total in (8, 13, 64):
            ranks = [Ranks(rank, world) for rank in range(world)]
            assert [i for rank in ranks for i in rank.share(total)] == list(range(total))
            assert all(ranks[0].share(total, r) == rank.share(total) for r, rank in enumerate(ranks))


def test_each_rank_needs_a_prompt(policy, checkpoint):
    with pytest.raises(UserError, match=r"train\.prompts is 2, fewer than the 3 ranks"):
        RolloutWorker(config_for(checkpoint, SYMBOLIC), policy, "", torch.float32, ranks=Ranks(1, 3))


def test_one_rank_needs_no_group():
    rows = np.arange(6.0).reshape(3, 2)
    assert Ranks().gather(rows, 3) is rows
    assert Ranks().max(7) == Ranks().broadcast(7) == 7


def test_cores_go_to_ranks_by_their_device():
    two_nodes = [range(0, 8)] * 2 + [range(8, 16)] * 2
    assert [rank_cores(range(16), two_nodes, r) for r in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
    assert rank_cores([4, 5, 6], two_nodes, 0) == [4]
    assert rank_cores([4, 5, 6], two_nodes, 2) == [4, 5, 6]  # none near: all there are
    assert rank_cores([0, 1], [range(2)] * 3, 0) == [0, 1]  # more ranks than cores
    assert split_cores([2, 3, 4, 5], on_gpu=True) == ([2], [3, 4, 5])
    assert split_cores([2, 3], on_gpu=True) == ([2, 3], [2, 3])
    assert split_cores([2, 3, 4, 5], on_gpu=False) == ([2, 3, 4, 5], [2, 3, 4, 5])
    assert parse_cores("0-3,8,10-11\n") == [0, 1, 2, 3, 8, 10, 11]


def test_a_run_of_several_ranks_is_refused_where_torchrun_is_missing(checkpoint, tmp_path):
    command = [sys.executable, "-m", "fastsmart", "train", "--preset", "demo", "--out", str(tmp_path / "run")]
    environment_ = {key: value for key, value in os.environ.items() if key != "RANK"} | {"WORLD_SIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment_, timeout=120, check=False)
    assert done.returncode == 2
    assert "torchrun" in done.stderr
    assert not (tmp_path / "run").exists()
