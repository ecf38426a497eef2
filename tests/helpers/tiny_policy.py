"""Policies small enough for tests."""

from __future__ import annotations

import torch

from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.tokens.vocabulary import Vocabulary


def make_policy(vocab: Vocabulary, seed: int = 0, spread: float = 8.0, **size: int) -> Policy:
    """A small policy with weights far enough from zero that its distributions are far from uniform."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4} | size
    policy = Policy(PolicySize(len(vocab), **shape), vocab).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    return policy.eval()
