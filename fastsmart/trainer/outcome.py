"""Outcomes of a run: finished, asked to stop, or given up."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import os_errors_as_user_errors
from fastsmart.machine.signals import StopRequest
from fastsmart.policy.device import resolved_device
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.transformer import Policy
from fastsmart.run.curves import plot_curves
from fastsmart.run.display import Display
from fastsmart.run.folder import TABLE_FILE, RunFolder
from fastsmart.run.listening_page import write_page
from fastsmart.run.recorder import Recorder
from fastsmart.trainer.evaluate import HeldOut, before_after, outcome, rests_on
from fastsmart.trainer.trainer import Trainer
from fastsmart.words import counted

MAX_SKIPPED = 3  # steps in a row whose gradient is not finite before a run gives up


@dataclass(frozen=True)
class Run:
    """Outcome of a run.

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


def tuned_policy(folder: RunFolder) -> Policy | None:
    """The policy of the newest checkpoint; None where it is damaged."""
    try:
        return load_policy(folder.checkpoints.all()[-1], device=resolved_device(folder.config.policy))
    except UserError:
        return None


def finished_run(folder: RunFolder, policy: Policy, display: Display | None) -> Run:
    """The outcome of a run that has nothing left to do."""
    steps = folder.config.train.steps
    if display:
        display.message(
            f"{folder.path} has done all its {steps} steps; make it longer with --resume --set train.steps={2 * steps}"
        )
    evaluations = {line["step"]: line["eval"] for line in folder.metrics.lines() if "eval" in line}
    return Run(policy, folder.path, steps, evaluations.get(0), evaluations[steps], 0)


def give_up(recorder: Recorder, trainer: Trainer) -> None:
    """Save the policy, which is still finite, and the batch that is not; raises UserError saying so."""
    recorder.save(trainer.snapshot())
    recorder.finish()
    path = recorder.folder.path / "failed" / f"step-{trainer.steps_done:06d}-rank-{trainer.ranks.rank}.npz"
    with os_errors_as_user_errors(path):
        path.parent.mkdir(exist_ok=True)
        arrays: dict[str, Any] = trainer.algorithm.evidence()
        np.savez(path, **arrays)
    raise UserError(
        f"the gradient was not finite {MAX_SKIPPED} steps in a row, so nothing has been learnt since step "
        f"{trainer.steps_done - MAX_SKIPPED}; the last batch is in {path}; look into it, or start again with a lower "
        "train.learning_rate"
    )


def finish(folder: RunFolder, recorder: Recorder, trainer: Trainer, stop: StopRequest) -> Run:
    """Draw the curves and, after the last step, write the table of before and after; a run asked to stop says so."""
    step, steps = trainer.steps_done, folder.config.train.steps
    trainer.ranks.broadcast(step)  # rank 0 has written all lines
    evaluations = {line["step"]: line["eval"] for line in folder.metrics.lines() if "eval" in line}
    before, after = evaluations.get(0), evaluations.get(steps) if step >= steps else None
    if trainer.ranks.leader:
        plot_curves(folder.metrics.lines(), folder.path / "curves.png")
        if before and after:
            clips = _clips(folder, recorder)
            folder.write(TABLE_FILE, before_after(before, after, step, clips))
            title = f"{folder.config.policy.source} before and after {counted(step, 'step')}"
            write_page(folder.listen, title, outcome(before, after, clips), rests_on(before))
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
