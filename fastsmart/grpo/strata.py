"""Advantages within strata of music: a reward that cannot move mass between keys and registers.

A group baseline compares whatever the group holds: a clip in G major that scores a little above one in F minor takes
mass from F minor, also where the reward hardly depends on the key, and sampling noise alone does the same (policy
gradients are indifferent to how mass is shared among equally good outputs). Stratified GRPO (Zhu et al. 2025, arXiv
2510.06214) compares like with like instead. Here the strata are the main effects of several labels (key, register,
dynamics): the reward is projected on their indicators, and what is left is the advantage. It sums to zero in every key,
in every register and in every dynamic, so whatever in the weights moves all clips of a class alike gets no gradient.

Shape letters: N clips, F columns of the design, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stratum_design(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Indicator columns of every value that each label takes, float64 [N, F]; labels are integers [N].

    The columns of one label sum to 1, so together they are linearly dependent; `stratified_advantages` minds that.
    """
    columns = [label[:, None] == np.unique(label)[None, :] for label in labels]
    return np.concatenate(columns, axis=1).astype(np.float64)


def stratified_advantages(reward: np.ndarray, labels: Sequence[np.ndarray], between: float, unit: float) -> np.ndarray:
    """Reward of each clip above that of its like, in units of `unit`; float64 [N].

    The part of the reward that the labels do not explain (least squares on their indicators), scaled by
    n / (n - rank) for the degrees of freedom the fit has used, plus `between` times the part they explain, centred:

        A = (r - fit) n / (n - rank) / unit + between (fit - mean r) / unit

    reward  : [N]; where it is not finite the clip could not be scored, is left out of the fit and gets 0
    labels  : integer [N] each; none means one stratum, a plain mean
    between : 0 takes all pressure off the shares of the strata, 1 leaves it as it is
    unit    : the reward's standard deviation over outputs of the base policy. Fixed: the spread of the batch shrinks as
              the policy narrows, and dividing by it speeds the narrowing up
    """
    advantage = np.zeros(len(reward))
    scored = np.isfinite(reward)
    count = int(scored.sum())
    if not count:
        return advantage
    value = reward[scored].astype(np.float64)
    design = stratum_design([label[scored] for label in labels]) if labels else np.ones((count, 1))
    solution, _, rank, _ = np.linalg.lstsq(design, value, rcond=None)
    fit = design @ solution
    within = (value - fit) * (count / (count - rank) if count > rank else 0.0)
    advantage[scored] = (within + between * (fit - value.mean())) / unit
    return advantage
