"""A training run, from the first prompt to the last checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.grpo.advantages import group_advantages
from fastsmart.machine.cpu_affinity import bind_cores
from fastsmart.machine.distributed import Ranks, join_ranks
from fastsmart.machine.files import cpu_cores, os_errors_as_user_errors
from fastsmart.machine.gc_control import gc_at_steps
from fastsmart.machine.signals import StopRequest, stop_signals
from fastsmart.policy.device import resolved_device
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.transformer import Policy
from fastsmart.reward import combine
from fastsmart.run.curves import plot_curves
from fastsmart.run.display import Display
from fastsmart.run.folder import TABLE_FILE, RunFolder
from fastsmart.run.provenance import provenance, statistics_path
from fastsmart.run.recorder import Recorder
from fastsmart.trainer.batch import Batch, metrics, timing
from fastsmart.trainer.diversity_control import diversity_control
from fastsmart.trainer.evaluate import HeldOut, before_after, evaluate, write_listening
from fastsmart.trainer.parity import check_engine, health_warning, unhealthy
from fastsmart.trainer.rollout_worker import RolloutScheduler, RolloutWorker, ScoredRollout
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update

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
    changes: Mapping[str, Any] | None = None,
) -> Run:
    """Tune a policy as the config says, into the folder `out`; with `resume`, go on with the run that is there.

    Started by torchrun, every rank calls this with the same arguments (`ranks`: see `join_ranks`, which is the
    default). SIGINT and SIGTERM let the step under way end, save a checkpoint and return from here; the process goes
    on, and a script that is to leave too looks at `Run.exit_code`. A run killed at any moment and resumed, on any
    number of ranks, writes the metrics of one never killed (on one rank of a CPU to the last digit), apart from those
    under `time` and `health`. A finished run is only read.

    changes : new values of keys that a resumed run may change (see `resumed_config`), such as {"train.steps": 400},
              which makes a finished run longer

    Raises UserError for whatever in config, files or machine the user can mend, while another process trains in the
    folder, and when the gradient has not been finite three steps in a row.
    """
    ranks = ranks or join_ranks()
    with RunFolder.open(out, config, resume, ranks, changes) as folder:
        if resume and ranks.broadcast(folder.concluded) and (policy := _tuned(folder)):
            return _concluded(folder, policy, display if ranks.leader else None)
        return _train(folder, display, ranks)


def _train(folder: RunFolder, display: Display | None, ranks: Ranks) -> Run:
    """The rest of a run, from where its folder is."""
    config, settings = folder.config, folder.config.train
    with (
        stop_signals() as stop,
        open_run(folder, ranks, display) as (trainer, worker, recorder),
        gc_at_steps() as collect,
    ):
        trace, scheduler = worker.trace, RolloutScheduler(worker, recorder.stage)
        if trainer.step == 0:
            summary = evaluate_held_out(worker, recorder, "before")
            recorder.line({"step": 0, "eval": summary, "time": {"evaluate": trace.pop_excluded_s()}}, 0)
        while trainer.step < settings.steps and not should_stop(stop, ranks):
            result = run_step(trainer, worker, scheduler)
            step, reward, line = trainer.step, None, result.line
            if step == settings.steps or (settings.eval_every and step % settings.eval_every == 0):
                scheduler.sync_weights(trainer.policy, step)
                line["eval"] = evaluate_held_out(worker, recorder, "after" if step == settings.steps else "")
                line["time"]["evaluate"] = trace.pop_excluded_s()
                reward = line["eval"]["reward"]["mean"]
            recorder.line(line, scheduler.pop_dropped())
            if result.batch.version == step - 1 and unhealthy(result.change, config, trainer.dtype):
                scheduler.sync_weights(trainer.policy, step)
                warning = health_warning(worker.engine, trainer.policy, config, result.change, trainer.dtype)
                recorder.note(f"step {step}: {warning}")
            if recorder.better(reward) or (settings.save_every and step % settings.save_every == 0):
                recorder.save(trainer.snapshot(reward))
            if trainer.skipped >= MAX_SKIPPED:
                give_up(recorder, trainer, result)
            collect(step)
        if trainer.step > recorder.saved:
            recorder.save(trainer.snapshot())
        recorder.finish()
        return finish(folder, recorder, trainer, stop)


def _tuned(folder: RunFolder) -> Policy | None:
    """The policy of the newest checkpoint; None where it is damaged."""
    try:
        return load_policy(folder.checkpoints.all()[-1], device=resolved_device(folder.config.policy))
    except UserError:
        return None


def _concluded(folder: RunFolder, policy: Policy, display: Display | None) -> Run:
    """A run that has nothing left to do."""
    steps = folder.config.train.steps
    if display:
        display.message(
            f"{folder.path} has done all its {steps} steps; make it longer with --resume --set train.steps={2 * steps}"
        )
    evaluations = {line["step"]: line["eval"] for line in folder.metrics.lines() if "eval" in line}
    return Run(policy, folder.path, steps, evaluations.get(0), evaluations[steps], 0)


@contextmanager
def open_run(
    folder: RunFolder, ranks: Ranks, display: Display | None = None
) -> Iterator[tuple[Trainer, RolloutWorker, Recorder]]:
    """Who does the work of a run, ready for its next step; the engine has been checked to hold the policy's weights."""
    config = folder.config
    bind_cores(ranks)
    computing = cpu_cores() if resolved_device(config.policy).type == "cpu" else 1  # on a GPU this thread launches only
    torch.set_num_threads(config.train.threads or computing)
    trainer = Trainer(config, folder.checkpoints, ranks)
    (sampler, version), statistics = trainer.sampler_weights(), statistics_path(config)
    with (
        RolloutWorker(config, sampler, statistics, trainer.dtype, version, folder.path / "failed", ranks) as worker,
        Recorder(folder, ranks, worker.trace, worker.writing, worker.pool, display) as recorder,
    ):
        recorder.start(trainer.step, provenance(config, trainer.reference, statistics, worker.renders_with))
        check_engine(worker.engine, sampler, config, version, trainer.dtype)
        trainer.control = diversity_control(config, worker, folder.path, trainer.step, trainer.saved_control)
        yield trainer, worker, recorder


