"""Weights of clips by their reward, towards which tilted fine-tuning moves a policy. Shape letters: N clips.

Choosing the best of n outputs is the optimum of reward under a limit on the KL divergence, up to little (Yang et al.
2024, arXiv 2404.01730; Gui et al. 2024, arXiv 2406.00832). Likelihood of outputs weighted so teaches it to the policy
(Sessa et al. 2024, arXiv 2407.14622).
"""

from __future__ import annotations

import math

import numpy as np

from fastsmart.music.likeness import likeness
from fastsmart.music.reweighting import most_diverse


def best_of_n(reward: np.ndarray, pool: np.ndarray, n: int) -> np.ndarray:
    """Share of each clip among the best of n draws with replacement from its pool, float64 [N], summing to 1.

    reward : [N]; NaN = could not be scored, which weighs 0
    pool   : whole numbers [N], such as the clips' prompts; all pools with a reward weigh the same

    Clips of equal reward share what falls to them, so that of equal rewards alone all weigh the same.
    """
    weights = np.zeros(len(reward))
    for name in np.unique(pool):
        members = np.flatnonzero((pool == name) & np.isfinite(reward))
        values, which, counts = np.unique(reward[members], return_inverse=True, return_counts=True)
        below = np.concatenate([[0.0], np.cumsum(counts)]) / max(len(members), 1)
        if len(values):
            weights[members] = (np.diff(below**n) / counts)[which]
    total = weights.sum()
    return weights / total if total else weights


def most_diverse_gain(
    reward: np.ndarray, rows: dict[str, np.ndarray], gain: float, cap: float, able: np.ndarray | None = None
) -> np.ndarray:
    """The most diverse weights whose mean reward is `gain` standard deviations above that of the clips, float64 [N],
    summing to 1; where the cap does not allow as much, the most diverse of those of the most reward.

    reward : [N]; NaN weighs 0, and counts for no mean
    rows   : histograms of the clips by name, float32 [N, B + 1] each (see `fastsmart.music.histograms`)
    cap    : a clip weighs at most cap over the number of those that may weigh
    able   : [N], False = weighs 0, and counts for the mean all the same; None = all may weigh
    """
    scored, weights = np.isfinite(reward), np.zeros(len(reward))
    kept = np.flatnonzero(scored if able is None else scored & able)
    if not len(kept):
        return weights
    known = reward[scored].astype(np.float64)
    here = {name: values[kept] for name, values in rows.items()}
    wanted = float(known.mean() + gain * known.std())
    weights[kept] = most_diverse(likeness(here, here), reward[kept].astype(np.float64), wanted, cap)
    return weights / weights.sum()


def kl_nats_at_most(n: int) -> float:
    """What choosing the best of n spends at most of KL divergence from the policy it chooses from, nats a clip."""
    return math.log(n) - (n - 1) / n
