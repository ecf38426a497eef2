"""Reward and divergence of each style in a step's batch, and a bound on the latter. Shape letter: N completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmart.config import Config
from fastsmart.grpo.control import Controller
from fastsmart.machine.distributed import Ranks
from fastsmart.tokens.prompts import asked_styles, make_prompts
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.batch import Batch, MicroBatch

# gains of a style's controller: with those of a witness, 8, 1 and 4, divergence soon outweighs the reward
PROPORTIONAL, INTEGRAL, MOST_WEIGHT = 2.0, 0.05, 2.0


class StyleControl:
    """Keeps every style near the base policy, each by a weight of its own.

    A completion's divergence from the reference, less its group's mean, is taken from its advantage, as where the
    divergence is part of the reward. Its weight, over `most` nats, is that of a controller for each style, which raises
    it while the style's completions are further than that from the reference in the mean.

    config : of the run, which asks for styles; `diversity.style_kl` is `most`, 0 = divergence is measured only
    state  : of the checkpoint that a run goes on from
    """

    def __init__(self, config: Config, vocab: Vocabulary, ranks: Ranks, state: dict[str, Any] | None = None) -> None:
        self.config, self.vocab, self.ranks, self.most = config, vocab, ranks, config.diversity.style_kl
        self.controllers = {style: Controller(**saved) for style, saved in (state or {}).items()}

    def less_divergence(self, advantage: Tensor, divergence: np.ndarray, batch: Batch, step: int) -> Tensor:
        """Advantages of this rank's completions, float32 [n], of whom `divergences` are given; step counts from 0."""
        if not self.most:
            return advantage
        asked = styles_of_step(self.config, self.vocab, step)
        weight = np.array([self._controller(asked[i]).weight / self.most for i in batch.mine])
        groups = divergence.reshape(-1, self.config.sampling.group)
        above = (groups - groups.mean(1, keepdims=True)).ravel()
        return advantage - torch.from_numpy(weight * above).to(advantage)

    def metrics(self, batch: Batch, divergence: np.ndarray, step: int) -> dict[str, dict[str, float]]:
        """`style_metrics` of a step, by which the weights are then set; step counts from 0."""
        table = style_metrics(batch, styles_of_step(self.config, self.vocab, step), divergence, self.ranks)
        for style, row in table.items() if self.most else ():
            controller = self._controller(style)
            row["kl_weight"] = controller.weight
            further = row["kl_per_completion"] / self.most
            self.controllers[style] = controller.step(-further, -1.0, PROPORTIONAL, INTEGRAL, MOST_WEIGHT)
        return table

    def _controller(self, style: str) -> Controller:
        return self.controllers.get(style, Controller(0.0))

    @property
    def state(self) -> dict[str, Any]:
        """State that a checkpoint keeps; empty where divergence is measured only."""
        return {style: asdict(controller) for style, controller in self.controllers.items()}


def styles_of_step(config: Config, vocab: Vocabulary, step: int) -> list[str]:
    """The style that each of the N completions of a step, of all ranks, was asked for; step counts from 0."""
    prompts = config.train.prompts
    asked = asked_styles(make_prompts(config.prompts, vocab, "train", step * prompts, prompts), vocab)
    return [style for style in asked for _ in range(config.sampling.group)]


def divergences(batches: Sequence[MicroBatch], ref_logprobs: Sequence[Tensor]) -> np.ndarray:
    """Log-ratio of sampler to reference of each of this rank's completions, nats, float64 [n].

    Its mean over completions estimates the divergence of the sampler from the reference (Schulman's k1).
    """
    found = np.zeros(sum(len(batch.lengths) for batch in batches))
    for batch, reference in zip(batches, ref_logprobs, strict=True):
        ratio = (batch.sampler_logprobs - reference).double()
        sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=ratio.device)
        found[batch.completions.numpy()] = sums.index_add_(0, batch.sequence, ratio).cpu().numpy()
    return found


def style_metrics(batch: Batch, styles: Sequence[str], mine: np.ndarray, ranks: Ranks) -> dict[str, dict[str, float]]:
    """By style the mean reward and the divergence from the reference a completion, for a line of metrics.

    styles : of each of the N completions
    mine   : `divergences` of this rank's
    """
    prompts = int(batch.group[-1]) + 1
    size = len(batch.group) // prompts
    kl, of = ranks.gather(mine.reshape(-1, size), prompts).ravel(), np.array(styles)
    table = style_rewards(batch, styles)
    for style, row in table.items():
        row["kl_per_completion"] = float(kl[of == style].mean())
    return table


def style_rewards(batch: Batch, styles: Sequence[str]) -> dict[str, dict[str, float]]:
    """By style the mean reward of those of the N completions that could be scored, for a line of metrics."""
    of, reward = np.array(styles), batch.scores.total.astype(np.float64)
    table = {}
    for style in sorted(set(styles)):
        known = reward[(of == style) & np.isfinite(reward)]
        table[style] = {"reward": float(known.mean()) if len(known) else float("nan")}
    return table
