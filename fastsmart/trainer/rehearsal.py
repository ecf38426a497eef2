"""Rehearsal: each step also raises the likelihood of a few clips of the base that the target of diversity favours.

Reward-driven steps forget whatever the reward does not ask for. Likelihood of clips drawn from a diverse target holds
every dimension of the music alive, those no histogram counts too: the forward KL from the target, which covers modes
where the reverse one drops them (Li et al. 2025, DPH-RL, arXiv 2509.07430).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsmart.policy.transformer import Policy
from fastsmart.trainer.batch import MicroBatch
from fastsmart.trainer.update import completion_logprobs


def rehearse(
    policy: Policy,
    batches: Sequence[MicroBatch],
    tokens: int,
    weight: float,
    temperature: float,
    dtype: torch.dtype,
    kernel: str = "auto",
) -> torch.Tensor:
    """Add the gradient of weight x mean -log p, nats a token, to what the policy's parameters hold.

    batches : of the clips that this rank rehearses
    tokens  : completion tokens of the clips of all ranks; gradients add up over ranks

    Gives the sum of these batches' log-probs, a float64 scalar on the policy's device.
    """
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    for batch in batches:
        likelihood = completion_logprobs(policy, batch, temperature, dtype, kernel).logprob.sum()
        (-weight / tokens * likelihood).backward()
        total += likelihood.detach()
    return total
