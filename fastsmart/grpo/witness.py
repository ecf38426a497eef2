"""Witness advantages: how much each clip helps a batch to be spread as a target is.

The squared maximum mean discrepancy between a policy pi and a target distribution q over clips, for a kernel k, falls
fastest along (Arabi et al. 2026, arXiv 2609.34929)

    w(x) = E_{y ~ q} k(x, y) - E_{y ~ pi} k(x, y)

(half its gradient with respect to the probability of x): positive for a clip that the target has more of than the
policy, negative for one the policy produces too often. The second mean is taken over clips of other groups, never the
clip itself: its own similarity of 1 would pull every estimate towards concentration.

The kernel is histogram intersection (`fastsmart.music.likeness`). Shape letters: N clips, M clips of a pool, J clips of
the target.
"""

from __future__ import annotations

import numpy as np


def witness(
    similar_to_target: np.ndarray,
    target: np.ndarray,
    similar_to_pool: np.ndarray,
    counted: np.ndarray,
) -> np.ndarray:
    """w of N clips, float64 [N].

    similar_to_target : k(clip, target clip) [N, J]
    target            : weights of the target's clips [J], summing to 1
    similar_to_pool   : k(clip, clip of the pool) [N, M]
    counted           : bool [N, M], which clips of the pool stand for the policy beside this clip: never itself
    """
    pool = np.where(counted, similar_to_pool, 0.0).sum(1) / np.maximum(counted.sum(1), 1)
    return similar_to_target.astype(np.float64) @ target - pool


def gated(value: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The witness where it may act [N]: what is over-produced is always charged, what is missing pays only if `good`.

    Without the gate a batch that has narrowed pays for noise, which is unlike everything that is over-produced.
    """
    return np.where((value < 0.0) | good, value, 0.0)
