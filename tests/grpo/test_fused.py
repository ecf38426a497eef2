"""The fused objective is the readable loss: value, gradients and statistics, for everything that can be set.

Under Triton's interpreter, on a GPU where there is one. Shape letters: M tokens of the batch, N completions.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BASE, CASES, LOSSES, batch, select

from fastsmart.grpo.fused import fused_policy_loss
from fastsmart.grpo.losses import loss_denominator, policy_loss
from fastsmart.grpo.settings import LossSettings
from fastsmart.kernels import grpo as kernel

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = {
    "no mask": {},
    "tokens": {"mask_low": 0.8, "mask_high": 1.3},
    "sequences": {"mask_low": 0.95, "mask_high": 1.05, "mask_level": "sequence"},
}


def offsets(lengths):
    return F.pad(lengths.cumsum(0), (1, 0)).to(DEVICE)


def results(f, b, s, cotangent=1.0):
    """Loss, gradients with respect to log-prob and entropy, sums and peaks of the statistics."""
    fused = f is fused_policy_loss
    to = (lambda x: x.to(DEVICE)) if fused else (lambda x: x)
    logprob, entropy = to(b.logprob).requires_grad_(), to(b.entropy).requires_grad_()
    where = offsets(b.lengths) if fused else b.sequence
    reference = None if b.reference is None else to(b.reference)
    denominator = loss_denominator(b.lengths, s)
    loss, stats = f(logprob, to(b.sampler_logprobs), reference, to(b.advantage), where, s, denominator, entropy)
    (cotangent * loss).backward()
    got = (loss.detach(), logprob.grad, entropy.grad, stats.sums, stats.peaks)
    return [torch.zeros(()) if x is None else x.cpu() for x in got]


def detached(b):
    for name in ("logprob", "entropy"):
        setattr(b, name, getattr(b, name).detach().clone())
    return b


def agree(b, s, **tolerance):
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-12}
    want, got = results(policy_loss, detached(b), s), results(fused_policy_loss, detached(b), s)
    for name, a, w in zip(("loss", "d logprob", "d entropy", "sums", "peaks"), got, want, strict=True):
        torch.testing.assert_close(a, w, **tolerance, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("s", CASES)
def test_every_option(s):
    agree(batch(), s)


@pytest.mark.parametrize(("loss", "kl", "mask"), list(itertools.product(LOSSES, ("k1", "k2", "k3"), MASKS)))
def test_every_loss_with_every_kl_and_mask(loss, kl, mask):
    agree(batch(), replace(BASE, loss=loss, kl=kl, kl_ratio=mask != "no mask", **MASKS[mask]))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    loss=st.sampled_from(LOSSES),
    kl=st.sampled_from(("k1", "k2", "k3")),
    kl_ratio=st.booleans(),
    mask=st.sampled_from(list(MASKS)),
    ratio=st.sampled_from(("behaviour", "one")),
    truncate=st.booleans(),
    beta=st.sampled_from((0.0, 0.1)),
    bonus=st.sampled_from((0.0, 0.1)),
    spread=st.floats(0, 3),
    dropped=st.integers(0, 36),
    seed=st.integers(0, 1000),
)
def test_any_combination(
    lengths, loss, kl, kl_ratio, mask, ratio, truncate, beta, bonus, spread, dropped, seed
):  # fmt: skip
    s = LossSettings(
        loss=loss, kl=kl, kl_ratio=kl_ratio, ratio=ratio, beta=beta, entropy_bonus=bonus, max_tokens=6, **MASKS[mask],
        truncate=1.5 if truncate and loss != "cispo" else 0.0,
    )  # fmt: skip
    b = batch(tuple(lengths), spread, seed)
    b.sampler_logprobs[dropped : dropped + 3] = -math.inf
    agree(b, s)


@pytest.mark.parametrize("loss", LOSSES)
def test_completions_longer_than_a_block(loss):
    s = replace(BASE, loss=loss, kl_ratio=True, entropy_bonus=0.01, mask_low=0.8, mask_high=1.3)
    block = kernel.LAYOUT["BLOCK"]
    agree(batch((block + 1, 2 * block, 3, 3 * block - 1)), s)
    agree(batch((block + 1, 2 * block)), replace(s, mask_level="sequence", mask_low=0.99, mask_high=1.01))


@pytest.mark.parametrize("s", CASES)
def test_error_in_fp32_at_most_twice_the_readable_one(s):
    """Both from the same fp32 numbers, against the readable loss in fp64."""
    b = batch((40, 1, 90, 60, 0, 30))
    for name in ("logprob", "sampler_logprobs", "reference", "entropy", "advantage"):
        setattr(b, name, getattr(b, name).float())
    readable, fused = results(policy_loss, detached(b), s), results(fused_policy_loss, detached(b), s)
    for name in ("logprob", "sampler_logprobs", "reference", "entropy", "advantage"):
        setattr(b, name, getattr(b, name).double())
    exact = results(policy_loss, detached(b), s)
    for ours, theirs, truth in zip(fused, readable, exact, strict=True):
        rounding = torch.finfo(torch.float32).eps * truth.abs().max()  # the readable one may be lucky
        error, yardstick = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= 2 * torch.maximum(yardstick, rounding)


@pytest.mark.parametrize("loss", LOSSES)
def test_packing_order_and_scale(loss):
    """The batch is the sum of its parts in any order, and the gradient is linear in what comes from above."""
    b, s = batch(), replace(BASE, loss=loss, kl_ratio=True, entropy_bonus=0.01, mask_low=0.8, mask_high=1.3)
    loss, grad, grad_entropy, sums, peaks = results(fused_policy_loss, detached(b), s)
    order = (3, 4, 0, 5, 2, 1)
    moved = select(detached(b), order)
    again = results(fused_policy_loss, moved, s, cotangent=3.0)
    torch.testing.assert_close(again[0], loss)
    torch.testing.assert_close(again[1], 3 * grad[moved.rows])
    torch.testing.assert_close(again[2], 3 * grad_entropy[moved.rows])
    torch.testing.assert_close(again[3], sums)
    assert torch.equal(again[4], peaks)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_dropped_and_broken_tokens(loss, value):
    b = batch()
    b.sampler_logprobs[[2, 7, 8, 22]] = value
    b.logprob[2], b.reference[7], b.entropy[8] = -math.inf, math.nan, math.inf
    b.sampler_logprobs[5], b.sampler_logprobs[6], b.reference[9], b.reference[10] = -1000.0, 1000.0, 1000.0, -1000.0
    agree(b, replace(BASE, loss=loss, entropy_bonus=0.1, kl_ratio=True))


def test_a_policy_that_is_nan_is_not_hidden():
    b = batch()
    b.logprob[3] = math.nan
    loss, grad, _, _, peaks = results(fused_policy_loss, b, BASE)
    assert loss.isnan()
    assert grad[3].isnan()
    assert peaks.isnan().all()


def test_what_is_not_given_is_not_invented():
    b = batch()
    b.reference = None
    agree(b, replace(BASE, beta=0.0))
    with pytest.raises(ValueError, match="reference"):
        results(fused_policy_loss, detached(b), BASE)
    logprob = b.logprob.detach().to(DEVICE)
    with pytest.raises(ValueError, match="entropy"):
        fused_policy_loss(
            logprob, logprob, logprob, b.advantage, offsets(b.lengths), replace(BASE, entropy_bonus=0.1), 1.0
        )


def test_every_number_is_written():
    """Uninitialised memory is NaN here, so that what the kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for s in (BASE, replace(BASE, loss="gspo", entropy_bonus=0.1)):
            assert all(x.isfinite().all() for x in results(fused_policy_loss, batch(), s))
    finally:
        torch.use_deterministic_algorithms(False)
