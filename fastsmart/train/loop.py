"""A training run, from the first prompt to the last checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.files import cpu_cores, os_errors_as_user_errors
from fastsmart.grpo.advantages import group_advantages
from fastsmart.policy.transformer import Policy
from fastsmart.reward import combine
from fastsmart.stopping import StopRequest, stop_signals
from fastsmart.train.curves import draw_curves
from fastsmart.train.display import Display
from fastsmart.train.evaluate import before_after, evaluate, write_listening
from fastsmart.train.folder import RunFolder
from fastsmart.train.housekeeping import collections_at_steps
from fastsmart.train.learner import Learner
from fastsmart.train.metrics import Batch, metrics, timing
from fastsmart.train.parity import check_engine, health_warning, unhealthy
from fastsmart.train.placement import take_cores
from fastsmart.train.provenance import provenance, statistics_path
from fastsmart.train.ranks import Ranks, join_ranks
from fastsmart.train.record import Record
from fastsmart.train.stations import Performance, Rollouts, Stations
from fastsmart.train.update import Update

MAX_SKIPPED = 3  # steps in a row whose gradient is not finite before a run gives up


@dataclass(frozen=True)
class Run:
    """How a run ended.

    policy  : the tuned policy, in eval mode
    path    : the run folder
    step    : the last step
    before, after : summaries of the held-out evaluations (see `evaluate.summarise`); None where it did not come to it
    exit_code : 0, or 128 + signal when it was asked to stop
    """

    policy: Policy
    path: Path
    step: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    exit_code: int


def train(
    config: Config,
    out: str | Path,
    resume: bool = False,
    display: Display | None = None,
    ranks: Ranks | None = None,
) -> Run:
    """Tune a policy as the config says, into the folder `out`; with `resume`, go on with the run that is there.

    Started by torchrun, every rank calls this with the same arguments (`ranks`: see `join_ranks`, which is the
    default). SIGINT and SIGTERM let the step under way end, save a checkpoint and leave. A run killed at any moment and
    resumed, on any number of ranks, writes the metrics of one never killed (on one rank of a CPU to the last digit),
    apart from those under `time` and `health`.

    Raises UserError for whatever in config, files or machine the user can mend, and when the gradient has not been
    finite three steps in a row.
    """
    ranks = ranks or join_ranks()
    folder = RunFolder.open(out, config, resume, ranks)
    config, knobs = folder.config, folder.config.train

    with (
        stop_signals() as stop,
        at_work(folder, ranks, display) as (learner, stations, record),
        collections_at_steps() as collect,
    ):
        trace, rollouts = stations.trace, Rollouts(stations, record.stage)
        if learner.step == 0:
            summary = hear_held_out(stations, record, "before")
            record.line({"step": 0, "eval": summary, "time": {"evaluate": trace.take_apart()}}, rollouts)
        while learner.step < knobs.steps and not asked_to_stop(stop, ranks):
            taken = take_step(learner, stations, rollouts)
            step, reward, line = learner.step, None, taken.line
            if step == knobs.steps or (knobs.eval_every and step % knobs.eval_every == 0):
                rollouts.sync(learner.policy, step)
                line["eval"] = hear_held_out(stations, record, "after" if step == knobs.steps else "")
                line["time"]["evaluate"] = trace.take_apart()
                reward = line["eval"]["reward"]["mean"]
            record.line(line, rollouts)
            if taken.batch.version == step - 1 and unhealthy(taken.change, config, learner.dtype):
                rollouts.sync(learner.policy, step)
                warning = health_warning(stations.engine, learner.policy, config, taken.change, learner.dtype)
                record.note(f"step {step}: {warning}")
            if record.better(reward) or (knobs.save_every and step % knobs.save_every == 0):
                record.save(learner.snapshot(reward))
            if learner.skipped >= MAX_SKIPPED:
                give_up(record, learner, taken)
            collect(step)
        if learner.step > record.saved:
            record.save(learner.snapshot())
        record.finish()
        return conclude(folder, record, learner, stop)


@contextmanager
def at_work(
    folder: RunFolder, ranks: Ranks, display: Display | None = None
) -> Iterator[tuple[Learner, Stations, Record]]:
    """Who does the work of a run, ready for its next step; the engine has been checked to hold the policy's weights."""
    config = folder.config
    take_cores(ranks)
    torch.set_num_threads(config.train.threads or cpu_cores())
    learner = Learner(config, folder.checkpoints, ranks)
    (sampler, version), statistics = learner.sampler_weights(), statistics_path(config)
    with (
        Stations(config, sampler, statistics, learner.dtype, version, folder.path / "failed", ranks) as stations,
        Record(folder, stations, display) as record,
    ):
        record.start(learner.step, provenance(config, learner.reference, statistics, stations.renders_with))
        check_engine(stations.engine, sampler, config, version, learner.dtype)
        yield learner, stations, record


