"""Outputs of a base policy made by hand, and batches of them, for what holds their diversity."""

from __future__ import annotations

import numpy as np

from fastsmart.music.histograms import BINS
from fastsmart.reward import Scores
from fastsmart.trainer.batch import Batch
from fastsmart.trainer.diversity_control import DIATONIC


def made_base(n: int = 200, seed: int = 0) -> dict[str, np.ndarray]:
    """Clips of two keys and many registers, with rewards that depend on neither."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, bins in BINS.items():
        counts = rng.poisson(0.3, (n, bins + 1)).astype(np.float64)
        if name == "pitch_class":
            counts[:, :12] += 5 * np.stack([np.roll(DIATONIC, 7 * (i % 2)) for i in range(n)])
        counts[:, -1] = 0
        counts[:, 0] += 1e-3
        rows.append(counts / counts.sum(1, keepdims=True))
    reward = rng.normal(5.5, 1.0, n).astype(np.float32)
    lengths = rng.integers(4, 9, n)
    ids = np.where(np.arange(12) < 4 + lengths[:, None], np.arange(1, 13) + 20 * np.arange(n)[:, None] % 300, 0)
    return {
        "reward": reward,
        "notes": np.full(n, 40.0, np.float32),
        "prompt_lengths": np.full(n, 4.0, np.float32),
        "lengths": lengths.astype(np.float32),
        "rows": np.concatenate(rows, 1).astype(np.float32),
        "ids": ids.astype(np.int32),
    }


def batch_of(base: dict[str, np.ndarray], chosen: np.ndarray, group: np.ndarray | None = None) -> Batch:
    reward = base["reward"][chosen]
    return Batch(
        scores=Scores({"r": reward}, reward),
        notes=base["notes"][chosen].astype(np.int64),
        lengths=np.full(len(chosen), 100),
        group=np.arange(len(chosen)) if group is None else group,
        mine=range(len(chosen)),
        version=0,
        rows=base["rows"][chosen],
    )
