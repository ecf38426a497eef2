"""One line of metrics.jsonl: what a step's batch was like, what its update did, how long it took."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastsmart.train.stations import Performance
from fastsmart.train.update import Update


def metrics(step: int, performance: Performance, advantage: torch.Tensor, change: Update) -> dict[str, Any]:
    """What a step's line of metrics says about its batch and its update."""
    rollout, scores, counts = performance.rollout, performance.scores, performance.notes.counts
    return {
        "step": step,
        "reward": _mean(scores.total),
        "terms": {name: _mean(values) for name, values in scores.terms.items()},
        "notes": float(counts.mean()),
        "empty": int((counts == 0).sum()),
        "unscored": int(np.isnan(scores.total).sum()),
        "idle_completions": int((advantage == 0).sum()),
        "completion_tokens": float(rollout.lengths.mean()),
        "grad_norm": change.grad_norm,
        "learning_rate": change.learning_rate,
        **change.stats,
    }


def timing(seconds: dict[str, float], total: float, performance: Performance) -> dict[str, float]:
    """Seconds of the step and of each stage, and the rates people ask for."""
    tokens = int(performance.rollout.lengths.sum())
    return {
        "step": total,
        **seconds,
        "tokens_per_s": tokens / max(seconds.get("sample", 0.0), 1e-9),
        "clips_per_s": len(performance.rollout) / max(total, 1e-9),
    }


def _mean(values: np.ndarray) -> float:
    """Mean of what could be scored; NaN where nothing could."""
    return (
        float(np.mean(values, where=np.isfinite(values), dtype=np.float64))
        if np.isfinite(values).any()
        else float("nan")
    )
