"""Reward and divergence of each style in a step's batch. Shape letter: N completions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsmart.config import Config
from fastsmart.machine.distributed import Ranks
from fastsmart.tokens.prompts import asked_styles, make_prompts
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.batch import Batch, MicroBatch


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
