"""Group-relative policy optimisation: each step samples a batch, scores it, and learns from its advantages."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmart.config import Config
from fastsmart.grpo.advantages import group_advantages, normalised_sum
from fastsmart.trainer.algorithm import StepResult
from fastsmart.trainer.batch import Batch
from fastsmart.trainer.diversity_control import DiversityControl, diversity_control
from fastsmart.trainer.rehearsal import rehearse
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.style_metrics import StyleControl, divergences
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, metrics, reference_logprobs, update

MISMATCH_STATS = ("token_mult_prob_error", "mismatch_k3", "logprob_gap_max")
_CONTROL_KEY, _STYLES_KEY = "diversity_control", "style_control"


class Grpo:
    """An `Algorithm`: the step of GRPO and of the losses beside it (see `fastsmart.grpo.settings.LossSettings`).

    folder : of the run, where the calibration of [diversity] lies

    scored    : this rank's completions of the last step
    advantage : theirs, float32 [n]
    divergence : theirs from the reference (see `divergences`), float64 [n]; only where styles are asked for
    control   : what keeps the outputs different from each other; None = nothing
    styles    : what measures styles and keeps each near the reference; None where none are asked for
    """

    ends_round = False
    scored: ScoredRollout
    advantage: torch.Tensor
    divergence: np.ndarray

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, record, asked = trainer, trainer.record, trainer.config.prompts.styles
        self.control = diversity_control(
            trainer.config, trainer.worker, folder, trainer.steps_done, record.get(_CONTROL_KEY)
        )
        given = trainer.config, trainer.policy.vocab, trainer.ranks
        self.styles = StyleControl(*given, record.get(_STYLES_KEY)) if asked else None

    def step(self, progress: Progress | None = None) -> StepResult:
        trainer = self.trainer
        self.scored = trainer.scheduler.next(trainer.steps_done, trainer.policy, progress)
        prompts, with_rows = trainer.settings.prompts, self.control is not None
        batch = Batch.gather(self.scored, prompts, trainer.ranks, with_rows=with_rows)
        advantage, about = self._advantages(batch)
        self.advantage = advantage[batch.mine.start : batch.mine.stop]
        with trainer.worker.trace("update"):
            change = self._learn(batch)
        line = metrics(trainer.steps_done + 1, batch, advantage, change) | about
        if self.styles:
            line["styles"] = self.styles.metrics(batch, self.divergence, trainer.steps_done)
        return StepResult(change, line, self.scored, len(advantage))

    @property
    def state(self) -> dict[str, Any]:
        parts = {_CONTROL_KEY: self.control, _STYLES_KEY: self.styles}
        return {key: part.state for key, part in parts.items() if part and part.state}

    def evidence(self) -> dict[str, np.ndarray]:
        terms = {f"term_{name}": values for name, values in self.scored.scores.terms.items()}
        return {**vars(self.scored.rollout), **terms, "advantage": self.advantage.numpy()}

    def _advantages(self, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """Advantage of each completion of all ranks, float32 [N], and what the line of metrics says about it."""
        if self.control is None:
            return advantages(batch, self.trainer.config), {}
        with self.trainer.worker.trace("diversity"):
            advantage, about = self.control.advantages(batch)
        return advantage, {"diversity": about}

    def _learn(self, batch: Batch) -> Update:
        """Take the optimizer steps of a batch, of whose completions `scored` and `advantage` are this rank's.

        The statistics are those of the last, but how far sampler and trainer are apart is measured at the first, before
        which the two hold the same policy.
        """
        trainer, settings = self.trainer, self.trainer.settings
        trainer.previous = copy.deepcopy(trainer.policy) if settings.pipeline == "one-step-off" else None
        batches = trainer.micro_batches(self.scored.rollout)
        ref_logprobs = reference_logprobs(trainer.reference, batches, *trainer.forward_options)
        if self.styles:
            self.divergence = divergences(batches, ref_logprobs)
            self.advantage = self.styles.less_divergence(self.advantage, self.divergence, batch, trainer.steps_done)
        mismatch: dict[str, float] = {}
        for _ in range(settings.iterations):
            if self.control and self.control.settings.rehearse:
                self._rehearse(self.control)
            change = update(
                trainer.policy,
                trainer.optimizer,
                batches,
                ref_logprobs,
                self.advantage,
                trainer.config.grpo,
                temperature=trainer.config.sampling.temperature,
                learning_rate=trainer.learning_rate,
                max_grad_norm=settings.max_grad_norm,
                dtype=trainer.dtype,
                lengths=torch.from_numpy(batch.lengths),
                ranks=trainer.ranks,
                trace=trainer.worker.trace,
            )
            mismatch = mismatch or {name: change.stats[name] for name in MISMATCH_STATS}
            if change.skipped:
                break
        return replace(change, stats=change.stats | mismatch)

    def _rehearse(self, control: DiversityControl) -> None:
        """Add the gradient of the clips that this step rehearses, this rank's share of them."""
        trainer, weight = self.trainer, control.settings.rehearse_weight
        drawn = control.rehearsal(trainer.settings.seed, trainer.steps_done)
        batches, tokens = trainer.share_in_micro_batches(drawn), int(drawn.lengths.sum())
        rehearse(trainer.policy, batches, tokens, weight, *trainer.forward_options)


def advantages(batch: Batch, config: Config) -> torch.Tensor:
    """Advantage of each completion of all ranks, float32 [N], from the sum of its scores as reward.normalize has it."""
    signal, group = torch.from_numpy(batch.scores.total), torch.from_numpy(batch.group)
    if config.reward.normalize == "group":
        terms = {name: torch.from_numpy(values) for name, values in batch.scores.terms.items()}
        signal = normalised_sum(terms, config.reward.terms, group)
    return group_advantages(signal, group, config.train.advantage_scale)
