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

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmart.kernels.logprob import logprob
from fastsmart.policy.optimizer import forget_moments
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.trainer.algorithm import StepResult
from fastsmart.trainer.batch import metrics
from fastsmart.trainer.credit_targets import CreditTargets, places
from fastsmart.trainer.micro_batch import MicroBatch, micro_batches, uploaded
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.rounds import Arrays, Round, Rounds
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, completion_states, step_on_gradients

SUMS = ("loss", "log_ratio", "segments")  # over the clips of a step
_UNIT_KEY = "credit_unit"


class Credit:
    """An `Algorithm`: rounds of regression on the credit of notes (see `fastsmart.credit.settings.CreditSettings`).

    folder : of the run, where its rounds lie

    Raises UserError for a policy whose notes have no token that ends them.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.settings = trainer, trainer.config.credit
        self.rounds = Rounds(trainer, folder, "credit")
        self.unit: float | None = trainer.record.get(_UNIT_KEY)
        self._held: tuple[Round, Arrays] | None = None
        self._last = np.zeros(0, np.int64)
        self.targets = CreditTargets(trainer, self.rounds)

    def step(self, progress: Progress | None = None) -> StepResult:
        trainer, (number, step) = self.trainer, self.rounds.place
        sampled: ScoredRollout | None = None
        if self._held is None or self._held[0].number != number:
            found, sampled = self.rounds.current(progress)
            unit = self.unit = self.unit or _spread(found.batch.scores.total)
            with trainer.worker.trace("credit"):
                self._held = found, self.rounds.kept("credit", lambda: self.targets.of(found, unit))
        found, credit = self._held
        if step == 0:
            forget_moments(trainer.optimizer)  # of the round before
        self._last = self._taken(len(found.rollout), number, step)
        with trainer.worker.trace("update"):
            change = self._learn(found.rollout, credit)
        measured = {name: found.stats[name] for name in ("kl", "kl_per_completion", "token_mult_prob_error")}
        change = replace(change, stats=change.stats | measured)
        line = metrics(trainer.steps_done + 1, found.batch, torch.from_numpy(credit["advantage"].sum(1)), change)
        about = {name: float(credit[name]) for name in ("value_r2", "half_value_r2")}
        line["round"] = {"number": number, "distance": found.stats["distance"], **about}
        return StepResult(change, line, sampled, len(found.rollout) if sampled else 0)

    @property
    def state(self) -> dict[str, Any]:
        return {} if self.unit is None else {_UNIT_KEY: self.unit}

    @property
    def ends_round(self) -> bool:
        return self.rounds.ends

    def evidence(self) -> dict[str, np.ndarray]:
        assert self._held is not None
        found, credit = self._held
        return {**vars(found.rollout.select(self._last)), "advantage": credit["advantage"][self._last]}

    def _taken(self, count: int, number: int, step: int) -> np.ndarray:
        """Numbers of the clips of a step; a function of seed, round and step, which takes all before any again."""
        size = min(self.settings.clips, count)
        first, taken = divmod(step * size, count)
        order = [self._order(count, number, first + turn) for turn in range(2)]
        return np.concatenate(order)[taken : taken + size]

    def _order(self, count: int, number: int, turn: int) -> np.ndarray:
        key = (RandomStream.ROUND, number, turn)
        random = np.random.default_rng(np.random.SeedSequence(self.trainer.settings.seed, spawn_key=key))
        return random.permutation(count)

    def _learn(self, rollout: Rollout, credit: Arrays) -> Update:
        """Take a step on the mean squared error over this step's clips, of which each rank computes its share."""
        trainer, config, count = self.trainer, self.trainer.config, len(self._last)
        if not any(
            credit[name].any() for name in ("target", "other_target") if name in credit
        ):  # no note was worth more than another; what is left would be rounding
            return Update(dict.fromkeys(SUMS, float("nan")) | {"tokens": 0}, 0.0, trainer.learning_rate)
        share = trainer.ranks.share(count)
        mine = self._last[share.start : share.stop]
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=trainer.device)
        trainer.policy.train()
        for batch in micro_batches(rollout.select(mine), config.train.micro_batch, trainer.device) if len(mine) else ():
            sums += self._add_gradient(batch, mine, credit, count)
        total, change = step_on_gradients(
            trainer.policy,
            trainer.optimizer,
            sums,
            learning_rate=trainer.learning_rate,
            max_grad_norm=config.train.max_grad_norm,
            ranks=trainer.ranks,
            trace=trainer.worker.trace,
        )
        means = {name: value / count for name, value in zip(SUMS, total, strict=False)}
        return replace(change, stats=means | {"tokens": int(total[-1])})

    def _add_gradient(self, batch: MicroBatch, mine: np.ndarray, credit: Arrays, count: int) -> Tensor:
        """Add a micro-batch's share of the gradient; gives `SUMS` and its tokens, float64."""
        trainer, config = self.trainer, self.trainer.config
        temperature, kernel = config.sampling.temperature, config.grpo.kernel
        row, step = places(batch)
        clip = mine[row]
        ends = credit["ends"][clip, step]
        segment = np.concatenate([[0], np.cumsum(ends)[:-1]])
        target, before, of_segment = (
            uploaded(part, trainer.device)
            for part in (credit["target"][clip, step][ends], credit["logprob"][clip, step], segment)
        )
        states = completion_states(trainer.policy, batch, temperature, trainer.dtype, kernel)
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


def _spread(reward: np.ndarray) -> float:
    """Standard deviation of what could be scored; 1 where that is nothing, or all alike."""
    known = reward[np.isfinite(reward)].astype(np.float64)
    return float(known.std()) or 1.0 if len(known) else 1.0
