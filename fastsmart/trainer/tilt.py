"""Tilted fine-tuning: likelihood of clips of the policy itself, weighted by their reward. No clip is sampled twice.

What choosing among outputs does at sampling time, done to the weights: expert iteration with soft weights, the baseline
that reinforcement learning has to beat. Shape letters: N clips of a round.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastsmart.music.likeness import split_rows
from fastsmart.sampling import RandomStream
from fastsmart.tilt.weights import best_of_n, kl_nats_at_most, most_diverse_gain
from fastsmart.trainer.rehearsal import rehearse
from fastsmart.trainer.rounds import Round, RoundAlgorithm
from fastsmart.trainer.update import Update

FEWEST_NOTES = 16  # of a clip that may weigh anything among the most diverse: silence is unlike everything


class Tilt(RoundAlgorithm[np.ndarray]):
    """Fine-tuning on weighted clips (see `fastsmart.tilt.settings.TiltSettings`)."""

    section, making = "tilt", "weights"

    def made_of(self, found: Round) -> np.ndarray:
        """Weights of the clips, float64 [N], summing to 1; all 0 where none has a reward."""
        batch, settings = found.batch, self.settings
        if settings.weights == "best-of-n":
            return best_of_n(batch.scores.total, batch.group, settings.best_of)
        assert batch.rows is not None
        rows, able = split_rows(batch.rows), batch.notes >= FEWEST_NOTES
        return most_diverse_gain(batch.scores.total, rows, settings.gain, float(settings.best_of), able)

    def chosen(self, made: np.ndarray, number: int, step: int) -> np.ndarray:
        """Numbers of clips, drawn by their weights."""
        if not made.any():
            return np.zeros(0, np.int64)
        key = (RandomStream.ROUND, number, step)
        random = np.random.default_rng(np.random.SeedSequence(self.trainer.settings.seed, spawn_key=key))
        return random.choice(len(made), self.settings.clips, p=made)

    def learn(self, found: Round, made: np.ndarray, chosen: np.ndarray) -> Update:
        """Take a step on the mean -log p of this step's clips."""
        trainer, drawn = self.trainer, found.rollout.select(chosen)
        if not len(drawn):  # nothing could be scored
            return Update({"loss": float("nan"), "tokens": 0.0}, 0.0, trainer.learning_rate)
        tokens = int(drawn.lengths.sum())
        (total,), change = self.step_on(
            trainer.share_in_micro_batches(drawn),
            lambda batch: rehearse(trainer.policy, [batch], tokens, 1.0, *trainer.forward_options)[None],
            sums=1,
        )
        return replace(change, stats={"loss": -total / tokens, "tokens": float(tokens)})

    def about(self, found: Round, made: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """The weights, the mean reward they stand for, and how many clips."""
        weighed = made > 0
        about = {
            "weighted_reward": float(made[weighed] @ found.batch.scores.total[weighed]),
            "effective_clips": float(1 / (made**2).sum()) if weighed.any() else 0.0,
        }
        if self.settings.weights == "best-of-n":
            about["kl_nats_at_most"] = kl_nats_at_most(self.settings.best_of)
        return made, about

    def evidence_of(self, found: Round, made: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
        return {**vars(found.rollout.select(chosen)), "weights": made[chosen]}
