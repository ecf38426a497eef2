"""Credit for single notes: log-ratios are regressed on how much each note changes the reward that is to be expected.

A clip's reward does not say which of its notes earned it, so the gradient of whole clips is mostly noise, and its nats
of KL divergence buy little reward. Here the reward to be expected is regressed on features of what has been played so
far, over the clips of a round (`fastsmart.credit.value`); a note is worth the change it makes, and the policy's
log-ratio of the note is regressed on that worth: a step of soft policy iteration, as REBEL takes it for whole
completions (Gao et al. 2024, arXiv 2404.16767), with a temporal difference in place of the reward.

Shape letters: N clips of a round, L tokens of the longest completion, S segments (a note with what stands before it) of
a micro-batch, M completion tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmart.credit.settings import CreditSettings
from fastsmart.kernels.logprob import logprob
from fastsmart.sampling import RandomStream
from fastsmart.trainer.batch import MicroBatch, uploaded
from fastsmart.trainer.credit_targets import CreditTargets, places
from fastsmart.trainer.rounds import Arrays, Round, RoundAlgorithm
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, completion_states

SUMS = ("loss", "log_ratio", "segments")  # over the clips of a step
_UNIT_KEY, _MEAN_KEY = "credit_unit", "credit_mean"
NEAR_GOAL = 1.0  # standard deviations of the reward, the way before credit.goal on which a round does less


class Credit(RoundAlgorithm[Arrays]):
    """Rounds of regression on the credit of notes (see `fastsmart.credit.settings.CreditSettings`).

    base : mean and standard deviation of the first round's rewards; None before there is one

    Raises UserError for a policy whose notes have no token that ends them.
    """

    section, making = "credit", "credit"

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        super().__init__(trainer, folder)
        known = trainer.record.get(_UNIT_KEY)
        self.base: tuple[float, float] | None = None if known is None else (trainer.record.get(_MEAN_KEY, 0.0), known)
        self.targets = CreditTargets(trainer, self.rounds)
        self._course = Course(0.0, 0.0, 0.0)  # of the present round

    @property
    def state(self) -> dict[str, Any]:
        return {} if self.base is None else dict(zip((_MEAN_KEY, _UNIT_KEY), self.base, strict=True))

    def made_of(self, found: Round) -> Arrays:
        """The arrays of `CreditTargets.of`."""
        mean, spread = _moments(found.batch.scores.total)
        base, unit = self.base = self.base or (mean, spread)
        course = self._course = Course.of(self.settings, (mean - base) / unit)
        return self.rounds.kept("credit", lambda: self.targets.of(found, unit, course.strength, course.pull))

    def chosen(self, made: Arrays, number: int, step: int) -> np.ndarray:
        """Numbers of clips, which takes all before any again."""
        count = len(made["ends"])
        size = min(self.settings.clips, count)
        first, taken = divmod(step * size, count)
        order = [self._order(count, number, first + turn) for turn in range(2)]
        return np.concatenate(order)[taken : taken + size]

    def _order(self, count: int, number: int, turn: int) -> np.ndarray:
        key = (RandomStream.ROUND, number, turn)
        random = np.random.default_rng(np.random.SeedSequence(self.trainer.settings.seed, spawn_key=key))
        return random.permutation(count)

    def learn(self, found: Round, made: Arrays, chosen: np.ndarray) -> Update:
        """Take a step on the mean squared error over this step's clips."""
        trainer, count = self.trainer, len(chosen)
        if not any(
            made[name].any() for name in ("target", "other_target") if name in made
        ):  # no note was worth more than another; what is left would be rounding
            return Update(dict.fromkeys(SUMS, float("nan")) | {"tokens": 0}, 0.0, trainer.learning_rate)
        share = trainer.ranks.share(count)
        mine = chosen[share.start : share.stop]
        total, change = self.step_on(
            trainer.micro_batches(found.rollout.select(mine)),
            lambda batch: self._add_gradient(batch, mine, made, count),
            sums=len(SUMS) + 1,
            pace=self._course.pace,
        )
        means = {name: value / count for name, value in zip(SUMS, total, strict=False)}
        return replace(change, stats=means | {"tokens": int(total[-1])})

    def about(self, found: Round, made: Arrays) -> tuple[np.ndarray, dict[str, Any]]:
        about = {name: float(made[name]) for name in ("value_r2", "half_value_r2")}
        return made["advantage"].sum(1), about

    def evidence_of(self, found: Round, made: Arrays, chosen: np.ndarray) -> dict[str, np.ndarray]:
        return {**vars(found.rollout.select(chosen)), "advantage": made["advantage"][chosen]}

    def _add_gradient(self, batch: MicroBatch, mine: np.ndarray, credit: Arrays, count: int) -> Tensor:
        """Add a micro-batch's share of the gradient; gives `SUMS` and its tokens, float64."""
        trainer, (temperature, dtype, kernel) = self.trainer, self.trainer.forward_options
        row, step = places(batch)
        clip = mine[row]
        ends = credit["ends"][clip, step]
        segment = np.concatenate([[0], np.cumsum(ends)[:-1]])
        target, before, of_segment = (
            uploaded(part, trainer.device)
            for part in (credit["target"][clip, step][ends], credit["logprob"][clip, step], segment)
        )
        states = completion_states(trainer.policy, batch, temperature, dtype, kernel)
        weight = trainer.policy.lm_head.weight
        ratio = logprob(states, weight, batch.ids, temperature, kernel).logprob - before
        own, error = ratio, torch.zeros((), device=trainer.device)
        if "chosen" in credit:
            place = np.flatnonzero(credit["chosen"][clip, step])
            at, chosen = (clip[place], step[place]), uploaded(place, trainer.device)
            others, wanted, earlier = (
                uploaded(credit[name][at], trainer.device) for name in ("others", "other_target", "other_logprob")
            )
            repeated = states[chosen].repeat_interleave(others.shape[1], 0)
            found = logprob(repeated, weight, others.flatten().long(), temperature, kernel).logprob.view_as(others)
            ratios = torch.cat([ratio[chosen, None], found - earlier[:, 1:]], 1)
            error = (ratios - wanted).square().mean(1).sum()
            own = ratio.index_fill(0, chosen, 0.0)
        found = torch.zeros_like(target).index_add(0, of_segment, own)
        loss = 0.5 * ((found - target).square().sum() + error)
        (loss / count).backward()
        parts = (loss.detach().double(), ratio.detach().double().sum())
        numbers = torch.tensor([float(len(target)), float(len(row))], dtype=torch.float64, device=trainer.device)
        return torch.cat([torch.stack(parts), numbers])


@dataclass(frozen=True)
class Course:
    """How a round learns: `strength` and `pull` as of `CreditSettings`, and the share of the learning rate.

    The last bit goes slowly by both: rounds that came near their targets in few steps would go past the goal at any
    rate, and AdamW's steps are as large for small errors as for large ones.
    """

    strength: float
    pull: float
    pace: float

    @staticmethod
    def of(settings: CreditSettings, gain: float) -> Course:
        """That of a round whose mean reward is so many standard deviations of the first round's above its mean.

        Beyond the goal notes give back the share of their log-ratios to the base by which the gain is too much, as if
        the two were in proportion.
        """
        to_go = settings.goal - gain
        pace = min(abs(to_go) / NEAR_GOAL, 1.0)
        if to_go >= 0:
            return Course(settings.strength * pace, settings.pull, pace)
        return Course(0.0, max(settings.pull, min(-to_go / gain, 1.0)), pace)


def _moments(reward: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of what could be scored; the latter is 1 where that is nothing, or all alike."""
    known = reward[np.isfinite(reward)].astype(np.float64)
    return (float(known.mean()), float(known.std()) or 1.0) if len(known) else (0.0, 1.0)
