"""The GRPO losses: gradients, and what must not change a loss. Agreement with TRL is in tests/peers/test_trl.py.

Shape letters: M tokens of the batch, N completions.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BASE, CASES, LOSSES, OPTIONS, batch, select

from fastsmart.errors import UserError
from fastsmart.grpo.losses import LossStats, loss_denominator, policy_loss


def evaluate(b, s, denominator=None):
    """Loss, d loss / d logprob, statistics."""
    logprob = b.logprob.clone().requires_grad_()
    denominator = loss_denominator(b.lengths, s) if denominator is None else denominator
    args = (b.sampler_logprobs, b.reference, b.advantage, b.sequence, s, denominator, b.entropy)
    loss, stats = policy_loss(logprob, *args)
    loss.backward()
    return loss.detach(), logprob.grad, stats


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("s", CASES)
def test_gradient_is_that_of_the_value(s):
    """By finite differences; cispo and ratio "one", whose gradient is another thing, have tests of their own."""
    if s.loss == "cispo" or s.ratio == "one":
        s = replace(s, loss="bnpo", ratio="behaviour")
    b = batch()
    denominator = loss_denominator(b.lengths, s)

    def value(logprob, entropy):
        return policy_loss(logprob, b.sampler_logprobs, b.reference, b.advantage, b.sequence, s, denominator, entropy)[
            0
        ]

    assert torch.autograd.gradcheck(value, (b.logprob.clone().requires_grad_(), b.entropy.clone().requires_grad_()))


@pytest.mark.parametrize("s", CASES)
def test_micro_batches_add_up_to_the_whole(s):
    b = batch()
    loss, grad, stats = evaluate(b, s)
    for split in ([(0, 1, 2), (3, 4, 5)], [(5,), (4,), (2, 0), (1, 3)], [(4,), (0, 1, 2, 3, 5)]):
        parts = [select(b, completions) for completions in split]
        results = [evaluate(part, s, loss_denominator(b.lengths, s)) for part in parts]
        close(sum(r[0] for r in results), loss)
        for part, (_, part_grad, _) in zip(parts, results, strict=True):
            close(part_grad, grad[part.rows])
        merged = results[0][2]
        for r in results[1:]:
            merged = merged.merge(r[2])
        close(merged.sums, stats.sums)
        assert torch.equal(merged.peaks, stats.peaks)


@pytest.mark.parametrize("s", CASES)
def test_order_of_tokens_and_of_completions_does_not_matter(s):
    b = batch()
    loss, grad, stats = evaluate(b, s)
    order = torch.randperm(len(b.logprob), generator=torch.Generator().manual_seed(1))
    names = torch.randperm(len(b.advantage), generator=torch.Generator().manual_seed(2))
    shuffled = SimpleNamespace(
        **{name: getattr(b, name)[order] for name in ("logprob", "sampler_logprobs", "reference", "entropy")},
        advantage=b.advantage[torch.argsort(names)],
        sequence=names[b.sequence][order],
        lengths=b.lengths,
    )
    got_loss, got_grad, got_stats = evaluate(shuffled, s)
    close(got_loss, loss)
    close(got_grad, grad[order])
    close(got_stats.sums, stats.sums)


@pytest.mark.parametrize("s", CASES)
def test_scaling_the_advantage_scales_the_policy_term_only(s):
    b, b3 = batch(), batch()
    b3.advantage = 3 * b.advantage
    one, three = evaluate(b, s)[2].means(), evaluate(b3, s)[2].means()
    assert three["policy_loss"] == pytest.approx(3 * one["policy_loss"], rel=1e-12)
    assert three["kl_loss"] == pytest.approx(one["kl_loss"], rel=1e-12)
    assert three["entropy_loss"] == pytest.approx(one["entropy_loss"], rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ratio", ["behaviour", "one"])
def test_on_policy_every_gradient_is_reinforce_with_baseline(loss, ratio):
    """Where policy and sampler agree: − weight × advantage × ∇ log p, weights summing to 1 (dr_grpo: to fill)."""
    s = replace(BASE, loss=loss, beta=0.0, ratio=ratio)
    b = batch(spread=0.0 if ratio == "behaviour" else 0.3)
    _, grad, stats = evaluate(b, s)
    token_length = b.lengths[b.sequence].double()
    weight = {
        "grpo": 1 / (token_length * 6),
        "gspo": 1 / (token_length * 6),
        "dr_grpo": torch.full_like(token_length, 1 / (6 * 9)),
    }.get(loss, torch.full_like(token_length, 1 / 23))
    if loss == "gspo":  # the ratio is the completion's, the gradient of its mean log-ratio is 1/len: the same weights
        assert weight[b.sequence == 2].sum() == pytest.approx(1 / 6)
    close(grad, -weight * b.advantage[b.sequence])
    means = stats.means()
    assert means["ratio"] == means["ratio_min"] == means["ratio_max"] == 1.0
    assert means["clipped_low"] == means["clipped_high"] == 0.0


def test_on_policy_gradient_through_the_log_prob_kernel():
    """The whole path, hidden states to gradient, against REINFORCE written with log_softmax."""
    from fastsmart.kernels.logprob import logprob

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(17, 8, dtype=torch.float64, generator=generator)
    ids = torch.randint(17, (23,), generator=generator)
    b, s = batch(), replace(BASE, beta=0.0)
    w = weight.clone().requires_grad_()
    out = logprob(hidden, w, ids)
    loss, _ = policy_loss(
        out.logprob, out.logprob.detach(), None, b.advantage, b.sequence, s, loss_denominator(b.lengths, s), out.entropy
    )
    loss.backward()
    v = weight.clone().requires_grad_()
    log_p = torch.log_softmax(hidden @ v.t(), dim=-1)[torch.arange(23), ids]
    (-(b.advantage[b.sequence] * log_p).sum() / 23).backward()
    close(w.grad, v.grad)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_clipped_tokens_have_no_gradient(loss):
    """One token each: ratio high and low, advantage positive and negative; only the pessimistic branch is flat."""
    s = replace(BASE, loss=loss, beta=0.0, clip_low=0.2, clip_high=0.3, truncate=3.0)
    ratio = torch.tensor([1.25, 1.35, 1.35, 0.75, 0.75, 3.5, 0.85], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    logprob = torch.full((7,), -2.0, dtype=torch.float64, requires_grad=True)
    loss_value, stats = policy_loss(logprob, -2.0 - ratio.log(), None, advantage, torch.arange(7), s, 1.0)
    loss_value.backward()
    want = torch.where(torch.tensor([1, 0, 1, 0, 1, 0, 1], dtype=torch.bool), -ratio * advantage, 0.0)
    close(logprob.grad, want)
    means = stats.means()
    assert means["clipped_low"] == pytest.approx(1 / 7)  # 0.75 with a negative advantage
    assert means["clipped_high"] == pytest.approx(1 / 7)  # 1.35 with a positive one
    assert means["ratio_max"] == pytest.approx(3.5)  # before truncation
    assert means["ratio_min"] == pytest.approx(0.75)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    s = replace(BASE, loss="cispo", beta=0.0, clip_low=1.0, clip_high=0.5)
    ratio = torch.tensor([4.0, 0.1, 1.2], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    logprob = torch.full((3,), -2.0, dtype=torch.float64, requires_grad=True)
    loss, stats = policy_loss(logprob, -2.0 - ratio.log(), None, advantage, torch.arange(3), s, 1.0)
    loss.backward()
    close(logprob.grad, -torch.tensor([1.5, 0.1, 1.2], dtype=torch.float64) * advantage)
    assert stats.means()["clipped_high"] == pytest.approx(1 / 3)
    assert stats.means()["clipped_low"] == 0.0


def test_gspo_has_one_ratio_a_completion():
    """Tokens of opposite mismatch cancel in the geometric mean, so the completion is on-policy."""
    s = replace(BASE, loss="gspo", beta=0.0)
    gap = torch.tensor([0.7, -0.7, 0.1, 0.3], dtype=torch.float64)
    logprob = torch.full((4,), -1.0, dtype=torch.float64)
    sequence, advantage = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0], dtype=torch.float64)
    loss, stats = policy_loss(logprob, logprob - gap, None, advantage, sequence, s, 2.0)
    assert loss == pytest.approx(-(1 + min(math.exp(0.2), 1.2)) / 2)
    assert stats.means()["ratio_min"] == pytest.approx(1.0)
    assert stats.means()["ratio_max"] == pytest.approx(math.exp(0.2))
    assert stats.means()["logprob_gap_max"] == pytest.approx(0.7)


@pytest.mark.parametrize("s", CASES)
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_tokens_without_a_sampler_log_prob_are_dropped_and_counted(s, value):
    """They get no gradient, whatever else they hold, and leave the weight of every other token as it was."""
    b, rest = batch(), batch()
    gone = torch.zeros(23, dtype=torch.bool)
    gone[[2, 7, 8, 22]] = True
    b.sampler_logprobs[gone] = value
    b.logprob[2], b.reference[7], b.entropy[8] = -math.inf, math.nan, math.inf
    loss, grad, stats = evaluate(b, s)
    assert loss.isfinite()
    assert torch.equal(grad[gone], torch.zeros(4, dtype=torch.float64))
    assert grad[~gone].isfinite().all()
    means = stats.means()
    assert (means["dropped"], means["tokens"]) == (4, 19)
    assert all(math.isfinite(x) for x in means.values())
    if not (s.loss == "gspo" or s.mask_level == "sequence"):  # there the dropped tokens are missing from the means
        _, full, _ = evaluate(rest, s)
        close(grad[~gone], full[~gone])


def test_a_policy_that_is_nan_is_not_hidden():
    b = batch()
    b.logprob[3] = math.nan
    loss, _, stats = evaluate(b, BASE)
    assert loss.isnan()
    assert math.isnan(stats.means()["ratio"])
    assert math.isnan(stats.means()["ratio_max"])


@pytest.mark.parametrize("loss", LOSSES)
def test_broken_ratios_stay_finite(loss):
    """A sampler and a policy 1,000 nats apart: a loss to be ashamed of, but a number."""
    s = replace(BASE, loss=loss)
    b = batch()
    b.sampler_logprobs[5], b.sampler_logprobs[6], b.reference[7], b.reference[8] = -1000.0, 1000.0, 1000.0, -1000.0
    loss_value, grad, stats = evaluate(b, s)
    assert loss_value.isfinite()
    assert grad.isfinite().all()
    assert all(math.isfinite(x) for x in stats.means().values())
    assert stats.means()["logprob_gap_max"] > 990


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_at_all(loss):
    s = replace(BASE, loss=loss)
    empty = select(batch(), (4,))
    value, grad, stats = evaluate(empty, s)
    assert value == 0
    assert grad.shape == (0,)
    assert stats.means()["tokens"] == 0
    assert math.isnan(stats.means()["ratio_max"])
    whole = evaluate(batch(), s)[2]
    assert torch.equal(stats.merge(whole).sums, whole.sums)
    assert torch.equal(stats.merge(whole).peaks, whole.peaks)


def test_statistics_are_those_of_the_definition():
    b = batch()
    means = evaluate(b, replace(BASE, mask_low=0.8, mask_high=1.3, entropy_bonus=0.5))[2].means()
    gap = b.logprob - b.sampler_logprobs
    ratio, log_r = gap.exp(), b.reference - b.logprob
    outside = (ratio < 0.8) | (ratio > 1.3)
    negative = b.advantage[b.sequence] < 0
    want = {
        "ratio": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clipped_low": ((ratio < 0.8) & negative).double().mean(),
        "clipped_high": ((ratio > 1.2) & ~negative).double().mean(),
        "masked": outside.double().mean(),
        "kl": (log_r.exp() - 1 - log_r).mean(),
        "entropy": b.entropy.mean(),
        "token_mult_prob_error": gap.abs().exp().mean(),
        "mismatch_k3": (ratio - 1 - gap).mean(),
        "logprob_gap_max": gap.abs().max(),
        "kl_loss": 0.04 * (log_r.exp() - 1 - log_r).mean(),
        "entropy_loss": -0.5 * b.entropy.mean(),
        "tokens": 23.0,
        "dropped": 0.0,
    }
    assert 0 < means["masked"] < 1
    assert means == pytest.approx({name: float(x) for name, x in want.items()} | {
        "policy_loss": means["policy_loss"],
        "loss": means["policy_loss"] + means["kl_loss"] + means["entropy_loss"],
    }, rel=1e-12)  # fmt: skip
    assert set(LossStats.TOTALS + LossStats.MEANS) <= set(means)


def test_the_kl_is_measured_without_beta_and_not_invented_without_a_reference():
    b, s = batch(), replace(BASE, beta=0.0)
    loss, grad, stats = evaluate(b, s)
    b.reference = None
    same_loss, same_grad, blind = evaluate(b, s)
    assert torch.equal(loss, same_loss)
    assert torch.equal(grad, same_grad)
    assert stats.means()["kl"] > 0
    assert math.isnan(blind.means()["kl"])
    assert math.isnan(blind.means(4)["kl_per_completion"])
    assert "kl_per_completion" not in stats.means()  # without the number of completions there is none


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    loss=st.sampled_from(LOSSES),
    options=st.sampled_from(list(OPTIONS.values())),
    spread=st.floats(0, 3),
    cut=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_any_batch_cut_anywhere(lengths, loss, options, spread, cut, seed):
    if loss == "cispo" and "truncate" in options:
        options = {}
    s = replace(BASE, loss=loss, **options)
    b = batch(tuple(lengths), spread, seed)
    if not sum(lengths):
        return
    value, grad, stats = evaluate(b, s)
    cut = min(cut, len(lengths))
    parts = [select(b, r) for r in (range(cut), range(cut, len(lengths))) if len(r)]
    results = [evaluate(p, s, loss_denominator(b.lengths, s)) for p in parts]
    torch.testing.assert_close(sum(r[0] for r in results), value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), grad, rtol=1e-11, atol=1e-11)
    means = stats.means()
    assert means["ratio_min"] <= means["ratio"] * (1 + 1e-12)
    assert means["ratio"] <= means["ratio_max"] * (1 + 1e-12)
    assert means["token_mult_prob_error"] >= 1
    assert means["mismatch_k3"] >= 0


def test_denominators():
    lengths = torch.tensor([4, 0, 6])
    want = {"grpo": 3, "gspo": 3, "bnpo": 10, "dapo": 10, "cispo": 10, "dr_grpo": 27}
    assert {loss: loss_denominator(lengths, replace(BASE, loss=loss)) for loss in LOSSES} == want
    assert all(loss_denominator(lengths[:0], replace(BASE, loss=loss)) == 1 for loss in LOSSES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"loss": "ppo"}, 'loss must be one of grpo, bnpo, dr_grpo, dapo, gspo, cispo; got "ppo"'),
        ({"kl": "k4"}, "kl must be one of k1, k2, k3"),
        ({"ratio": "two"}, "ratio must be one of behaviour, one"),
        ({"mask_level": "batch"}, "mask_level must be one of token, sequence"),
        ({"clip_low": 1.5}, "clip_low must be above 0 and at most 1; got 1.5"),
        ({"clip_high": 0.0}, "clip_high must be above 0"),
        ({"beta": -0.1}, "beta must be 0 or above"),
        ({"beta": math.nan}, "beta must be 0 or above"),
        ({"kl_clamp": 0.0}, "kl_clamp must be above 0"),
        ({"mask_low": 1.1}, "mask_low must be between 0 and 1"),
        ({"mask_high": 0.9}, "mask_high must be 0"),
        ({"entropy_bonus": -1.0}, "entropy_bonus must be 0 or above"),
        ({"truncate": 1.1}, "truncate must be 0"),
        ({"truncate": 2.0, "loss": "cispo"}, "truncate does nothing for cispo"),
        ({"max_tokens": 0, "loss": "dr_grpo"}, "dr_grpo divides by max_tokens"),
    ],
)
def test_settings_that_make_no_sense(change, sentence):
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        replace(BASE, **change)


def test_a_term_without_its_input_is_refused():
    b = batch()
    b.reference = None
    with pytest.raises(ValueError, match="reference"):
        evaluate(b, BASE)
    b = batch()
    b.entropy = None
    with pytest.raises(ValueError, match="entropy"):
        evaluate(b, replace(BASE, entropy_bonus=0.1))
