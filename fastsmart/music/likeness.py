"""How alike clips are: the intersection of their histograms, 1 for equal ones, 0 for disjoint ones.

The intersection k(x, y) = sum over bins of the smaller share is positive semidefinite (Barla et al. 2003). Shape
letters: N and M clips, B bins.
"""

from __future__ import annotations

import numba
import numpy as np

from fastsmart.music.histograms import BINS


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _intersections(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(a)):
        for j in range(len(b)):
            total = np.float32(0.0)
            for k in range(a.shape[1]):
                total += min(a[i, k], b[j, k])
            out[i, j] = total


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Histogram intersection of every row of a [N, B] with every row of b [M, B], float32 [N, M]."""
    out = np.empty((len(a), len(b)), np.float32)
    _intersections(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32), out)
    return out


def split_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Histograms that stand side by side in rows [N, B of all], by name again, float32 [N, B + 1] each."""
    edges = np.cumsum([bins + 1 for bins in BINS.values()])[:-1]
    return dict(zip(BINS, np.split(rows, edges, axis=1), strict=True))


def likeness(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> np.ndarray:
    """Mean intersection over the histograms of every two clips, float64 [N, M]."""
    return np.asarray(np.mean([intersection(a[name], b[name]) for name in BINS], axis=0, dtype=np.float64))
