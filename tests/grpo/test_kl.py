"""What the KL estimators estimate, checked by summing over a whole vocabulary instead of sampling from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsmart.grpo.kl import ESTIMATORS, kl_divergence

V = 7


def distributions():
    """Logits of a policy (with gradient), log-probs of a reference and of a third, sampling, distribution."""
    generator = torch.Generator().manual_seed(0)
    policy, reference, sampler = torch.randn(3, V, dtype=torch.float64, generator=generator)
    return policy.requires_grad_(), reference.log_softmax(0), sampler.log_softmax(0)


def exact_kl(p, q):
    """KL(p ‖ q) by PyTorch."""
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(name):
    policy, reference, _ = distributions()
    log_p = policy.log_softmax(0)
    torch.testing.assert_close((log_p.exp() * kl_divergence(log_p, reference, name)).sum(), exact_kl(log_p, reference))


def test_k2_is_the_second_order_of_the_kl():
    """Its error falls with the cube of the distance, so halving the distance divides it by about 8."""
    policy, _, _ = distributions()
    log_p = policy.detach().log_softmax(0)
    direction = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def error(distance):
        reference = (policy.detach() + distance * direction).log_softmax(0)
        return ((log_p.exp() * kl_divergence(log_p, reference, "k2")).sum() - exact_kl(log_p, reference)).abs()

    assert 7 < error(0.02) / error(0.01) < 9


def expected_gradient(name, log_weight):
    """Σ_x stopgrad(w(x)) · ∇ estimator(x), the mean gradient over samples from w."""
    policy, reference, sampler = distributions()
    log_p = policy.log_softmax(0)
    weight = (log_p if log_weight == "policy" else sampler).detach().exp()
    estimate = kl_divergence(log_p, reference, name)
    if log_weight == "sampler":
        estimate = estimate * (log_p - sampler).exp()
    return torch.autograd.grad((weight * estimate).sum(), policy)[0]


def exact_gradient(direction):
    policy, reference, _ = distributions()
    log_p = policy.log_softmax(0)
    kl = exact_kl(log_p, reference) if direction == "reverse" else exact_kl(reference, log_p)
    return torch.autograd.grad(kl, policy)[0]


def test_gradients_are_what_the_table_says():
    torch.testing.assert_close(expected_gradient("k1", "policy"), torch.zeros(V, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient("k2", "policy"), exact_gradient("reverse"))
    torch.testing.assert_close(expected_gradient("k3", "policy"), exact_gradient("forward"))


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_the_importance_ratio_makes_gradients_of_the_reverse_kl(name):
    torch.testing.assert_close(expected_gradient(name, "sampler"), exact_gradient("reverse"))


@given(log_r=st.floats(-80, 80, width=32), name=st.sampled_from(["k2", "k3"]))
def test_k2_and_k3_are_never_negative_and_zero_only_at_equality(log_r, name):
    value = ESTIMATORS[name](torch.tensor(log_r))
    assert value >= 0
    if abs(log_r) > 1e-3:
        assert value > 0


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_clamp_bounds_value_and_gradient(name):
    logprob = torch.tensor([-1.0, -200.0, -1.0, -1.0], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -200.0, -torch.inf])
    value = kl_divergence(logprob, reference, name, clamp=5.0)
    free = kl_divergence(logprob[:1], reference[:1], name)
    torch.testing.assert_close(value[:1], free)  # inside the limit nothing changes
    assert value.isfinite().all()
    at_limit = ESTIMATORS[name](torch.tensor([5.0, -5.0, -5.0]))
    torch.testing.assert_close(value[1:], at_limit)
    value.sum().backward()
    assert logprob.grad[0] != 0
    assert torch.equal(logprob.grad[1:], torch.zeros(3))


@pytest.mark.parametrize("times", [2.0, 20.0, 2000.0])
def test_k3_pulls_a_token_back_with_at_most_its_weight_and_k2_with_the_logarithm(times):
    """On a token that the policy plays so many times as often as the reference."""
    reference = torch.tensor(-8.0, dtype=torch.float64)
    pulls = {}
    for name in ("k2", "k3"):
        log_p = (reference + torch.tensor(times, dtype=torch.float64).log()).requires_grad_()
        kl_divergence(log_p, reference, name).backward()
        pulls[name] = float(log_p.grad)
    assert pulls["k3"] == pytest.approx(1 - 1 / times)
    assert pulls["k2"] == pytest.approx(float(torch.tensor(times, dtype=torch.float64).log()))


def horizon_of_two(estimator: str, ratio: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected gradient of the per-token loss over every piece of two tokens of five, and that of the exact KL of each
    token to the reference, with the shares of the first tokens held fixed, as a loss per token holds them."""
    generator = torch.Generator().manual_seed(2)
    policy, reference = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)  # row 0, then one a first token
    policy.requires_grad_()
    log_p, log_q = policy.log_softmax(1), reference.log_softmax(1)
    chance = log_p.detach().exp()
    piece = chance[0][:, None] * chance[1:]  # of first and second token
    each = kl_divergence(log_p, log_q, estimator)
    if ratio:
        each = each * (log_p - log_p.detach()).exp()
    loss = (piece * (each[0][:, None] + each[1:])).sum()
    exact = exact_kl(log_p[0], log_q[0]) + sum(chance[0, i] * exact_kl(log_p[i + 1], log_q[i + 1]) for i in range(5))
    return torch.autograd.grad(loss, policy, retain_graph=True)[0], torch.autograd.grad(exact, policy)[0]


def test_over_whole_pieces_k2_and_k3_with_the_ratio_have_the_gradient_of_each_tokens_kl_and_k3_alone_has_not():
    for estimator, ratio in (("k2", False), ("k3", True)):
        torch.testing.assert_close(*horizon_of_two(estimator, ratio))
    ours, exact = horizon_of_two("k3", ratio=False)
    assert (ours - exact).abs().max() > 0.05
