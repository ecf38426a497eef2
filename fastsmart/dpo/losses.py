"""The loss of direct preference optimisation over pairs of completions. Shape letters: B pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLoss(NamedTuple):
    """Loss of B pairs, float64 [B] each, and what it is made of.

    loss     : -log sigmoid(beta * margin)
    chosen   : log-prob of the chosen completion above that under the reference, nats
    rejected : the same of the rejected completion
    margin   : chosen - rejected - penalty * max(0, -chosen)
    """

    loss: Tensor
    chosen: Tensor
    rejected: Tensor
    margin: Tensor


def pair_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, penalty: float
) -> PairLoss:
    """DPO-Positive (Pal et al. 2024, arXiv 2402.13228, equation 3); without penalty it is DPO (Rafailov et al. 2023,
    arXiv 2305.18290, equation 7).

    Each argument [B] is the log-prob of a whole completion, summed over its tokens: of the chosen and the rejected one,
    under the policy and under the reference.

    DPO looks at the difference alone, which also grows while both log-probs fall. The penalty acts where the chosen
    completion has become less likely than under the reference.
    """
    gained, other = (chosen - ref_chosen).double(), (rejected - ref_rejected).double()
    margin = gained - other - penalty * F.relu(-gained)
    return PairLoss(-F.logsigmoid(beta * margin), gained.detach(), other.detach(), margin.detach())


def completion_sums(logprob: Tensor, sequence: Tensor, completions: int) -> Tensor:
    """Sum of the tokens' log-probs of each completion, float64 [completions].

    logprob [M] of packed tokens, sequence int64 [M] the completion of each
    """
    sums = torch.zeros(completions, dtype=torch.float64, device=logprob.device)
    return sums.index_add(0, sequence, logprob.double())
