"""A policy by cast matrices against the policy itself: hidden states and every parameter's gradient."""

import pytest
import torch

from fastsmart.policy.cast import CastPolicy
from fastsmart.policy.transformer import Policy, PolicySize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def kernel(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def made(vocab, kv_heads=2, tied=False):
    size = PolicySize(len(vocab), 32, 48, 2, 4, kv_heads, tied_head=tied)
    return Policy(size, vocab).initialise(torch.Generator().manual_seed(0))


def both(policy, hidden, ids):
    """Logits and the gradients of all parameters."""
    policy.zero_grad()
    logits = policy.lm_head(hidden(ids))
    slope = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
    (logits * slope).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in policy.parameters())]


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, True)], ids=["plain", "grouped, tied"])
def test_in_float32_it_is_the_policy(vocab, kernel, kv_heads, tied):
    device = DEVICE if kernel == "triton" else "cpu"
    policy = made(vocab, kv_heads, tied).to(device)
    cast = CastPolicy(policy, torch.float32, kernel)
    ids = torch.randint(400, (3, 21), generator=torch.Generator().manual_seed(2)).to(device)
    cast.refresh()
    for ours, plain in zip(both(policy, cast.hidden, ids), both(policy, policy.hidden, ids), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-5 * float(plain.abs().max()))


def test_in_bfloat16_it_errs_less_than_autocast(vocab):
    policy = made(vocab)
    cast = CastPolicy(policy, torch.bfloat16, "torch")
    ids = torch.randint(400, (8, 64), generator=torch.Generator().manual_seed(2))
    cast.refresh()

    def autocast(ids):
        with torch.autocast("cpu", torch.bfloat16):
            return policy.hidden(ids)

    exact, ours, theirs = (both(policy, hidden, ids) for hidden in (policy.hidden, cast.hidden, autocast))
    errors = [
        sum(float((x - e).square().sum() / e.square().sum()) for x, e in zip(found, exact, strict=True))
        for found in (ours, theirs)
    ]
    assert errors[0] <= errors[1]


def test_matrices_are_cast_when_they_have_changed(vocab):
    policy = made(vocab)
    cast = CastPolicy(policy, torch.bfloat16, "torch")
    assert not cast.refresh()
    weight, copy = policy.model.layers[0].self_attn.qkv_proj.weight, cast.copies[0]
    copy.zero_()
    assert cast.refresh()
    assert not copy.any()  # nothing has changed, so nothing was cast
    with torch.no_grad():
        weight.mul_(2)
    assert cast.refresh()
    assert torch.equal(cast.copies[0], weight.to(torch.bfloat16))
    policy.adopt({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    assert not cast.refresh()  # they lie elsewhere: what was recorded with them must go


def test_too_many_positions_are_refused(vocab):
    policy = made(vocab)
    cast = CastPolicy(policy, torch.float32, "torch")
    cast.refresh()
    with pytest.raises(ValueError, match="the policy was made for 2048"):
        cast.hidden(torch.zeros(1, 2049, dtype=torch.int64))
