"""Tilted fine-tuning: likelihood of clips of the policy itself, weighted by their reward. No clip is sampled twice.

What choosing among outputs does at sampling time, done to the weights: expert iteration with soft weights, the baseline
that reinforcement learning has to beat. Shape letters: N clips of a round.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmart.music.likeness import split_rows
from fastsmart.policy.optimizer import forget_moments
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.tilt.weights import best_of_n, kl_nats_at_most, most_diverse_gain
from fastsmart.trainer.algorithm import StepResult
from fastsmart.trainer.batch import metrics
from fastsmart.trainer.micro_batch import MicroBatch, micro_batches
from fastsmart.trainer.rehearsal import rehearse
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.rounds import Round, Rounds
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, step_on_gradients

FEWEST_NOTES = 16  # of a clip that may weigh anything among the most diverse: silence is unlike everything


class Tilt:
    """An `Algorithm`: fine-tuning on weighted clips (see `fastsmart.tilt.settings.TiltSettings`).

    folder : of the run, where its rounds lie
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.settings = trainer, trainer.config.tilt
        self.rounds = Rounds(trainer, folder, "tilt")
        self._held: tuple[Round, np.ndarray] | None = None
        self._last = np.zeros(0, np.int64)

    def step(self, progress: Progress | None = None) -> StepResult:
        trainer, (number, step) = self.trainer, self.rounds.place
        sampled: ScoredRollout | None = None
        if self._held is None or self._held[0].number != number:
            found, sampled = self.rounds.current(progress)
            with trainer.worker.trace("weights"):
                self._held = found, self._weights(found)
        found, weights = self._held
        if step == 0:
            forget_moments(trainer.optimizer)  # of the round before
        self._last = self._drawn(weights, number, step)
        with trainer.worker.trace("update"):
            change = self._learn(found)
        line = metrics(trainer.steps_done + 1, found.batch, torch.from_numpy(weights), change)
        line["round"] = {"number": number, "distance": found.stats["distance"], **self._about(found, weights)}
        return StepResult(change, line, sampled, len(weights) if sampled else 0)

    @property
    def state(self) -> dict[str, Any]:
        return {}

    @property
    def ends_round(self) -> bool:
        return self.rounds.ends

    def evidence(self) -> dict[str, np.ndarray]:
        assert self._held is not None
        return {**vars(self._held[0].rollout.select(self._last)), "weights": self._held[1][self._last]}

    def _weights(self, found: Round) -> np.ndarray:
        """Weights of the clips, float64 [N], summing to 1; all 0 where none has a reward."""
        batch, settings = found.batch, self.settings
        if settings.weights == "best-of-n":
            return best_of_n(batch.scores.total, batch.group, settings.best_of)
        assert batch.rows is not None
        reward = np.where(batch.notes >= FEWEST_NOTES, batch.scores.total, np.nan)
        return most_diverse_gain(reward, split_rows(batch.rows), settings.gain, float(settings.best_of))

    def _about(self, found: Round, weights: np.ndarray) -> dict[str, float]:
        """What the lines of metrics say of the weights: the mean reward they stand for, and how many clips."""
        weighed = weights > 0
        about = {
            "weighted_reward": float(weights[weighed] @ found.batch.scores.total[weighed]),
            "effective_clips": float(1 / (weights**2).sum()) if weighed.any() else 0.0,
        }
        if self.settings.weights == "best-of-n":
            about["kl_nats_at_most"] = kl_nats_at_most(self.settings.best_of)
        return about

    def _drawn(self, weights: np.ndarray, number: int, step: int) -> np.ndarray:
        """Numbers of the clips of a step, drawn by their weights; a function of seed, round and step besides."""
        if not weights.any():
            return np.zeros(0, np.int64)
        key = (RandomStream.ROUND, number, step)
        random = np.random.default_rng(np.random.SeedSequence(self.trainer.settings.seed, spawn_key=key))
        return random.choice(len(weights), self.settings.clips, p=weights)

    def _learn(self, found: Round) -> Update:
        """Take a step on the mean -log p of this step's clips, of which each rank computes its share."""
        trainer, config, drawn = self.trainer, self.trainer.config, found.rollout.select(self._last)
        measured = {name: found.stats[name] for name in ("kl", "kl_per_completion", "token_mult_prob_error")}
        if not len(drawn):  # nothing could be scored
            return Update({"loss": float("nan"), "tokens": 0.0} | measured, 0.0, trainer.learning_rate)
        batches = self._batches(drawn)
        tokens = int(drawn.lengths.sum())
        trainer.policy.train()
        given = (config.sampling.temperature, trainer.dtype, config.grpo.kernel)
        likelihood = rehearse(trainer.policy, batches, tokens, 1.0, *given)
        (total,), change = step_on_gradients(
            trainer.policy,
            trainer.optimizer,
            likelihood[None],
            learning_rate=trainer.learning_rate,
            max_grad_norm=config.train.max_grad_norm,
            ranks=trainer.ranks,
            trace=trainer.worker.trace,
        )
        return replace(change, stats={"loss": -total / tokens, "tokens": float(tokens)} | measured)

    def _batches(self, drawn: Rollout) -> list[MicroBatch]:
        """This rank's share of the clips of a step."""
        share = self.trainer.ranks.share(len(drawn))
        if not share:
            return []
        return list(micro_batches(drawn.select(share), self.trainer.settings.micro_batch, self.trainer.device))
