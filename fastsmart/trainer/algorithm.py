"""The contract of a training algorithm: what the trainer asks of it, and nothing of how it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.update import Update


@dataclass(frozen=True)
class StepResult:
    """What an algorithm has done in a step.

    update  : of the policy
    line    : the step's line of metrics, without `time` and `health` (see `fastsmart.trainer.update.metrics`)
    sampled : this rank's completions that the step has drawn; None where it learnt from those of an earlier one
    clips   : completions that all ranks have drawn in it
    """

    update: Update
    line: dict[str, Any]
    sampled: ScoredRollout | None
    clips: int


class Algorithm(Protocol):
    """A way to learn from scored completions, one optimizer batch a step.

    It is made for a trainer whose engine holds the policy, and keeps what it needs between steps beside the trainer's
    own state (policy, optimizer, steps done). Whatever a step does follows from both and from the run's folder, so that
    a run goes on from any checkpoint to the same numbers.
    """

    def step(self, progress: Progress | None = None) -> StepResult:
        """Learn once; the trainer counts the step and tells its time."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint's record keeps of it: plain values by name."""

    @property
    def ends_round(self) -> bool:
        """Whether a checkpoint is due after the steps done so far, whatever train.save_every says."""

    def evidence(self) -> dict[str, np.ndarray]:
        """The last batch, kept for a person where its gradient was not finite."""


class Counter(Protocol):
    """Who counts the steps of a run, as the trainer does."""

    steps_done: int


class InTurn:
    """An `Algorithm` of two: the first takes the steps before `end`, the second those after."""

    def __init__(self, first: Algorithm, second: Algorithm, end: int, trainer: Counter) -> None:
        self.first, self.second, self.end, self.trainer = first, second, end, trainer

    def step(self, progress: Progress | None = None) -> StepResult:
        return (self.second if self.trainer.steps_done >= self.end else self.first).step(progress)

    @property
    def state(self) -> dict[str, Any]:
        return self.first.state | self.second.state

    @property
    def ends_round(self) -> bool:
        return self._last.ends_round or self.trainer.steps_done == self.end

    def evidence(self) -> dict[str, np.ndarray]:
        return self._last.evidence()

    @property
    def _last(self) -> Algorithm:
        """That of the last step."""
        return self.second if self.trainer.steps_done > self.end else self.first
