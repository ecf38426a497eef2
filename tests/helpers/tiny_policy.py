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


def eager_to_end(vocab: Vocabulary, wish: float = 0.12, **size: int) -> Policy:
    """A policy that ends a piece with a probability of about a tenth at every token, of less where the wish is less;
    a policy twice as wide needs half the wish."""
    policy = make_policy(vocab, spread=2.0, **size)
    with torch.no_grad():
        bias = policy.model.norm.weight
        bias.fill_(1.0)
        direction = policy.model.embed_tokens.weight.mean(0)
        policy.model.embed_tokens.weight.add_(1.0 - direction)  # every hidden state has a common part ...
        policy.lm_head.weight[vocab.eos_id] += wish  # ... that speaks for the end
    return policy
