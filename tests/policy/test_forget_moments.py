"""An optimizer that has forgotten its moments steps as a new one does, and goes on from a checkpoint as it is."""

import copy

import torch
from tiny_policy import make_policy

from fastsmart.policy.optimizer import forget_moments, make_optimizer, optimizer_tensors, step_if_finite


def step(policy, optimizer, number: int) -> None:
    ids = torch.randint(5, 400, (2, 8), generator=torch.Generator().manual_seed(number))
    policy.hidden(ids).square().mean().backward()
    step_if_finite(optimizer, torch.tensor(1.0))
    optimizer.zero_grad(set_to_none=True)


def test_the_next_step_is_a_first_one(vocab):
    policy = make_policy(vocab)
    options = (1e-2, (0.9, 0.99), 0.1)
    optimizer = make_optimizer(policy, *options)
    step(policy, optimizer, 0)
    forget_moments(optimizer)
    assert all(not state["exp_avg"].any() and state["step"] == 0 for state in optimizer.state.values())
    assert optimizer_tensors(optimizer, policy)
    other = copy.deepcopy(policy)
    fresh = make_optimizer(other, *options)
    step(policy, optimizer, 1), step(other, fresh, 1)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
