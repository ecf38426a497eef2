"""One line of metrics.jsonl: what a step's batch was like, what its update did, how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsmart.machine.distributed import Ranks
from fastsmart.music.histograms import histograms
from fastsmart.notes import NoteBatch
from fastsmart.reward import Scores
from fastsmart.reward.constraints import Constraint, share_met
from fastsmart.trainer.rollout_pipeline import ScoredRollout
from fastsmart.trainer.update import Update


@dataclass(frozen=True)
class Batch:
    """Table of a step's N completions that every rank has.

    scores  : float32 [N] each
    notes   : int64 [N], notes of each clip
    lengths : int64 [N], tokens of each completion
    group   : int64 [N], number of its prompt
    mine    : the numbers of this rank's own completions
    version : of the policy that drew them
    rows    : the clips' histograms side by side, float32 [N, B of all]; None where nothing needs them
    """

    scores: Scores
    notes: np.ndarray
    lengths: np.ndarray
    group: np.ndarray
    mine: range
    version: int
    rows: np.ndarray | None = None

    @staticmethod
    def gather(scored: ScoredRollout, prompts: int, ranks: Ranks, with_rows: bool = False) -> Batch:
        """Put the ranks' completions of `prompts` prompts side by side, on request with the clips' histograms."""
        scores, rollout = scored.scores, scored.rollout
        columns = [*scores.terms.values(), scores.total, scored.notes.counts, rollout.lengths]
        size = len(rollout) // len(ranks.share(prompts))  # completions a prompt
        per_prompt = np.stack(columns, axis=1).astype(np.float64).reshape(len(rollout) // size, -1)
        table = ranks.gather(per_prompt, prompts).reshape(prompts * size, -1)
        *terms, total, notes, lengths = table.T
        share = ranks.share(prompts)
        return Batch(
            Scores({name: values.astype(np.float32) for name, values in zip(scores.terms, terms, strict=True)},
                   total.astype(np.float32)),
            notes.astype(np.int64),
            lengths.astype(np.int64),
            np.repeat(np.arange(prompts), size),
            range(share.start * size, share.stop * size),
            rollout.version,
            _gathered_rows(scored.notes, prompts, size, ranks) if with_rows else None,
        )  # fmt: skip


def histogram_rows(notes: NoteBatch) -> np.ndarray:
    """The histograms of each clip side by side (see `fastsmart.music.histograms`), float32 [N, B of all]."""
    return np.concatenate(list(histograms(notes).values()), axis=1).astype(np.float32)


def _gathered_rows(notes: NoteBatch, prompts: int, size: int, ranks: Ranks) -> np.ndarray:
    """`histogram_rows` of all ranks' clips, `size` a prompt."""
    rows = histogram_rows(notes)
    table = ranks.gather(rows.reshape(len(rows) // size, -1).astype(np.float64), prompts)
    return table.reshape(prompts * size, -1).astype(np.float32)


def metrics(step: int, batch: Batch, advantage: torch.Tensor, change: Update) -> dict[str, Any]:
    """Line of metrics of a step, about its batch and its update; `step` counts from 1."""
    scores = batch.scores
    met = scores.terms.get(Constraint.name)
    return {
        "step": step,
        "reward": _mean(scores.total),
        "terms": {name: _mean(values) for name, values in scores.terms.items()},
        **({} if met is None else {"constraints_met": share_met(met)}),
        "notes": float(batch.notes.mean()),
        "empty": int((batch.notes == 0).sum()),
        "unscored": int(np.isnan(scores.total).sum()),
        "idle_completions": int((advantage == 0).sum()),
        "completion_tokens": float(batch.lengths.mean()),
        "staleness": step - 1 - batch.version,
        "skipped": change.skipped,
        "grad_norm": change.grad_norm,
        "learning_rate": change.learning_rate,
        **change.stats,
    }


def timing(
    seconds: dict[str, float], idle: dict[str, float], total: float, scored: ScoredRollout | None, clips: int
) -> dict[str, Any]:
    """Seconds of the step and of each stage on this rank, idle shares of its resources, and the rates people ask for.

    Stages that run side by side add up to more than the step. `tokens_per_s` is the rate of this rank's sampler,
    `clips_per_s` that of all ranks' steps with their `clips`. `gpu_mixed` of this rank's clips were mixed on its GPU.
    A step that has sampled nothing (`scored` None) has the rates 0.
    """
    return {
        "step": total,
        **seconds,
        "tokens_per_s": int(scored.rollout.lengths.sum()) / max(scored.sample_s, 1e-9) if scored else 0.0,
        "clips_per_s": clips / max(total, 1e-9),
        "gpu_mixed": scored.gpu_mixed if scored else 0,
        "idle": idle,
    }


def _mean(values: np.ndarray) -> float:
    """Mean of what could be scored; NaN where nothing could."""
    return (
        float(np.mean(values, where=np.isfinite(values), dtype=np.float64))
        if np.isfinite(values).any()
        else float("nan")
    )