@dataclass(frozen=True)
class Taken:
    """A step that has been taken.

    advantage : float32 [N], of the completions of all ranks
    line      : of metrics, without what is still to come: held-out evaluation and health
    """

    performance: Performance
    batch: Batch
    advantage: torch.Tensor
    change: Update
    line: dict[str, Any]


def take_step(learner: Learner, stations: Stations, rollouts: Rollouts) -> Taken:
    """Have the next batch performed, and learn from it."""
    config, trace, start = learner.config, stations.trace, time.perf_counter()
    performance = rollouts.take(learner.step, learner.policy)
    batch = Batch.gather(performance, config.train.prompts, learner.ranks)
    advantage = advantages(batch, config)
    with trace("update"):
        change = learner.learn(performance, batch, advantage, trace)
    line = metrics(learner.step, batch, advantage, change)
    line["time"] = timing(*trace.take(), time.perf_counter() - start, performance, len(advantage))
    return Taken(performance, batch, advantage, change, line)


def asked_to_stop(stop: StopRequest, ranks: Ranks) -> bool:
    """Whether somebody has asked any rank to stop; all ranks get the same answer."""
    stop.signal_number = ranks.largest(stop.signal_number)
    return bool(stop)


def advantages(batch: Batch, config: Config) -> torch.Tensor:
    """Advantage of each completion of all ranks, float32 [N], from the training signal its scores combine to."""
    signal_ = combine(batch.scores.terms, config.reward.terms, batch.group, config.reward.normalize)
    return group_advantages(torch.from_numpy(signal_), torch.from_numpy(batch.group), config.train.advantage_scale)


def hear_held_out(stations: Stations, record: Record, label: str) -> dict[str, Any]:
    """Evaluate the engine's weights; with a label, keep clips to listen to under it."""
    with stations.trace.apart("evaluate"):
        performances, summary = evaluate(stations, record.stage)
        if label and stations.ranks.leader:
            write_listening(stations, performances, record.folder.listen, label)
    return summary


def give_up(record: Record, learner: Learner, taken: Taken) -> None:
    """Save the policy, which is still finite, and the batch that is not; raises UserError saying so."""
    record.save(learner.snapshot())
    record.finish()
    rollout, mine, rank = taken.performance.rollout, taken.batch.mine, learner.ranks.rank
    path = record.folder.path / "failed" / f"step-{learner.step:06d}-rank-{rank}.npz"
    with os_errors_as_user_errors(path):
        path.parent.mkdir(exist_ok=True)
        terms = {f"term_{name}": values for name, values in taken.performance.scores.terms.items()}
        advantage = taken.advantage[mine.start : mine.stop].numpy()
        arrays: dict[str, Any] = {**vars(rollout), **terms, "advantage": advantage}
        np.savez(path, **arrays)
    raise UserError(
        f"the gradient was not finite {MAX_SKIPPED} steps in a row, so nothing has been learnt since step "
        f"{learner.step - MAX_SKIPPED}; the last batch is in {path}; look into it, or start again with a lower "
        "train.learning_rate"
    )


def conclude(folder: RunFolder, record: Record, learner: Learner, stop: StopRequest) -> Run:
    """Draw the curves, write the table where there is an after, and say how it ended."""
    step, steps = learner.step, folder.config.train.steps
    learner.ranks.same(step)  # rank 0 has written all lines
    evaluations = [line["eval"] for line in folder.metrics.lines() if "eval" in line]
    finished = step >= steps and len(evaluations) > 1
    before, after = evaluations[0] if evaluations else None, evaluations[-1] if finished else None
    if learner.ranks.leader:
        draw_curves(folder.metrics.lines(), folder.path / "curves.png")
        if before and after:
            folder.write("before_after.md", before_after(before, after, step))
    if stop and step < steps:
        name = signal.Signals(stop.signal_number).name
        record.show.message(f"{name}: saved at step {step}; go on with: fastsmart train --out {folder.path} --resume")
    exit_code = stop.exit_code if step < steps else 0
    return Run(learner.policy.eval(), folder.path, step, before, after, exit_code)