@dataclass(frozen=True)
class StepResult:
    """A step that has been taken.

    advantage : float32 [N], of the completions of all ranks
    line      : of metrics, without what is still to come: held-out evaluation and health
    """

    scored: ScoredRollout
    batch: Batch
    advantage: torch.Tensor
    change: Update
    line: dict[str, Any]


def run_step(trainer: Trainer, worker: RolloutWorker, scheduler: RolloutScheduler) -> StepResult:
    """Have the next batch performed, and learn from it."""
    config, trace, start = trainer.config, worker.trace, time.perf_counter()
    scored = scheduler.next(trainer.step, trainer.policy)
    control = trainer.control
    batch = Batch.gather(scored, config.train.prompts, trainer.ranks, with_rows=control is not None)
    about: dict[str, Any] = {}
    if control is None:
        advantage = advantages(batch, config)
    else:
        with trace("diversity"):
            advantage, about["diversity"] = control.advantages(batch)
    with trace("update"):
        change = trainer.train_step(scored, batch, advantage, trace)
    line = metrics(trainer.step, batch, advantage, change) | about
    line["time"] = timing(*trace.pop_times(), time.perf_counter() - start, scored, len(advantage))
    return StepResult(scored, batch, advantage, change, line)


def should_stop(stop: StopRequest, ranks: Ranks) -> bool:
    """Whether somebody has asked any rank to stop; all ranks get the same answer."""
    stop.signal_number = ranks.max(stop.signal_number)
    return bool(stop)


def advantages(batch: Batch, config: Config) -> torch.Tensor:
    """Advantage of each completion of all ranks, float32 [N], from the training signal its scores combine to."""
    signal_ = combine(batch.scores.terms, config.reward.terms, batch.group, config.reward.normalize)
    return group_advantages(torch.from_numpy(signal_), torch.from_numpy(batch.group), config.train.advantage_scale)


def evaluate_held_out(worker: RolloutWorker, recorder: Recorder, label: str) -> dict[str, Any]:
    """Evaluate the engine's weights; with a label, keep under it the numbers of all clips, and clips to listen to."""
    with worker.trace.excluding("evaluate"):
        scored_rollouts, clips, summary = evaluate(worker, recorder.stage)
        if label and worker.ranks.leader:
            try:
                clips.save(recorder.folder.held_out(label))
            except UserError as error:  # a full disk ends no run
                recorder.note(f"before_after.md will be without intervals: {error}")
            write_listening(worker, scored_rollouts, recorder.folder.listen, label)
    return summary


def give_up(recorder: Recorder, trainer: Trainer, result: StepResult) -> None:
    """Save the policy, which is still finite, and the batch that is not; raises UserError saying so."""
    recorder.save(trainer.snapshot())
    recorder.finish()
    rollout, mine, rank = result.scored.rollout, result.batch.mine, trainer.ranks.rank
    path = recorder.folder.path / "failed" / f"step-{trainer.step:06d}-rank-{rank}.npz"
    with os_errors_as_user_errors(path):
        path.parent.mkdir(exist_ok=True)
        terms = {f"term_{name}": values for name, values in result.scored.scores.terms.items()}
        advantage = result.advantage[mine.start : mine.stop].numpy()
        arrays: dict[str, Any] = {**vars(rollout), **terms, "advantage": advantage}
        np.savez(path, **arrays)
    raise UserError(
        f"the gradient was not finite {MAX_SKIPPED} steps in a row, so nothing has been learnt since step "
        f"{trainer.step - MAX_SKIPPED}; the last batch is in {path}; look into it, or start again with a lower "
        "train.learning_rate"
    )


def finish(folder: RunFolder, recorder: Recorder, trainer: Trainer, stop: StopRequest) -> Run:
    """Draw the curves, write the table where there is an after, and say how it ended."""
    step, steps = trainer.step, folder.config.train.steps
    trainer.ranks.broadcast(step)  # rank 0 has written all lines
    evaluations = {line["step"]: line["eval"] for line in folder.metrics.lines() if "eval" in line}
    before, after = evaluations.get(0), evaluations.get(steps) if step >= steps else None
    if trainer.ranks.leader:
        plot_curves(folder.metrics.lines(), folder.path / "curves.png")
        if before and after:
            folder.write(TABLE_FILE, before_after(before, after, step, _clips(folder, recorder)))
    if stop and step < steps:
        name = signal.Signals(stop.signal_number).name
        recorder.show.message(f"{name}: saved at step {step}; go on with: fastsmart train --out {folder.path} --resume")
    exit_code = stop.exit_code if step < steps else 0
    return Run(trainer.policy.eval(), folder.path, step, before, after, exit_code)


def _clips(folder: RunFolder, recorder: Recorder) -> tuple[HeldOut, HeldOut] | None:
    """The numbers of all clips before and after; None where they are not there, or damaged, which is said."""
    try:
        old, new = (HeldOut.load(folder.held_out(label)) for label in ("before", "after"))
    except UserError as error:
        recorder.show.message(str(error))
        return None
    return (old, new) if old and new else None
