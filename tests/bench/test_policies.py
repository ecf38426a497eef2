"""The policies that benchmarks measure with."""

from dataclasses import replace

import pytest
import torch
from policies import PAPER, PLAYED, playing_policy

from fastsmart.policy.hf_format import load_policy


@pytest.mark.parametrize("size", [PAPER, replace(PAPER, hidden_size=384, num_heads=6, num_kv_heads=6, num_layers=5)])
def test_a_larger_policy_plays_what_the_shipped_one_plays(size):
    small, large = load_policy(PLAYED), playing_policy(size)
    ids = torch.randint(len(small.vocab), (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logprobs = (policy(ids).log_softmax(-1) for policy in (small, large))
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
    assert large.num_parameters > 2 * small.num_parameters


def test_it_has_the_size_of_the_papers():
    assert playing_policy().num_parameters == 17_204_736


def test_its_new_weights_are_at_work():
    """They are not zeros, which a processor would have less trouble with."""
    policy = playing_policy()
    for layer in policy.model.layers:
        for matrix in (layer.self_attn.qkv_proj.weight, layer.mlp.gate_up_proj.weight):
            assert (matrix == 0).float().mean() < 0.01
