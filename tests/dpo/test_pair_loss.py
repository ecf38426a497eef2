"""The pair loss is its formula in float64, value and gradient; what it says of equal pairs and of packed tokens."""

import math

import numpy as np
import pytest
import torch

from fastsmart.dpo.losses import completion_sums, pair_loss


def made(pairs: int = 12, seed: int = 0) -> list[torch.Tensor]:
    """Log-probs of whole completions: chosen, rejected, and both under the reference, float64 [pairs] each."""
    generator = torch.Generator().manual_seed(seed)
    ours = -50 - 20 * torch.rand(2, pairs, dtype=torch.float64, generator=generator)
    base = ours + 3 * torch.randn(2, pairs, dtype=torch.float64, generator=generator)
    return [*ours, *base]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 10.0])
def test_it_is_the_formula_and_its_gradient(penalty):
    beta = 0.1
    chosen, rejected, ref_chosen, ref_rejected = made()
    chosen.requires_grad_(), rejected.requires_grad_()
    found = pair_loss(chosen, rejected, ref_chosen, ref_rejected, beta, penalty)
    found.loss.sum().backward()
    a, b = (chosen - ref_chosen).detach().numpy(), (rejected - ref_rejected).detach().numpy()
    assert (a < 0).any()
    assert (a > 0).any()
    margin = a - b - penalty * np.maximum(0, -a)
    share = 1 / (1 + np.exp(beta * margin))
    np.testing.assert_allclose(found.loss.detach(), np.log1p(np.exp(-beta * margin)), rtol=1e-12)
    np.testing.assert_allclose(found.margin, margin, rtol=1e-12)
    np.testing.assert_allclose(chosen.grad, -beta * share * (1 + penalty * (a < 0)), rtol=1e-12)
    np.testing.assert_allclose(rejected.grad, beta * share, rtol=1e-12)


def test_where_chosen_and_rejected_are_one_the_loss_is_log_two_and_nothing_moves():
    both = torch.tensor([-40.0, -7.5], dtype=torch.float64, requires_grad=True)
    reference = both.detach().clone()
    found = pair_loss(both, both, reference, reference, 0.1, 10.0)
    found.loss.sum().backward()
    assert found.loss.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert both.grad.tolist() == [0.0, 0.0]


def test_sums_are_those_of_each_completion():
    lengths = torch.tensor([3, 1, 0, 5])
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    sequence = torch.repeat_interleave(torch.arange(4), lengths)
    found = completion_sums(values, sequence, 4)
    assert found.dtype == torch.float64
    expected = [part.double().sum().item() for part in values.split(lengths.tolist())]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
