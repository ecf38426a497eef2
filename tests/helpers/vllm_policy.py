"""A policy of the smallest shape vLLM's CPU attention takes: heads of 32."""

from __future__ import annotations

from tiny_policy import make_policy

from fastsmart.policy.transformer import Policy
from fastsmart.tokens.vocabulary import Vocabulary

SHAPE = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 2}


def make_vllm_policy(vocab: Vocabulary, seed: int = 0, **size: int) -> Policy:
    return make_policy(vocab, seed, **(SHAPE | size))
