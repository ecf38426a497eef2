"""Group-relative advantages. Shape letters: N completions, K groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastsmart.errors import UserError

STD_FLOOR = 1e-4  # added to a standard deviation before it divides


@dataclass(frozen=True)
class GroupMoments:
    """Reward statistics of K groups over the completions that could be scored.

    index : int64 [N], the group of each completion as 0 … K − 1, in the order of the group labels
    count : float64 [K], completions that could be scored
    mean  : float64 [K], NaN where count is 0
    std   : float64 [K], with Bessel's correction as torch.std and TRL have it; 0 where count is 1, NaN where it is 0
    """

    index: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor


def group_moments(reward: Tensor, group: Tensor) -> GroupMoments:
    """Count, mean and standard deviation of the finite rewards of every group.

    reward [N] of any floating dtype (not finite = could not be scored), group [N] integer labels.
    """
    labels, index = torch.unique(group, return_inverse=True)
    reward = reward.double()
    scored = reward.isfinite()
    count = _scatter_sum(scored.double(), index, len(labels))
    mean = _scatter_sum(torch.where(scored, reward, 0.0), index, len(labels)) / count
    square = torch.where(scored, reward - mean[index], 0.0).square()
    variance = _scatter_sum(square, index, len(labels)) / (count - 1).clamp(min=1)
    std = torch.where(count > 0, variance.sqrt(), torch.nan)
    return GroupMoments(index, count, mean, std)


def group_advantages(
    reward: Tensor, group: Tensor, scale: Literal["none", "group", "batch"] = "group", eps: float = STD_FLOOR
) -> Tensor:
    """Advantage of each completion over the others of its group: (reward − group mean) / (std + eps).

    reward [N] (torch, any floating dtype), group [N] integer labels in any order. Returns float32 [N] on the device of
    reward. `scale` chooses the std: of the completion's group (DeepSeekMath, arXiv 2402.03300, section 4.1.2), of all
    rewards of the batch, or none at all (Dr. GRPO, arXiv 2503.20783). The std has Bessel's correction, as in TRL.

    A reward that is not finite could not be computed: it is left out of mean and std, and its advantage is 0. A group
    with one scorable completion has nothing to compare: 0. Groups must be whole; with scale="batch" over several ranks,
    pass the gathered rewards and take the rank's own slice.

    Raises UserError for an unknown scale, ValueError when the shapes differ.
    """
    if scale not in ("none", "group", "batch"):
        raise UserError(f'the advantage scale must be "none", "group" or "batch"; got "{scale}"')
    if reward.ndim != 1 or reward.shape != group.shape:
        raise ValueError(
            f"group_advantages needs reward [N] and group [N]; got {tuple(reward.shape)}, {tuple(group.shape)}"
        )
    moments = group_moments(reward, group)
    advantage = reward.double() - moments.mean[moments.index]
    if scale == "group":
        advantage = advantage / (moments.std[moments.index] + eps)
    elif scale == "batch":
        # the whole batch is one group
        advantage = advantage / (group_moments(reward, torch.zeros_like(group)).std + eps)
    return torch.where(reward.isfinite(), advantage, 0.0).float()


def normalised_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float], group: Tensor) -> Tensor:
    """Weighted sum of reward terms, each brought to one scale within its group; float32 [N], NaN where one is NaN.

    Every term is centred and divided by its standard deviation plus `STD_FLOOR` among the completions of its group
    that could be scored, so that a weight means the same for a term of any scale (the decoupled normalisation of GDPO,
    arXiv 2601.05242). A completion that is the only one scored in its group gets 0.

    terms   : float [N] by name; NaN = could not be scored
    weights : by name; terms of weight 0 are left out
    group   : int [N], equal for the completions of one group
    """
    total = torch.zeros(len(group), dtype=torch.float64)
    for name in [name for name in terms if weights[name]]:
        moments = group_moments(terms[name], group)
        centred = terms[name].double() - moments.mean[moments.index]
        total += weights[name] * (centred / (moments.std[moments.index] + STD_FLOOR))
    return total.float()


def _scatter_sum(values: Tensor, index: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=values.dtype, device=values.device).index_add(0, index, values)
