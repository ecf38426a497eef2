"""The token-level objective of every GRPO loss in one kernel: value, gradient and statistics of packed completions.

The torch twin, which defines what is right, is `fastsmart.grpo.losses.policy_loss`; `fastsmart.grpo.fused` translates
its settings. Shape letters: M packed tokens, N completions.

One program takes one completion and walks its tokens once, twice where a ratio or mask belongs to the whole completion.
It reads four numbers a token and writes two: 0.4 MB for M = 16,384, 0.1 µs of an H100's bandwidth. So the floor is one
launch, where the twin makes about 160, and there is room to compute in float64, in which k3 is exact near 0.
Nothing is added by atomics: same input, same bits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsmart.kernels.jit import Shipped, jit, tl

# Names of the columns of the kernel's results, in the order of `LossStats`.
SUMS = (
    *("policy_loss", "kl_loss", "entropy_loss", "tokens", "dropped"),
    *("ratio", "clipped_low", "clipped_high", "masked", "kl", "entropy", "token_mult_prob_error", "mismatch_k3"),
)
PEAKS = ("ratio_max", "negative_ratio_min", "logprob_gap_max")
LOSS_TERMS = 3  # the first of SUMS, which the denominator divides
LAYOUT = {"SUM_COLUMNS": len(SUMS), "PEAK_COLUMNS": len(PEAKS), "BLOCK": 256}


class Objective(NamedTuple):
    """The constants of the kernel, one compilation for each set; bounds are those of the ratio, 0 = none.

    CISPO, GSPO    : the clipped ratio as a constant weight on log p; one ratio a completion
    RATIO_ONE      : the ratio is policy / itself
    PER_SEQUENCE   : tokens weigh 1 / length of their completion
    LOW, HIGH      : of the clip; TRUNCATE caps the ratio where the clip does not act
    BETA, KL, KL_RATIO, KL_CLAMP : weight and estimator of the KL term
    MASK_LOW, MASK_HIGH, SEQUENCE_MASK : logs of the mask's bounds; they test the log-ratio of a token or completion
    BONUS          : weight of the entropy
    MAX_LOG_RATIO  : log-ratios are clamped to ± this
    """

    CISPO: bool
    GSPO: bool
    RATIO_ONE: bool
    PER_SEQUENCE: bool
    LOW: float
    HIGH: float
    TRUNCATE: float
    BETA: float
    KL: Literal["k1", "k2", "k3"]
    KL_RATIO: bool
    KL_CLAMP: float
    MASK_LOW: float
    MASK_HIGH: float
    SEQUENCE_MASK: bool
    BONUS: float
    MAX_LOG_RATIO: float


def objective(
    logprob: Tensor,
    sampler_logprobs: Tensor,
    reference: Tensor | None,
    entropy: Tensor | None,
    advantage: Tensor,
    offsets: Tensor,
    denominator: float | Tensor,
    constants: Objective,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (a scalar), sums float64 [len(SUMS)] and peaks float64 [len(PEAKS)]; the loss is differentiable, once.

    logprob, sampler_logprobs, reference, entropy [M]: as for `policy_loss`, tokens of a completion side by side
    advantage [N], offsets int64 [N + 1]: completion n holds tokens offsets[n] … offsets[n + 1] − 1; N >= 1
    denominator : of the loss; as a tensor, a scalar of float64 on the same device, it may change under a CUDA graph
    ends int64 [N]: where completions do not follow upon one another: n holds offsets[n] … ends[n] − 1. What lies
        between them counts for nothing and gets gradients of 0.
    """
    return _Objective.apply(
        logprob.contiguous(),
        None if entropy is None else entropy.contiguous(),
        sampler_logprobs.contiguous(),
        None if reference is None else reference.contiguous(),
        advantage.contiguous(),
        offsets,
        denominator,
        constants,
        ends,
    )


# ---------------------------------------------------------------------------------------------------- Triton kernel


@jit
def _clamp(x, low, high):
    """Unlike tl.clamp, a NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def _kl(log_r, KL: tl.constexpr, CLAMP: tl.constexpr):
    """The estimate and its derivative with respect to the policy's log-prob."""
    x = _clamp(log_r, -CLAMP, CLAMP)
    if KL == "k1":
        value = -x
        slope = tl.full(x.shape, 1.0, x.dtype)
    elif KL == "k2":
        value = 0.5 * x * x
        slope = -x
    else:
        value = tl.exp(x) - 1.0 - x
        slope = 1.0 - tl.exp(x)
    return value, tl.where((log_r < -CLAMP) | (log_r > CLAMP), 0.0, slope)


@jit
def _ratio(log_ratio, LIMIT: tl.constexpr):
    """The ratio, and its derivative with respect to its logarithm."""
    ratio = tl.exp(_clamp(log_ratio, -LIMIT, LIMIT))
    return ratio, tl.where((log_ratio < -LIMIT) | (log_ratio > LIMIT), 0.0, ratio)


@jit
def _surrogate(ratio, adv, LOW: tl.constexpr, HIGH: tl.constexpr, TRUNCATE: tl.constexpr):
    """PPO's pessimistic objective as a loss, and its derivative with respect to the ratio."""
    clipped = _clamp(ratio, LOW, HIGH) * adv
    free = ratio * adv
    if TRUNCATE != 0.0:
        free = tl.where(ratio > TRUNCATE, TRUNCATE, ratio) * adv
    slope = tl.where(free > clipped, 0.0, -adv)  # equal: not clipped, or no advantage
    if TRUNCATE != 0.0:
        slope = tl.where(ratio > TRUNCATE, 0.0, slope)
    return -tl.where(free < clipped, free, clipped), slope


@jit
def _within(log_ratio, kept, MASK_LOW: tl.constexpr, MASK_HIGH: tl.constexpr):
    """Mask of the kept tokens that stay in the policy term."""
    within = kept
    if MASK_LOW != 0.0:
        within = within & (log_ratio >= MASK_LOW)
    if MASK_HIGH != 0.0:
        within = within & (log_ratio <= MASK_HIGH)
    return within


@jit
def _load(values, place, kept):
    """Values as float64, 0 for a token that is not kept: what it holds may be infinite."""
    return tl.load(values + place, mask=kept, other=0.0).to(tl.float64)


@jit
def _tokens(logprob, sampler_logprobs, place, end):
    """Block of tokens: which count, their log-prob, and by how much it is above the sampler's."""
    sampler = tl.load(sampler_logprobs + place, mask=place < end, other=float("nan")).to(tl.float64)
    kept = tl.abs(sampler) < float("inf")  # false for NaN too
    now = _load(logprob, place, kept)
    return kept, now, now - tl.where(kept, sampler, 0.0)


@jit
def _objective(
    logprob,
    entropy,
    sampler_logprobs,
    reference,
    advantage,
    offsets,
    ends,
    grad_logprob,
    grad_entropy,
    sums,
    peaks,
    CISPO: tl.constexpr,
    GSPO: tl.constexpr,
    RATIO_ONE: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    TRUNCATE: tl.constexpr,
    BETA: tl.constexpr,
    KL: tl.constexpr,
    KL_RATIO: tl.constexpr,
    KL_CLAMP: tl.constexpr,
    MASK_LOW: tl.constexpr,
    MASK_HIGH: tl.constexpr,
    SEQUENCE_MASK: tl.constexpr,
    BONUS: tl.constexpr,
    MAX_LOG_RATIO: tl.constexpr,
    WITH_REFERENCE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    SUM_COLUMNS: tl.constexpr,
    PEAK_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    begin, end = tl.load(offsets + n), tl.load(ends + n)
    adv = tl.load(advantage + n).to(tl.float64)
    step = tl.arange(0, BLOCK)
    zero = tl.full((), 0.0, tl.float64)
    weight = zero + 1.0
    if PER_SEQUENCE:
        weight = 1.0 / tl.maximum(end - begin, 1).to(tl.float64)

    mean_gap, spread = zero, zero  # spread: what each token's gradient gets from a ratio all share
    if GSPO or SEQUENCE_MASK:
        count, total_gap, within_count, total_kl = zero, zero, zero, zero
        for start in range(begin, end, BLOCK):
            place = start + step
            kept, now, gap = _tokens(logprob, sampler_logprobs, place, end)
            count += tl.sum(kept.to(tl.float64))
            total_gap += tl.sum(gap)
            within_count += tl.sum(_within(gap, kept, MASK_LOW, MASK_HIGH).to(tl.float64))
            if GSPO and KL_RATIO and BETA != 0.0:
                kl, _ = _kl(_load(reference, place, kept) - now, KL, KL_CLAMP)
                total_kl += tl.sum(tl.where(kept, kl, 0.0))
        mean_gap = total_gap / tl.maximum(count, 1.0)
        if SEQUENCE_MASK:
            within_count = tl.where(_within(mean_gap, count > 0.0, MASK_LOW, MASK_HIGH), count, 0.0)
        if GSPO:
            shared, shared_flow = _ratio(zero if RATIO_ONE else mean_gap, MAX_LOG_RATIO)
            _, shared_slope = _surrogate(shared, adv, LOW, HIGH, TRUNCATE)
            steep = shared_slope * within_count + BETA * total_kl
            spread = weight * shared_flow * steep / tl.maximum(count, 1.0)

    policy, kl_term, entropy_total, tokens, dropped = zero, zero, zero, zero, zero
    ratios, low, high, masked, kls, gap_error, mismatch, gaps = zero, zero, zero, zero, zero, zero, zero, zero
    top, bottom, widest = zero - float("inf"), zero - float("inf"), zero - float("inf")
    for start in range(begin, end, BLOCK):
        place = start + step
        live = place < end
        kept, now, gap = _tokens(logprob, sampler_logprobs, place, end)
        log_ratio = gap
        if RATIO_ONE:
            log_ratio = gap * 0.0
        elif GSPO:
            log_ratio = tl.where(kept, mean_gap, 0.0)
        ratio, flow = _ratio(log_ratio, MAX_LOG_RATIO)
        if SEQUENCE_MASK:
            within = _within(tl.where(kept, mean_gap, 0.0), kept, MASK_LOW, MASK_HIGH)
        else:
            within = _within(gap, kept, MASK_LOW, MASK_HIGH)

        if CISPO:
            slope = -_clamp(ratio, LOW, HIGH) * adv
            loss = slope * now
        else:
            loss, slope = _surrogate(ratio, adv, LOW, HIGH, TRUNCATE)
            slope = slope * flow
        gradient = tl.where(within, slope, 0.0)
        if GSPO:  # there it is `spread`
            gradient = tl.zeros_like(gradient)
        policy += tl.sum(tl.where(within, loss, 0.0)) * weight

        if WITH_REFERENCE:
            kl, kl_slope = _kl(_load(reference, place, kept) - now, KL, KL_CLAMP)
            kls += tl.sum(tl.where(kept, kl, 0.0))
            if BETA != 0.0:
                cost = kl
                if KL_RATIO:
                    cost = kl * ratio
                    kl_slope = kl_slope * ratio
                    if not GSPO:
                        kl_slope += kl * flow
                gradient += BETA * kl_slope
                kl_term += tl.sum(tl.where(kept, cost, 0.0)) * weight * BETA
        tl.store(grad_logprob + place, tl.where(kept, gradient * weight + spread, 0.0), mask=live)
        if WITH_ENTROPY:
            entropy_total += tl.sum(_load(entropy, place, kept))
            if BONUS != 0.0:
                tl.store(grad_entropy + place, tl.where(kept, -BONUS * weight, 0.0), mask=live)

        tokens += tl.sum(kept.to(tl.float64))
        dropped += tl.sum((live & (kept == 0)).to(tl.float64))
        ratios += tl.sum(tl.where(kept, ratio, 0.0))
        below, above = kept & (ratio < LOW), kept & (ratio > HIGH)
        side = tl.where(kept, adv, 0.0)
        if CISPO:
            below, above = below & (side != 0.0), above & (side != 0.0)
        else:  # the minimum picks the clipped branch on one side only
            below, above = below & (side < 0.0), above & (side > 0.0)
        low += tl.sum(below.to(tl.float64))
        high += tl.sum(above.to(tl.float64))
        masked += tl.sum((kept & (within == 0)).to(tl.float64))
        bounded = _clamp(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        gap_error += tl.sum(tl.where(kept, tl.exp(tl.abs(bounded)), 0.0))
        mismatch += tl.sum(tl.where(kept, tl.exp(bounded) - 1.0 - bounded, 0.0))
        gaps += tl.sum(tl.abs(gap))
        top = tl.maximum(top, tl.max(tl.where(kept, ratio, -float("inf"))))
        bottom = tl.maximum(bottom, tl.max(tl.where(kept, -ratio, -float("inf"))))
        widest = tl.maximum(widest, tl.max(tl.where(kept, tl.abs(gap), -float("inf"))))

    unknown = zero + float("nan")
    sums += n * SUM_COLUMNS
    tl.store(sums, policy)
    tl.store(sums + 1, kl_term)
    tl.store(sums + 2, -BONUS * weight * entropy_total)
    tl.store(sums + 3, tokens)
    tl.store(sums + 4, dropped)
    tl.store(sums + 5, ratios)
    tl.store(sums + 6, low)
    tl.store(sums + 7, high)
    tl.store(sums + 8, masked)
    tl.store(sums + 9, kls if WITH_REFERENCE else unknown)
    tl.store(sums + 10, entropy_total if WITH_ENTROPY else unknown)
    tl.store(sums + 11, gap_error)
    tl.store(sums + 12, mismatch)
    # a maximum passes over NaN, a sum does not
    peaks += n * PEAK_COLUMNS
    tl.store(peaks, tl.where(ratios == ratios, top, unknown))
    tl.store(peaks + 1, tl.where(ratios == ratios, bottom, unknown))
    tl.store(peaks + 2, tl.where(gaps == gaps, widest, unknown))


def _shipped() -> list[Shipped]:
    """The default loss, and gspo with everything switched on that makes it walk twice."""
    tensors = ("logprob", "entropy", "sampler_logprobs", "reference", "advantage", "grad_logprob", "grad_entropy")
    types = dict.fromkeys(tensors, "*fp32") | {"offsets": "*i64", "ends": "*i64", "sums": "*fp64", "peaks": "*fp64"}
    plain = Objective(False, False, False, False, 0.8, 1.2, 0.0, 0.04, "k3", False, 20.0, 0.0, 0.0, False, 0.0, 20.0)
    full = plain._replace(GSPO=True, PER_SEQUENCE=True, TRUNCATE=3.0, KL_RATIO=True, BONUS=0.01)
    full = full._replace(MASK_LOW=-0.7, MASK_HIGH=0.7, SEQUENCE_MASK=True)
    given = {"WITH_REFERENCE": True, "WITH_ENTROPY": True} | LAYOUT
    return [
        Shipped("objective, bnpo", _objective, types, plain._asdict() | given),
        Shipped("objective, gspo, all options", _objective, types, full._asdict() | given),
    ]


SHIPPED = _shipped()


# ------------------------------------------------------------------------------------------------- autograd wrapper


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprob: Tensor,
        entropy: Tensor | None,
        sampler_logprobs: Tensor,
        reference: Tensor | None,
        advantage: Tensor,
        offsets: Tensor,
        denominator: float | Tensor,
        constants: Objective,
        ends: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(advantage)
        fresh = torch.empty_like if ends is None else torch.zeros_like
        grad_logprob = fresh(logprob)
        grad_entropy = fresh(logprob) if entropy is not None and constants.BONUS else None
        sums = logprob.new_empty(n, len(SUMS), dtype=torch.float64)
        peaks = logprob.new_empty(n, len(PEAKS), dtype=torch.float64)
        _objective[(n,)](
            logprob,
            logprob if entropy is None else entropy,
            sampler_logprobs,
            logprob if reference is None else reference,
            advantage,
            offsets,
            offsets[1:] if ends is None else ends,
            grad_logprob,
            grad_logprob if grad_entropy is None else grad_entropy,
            sums,
            peaks,
            **constants._asdict(),
            WITH_REFERENCE=reference is not None,
            WITH_ENTROPY=entropy is not None,
            **LAYOUT,
        )
        sums = sums.sum(dim=0)
        sums[:LOSS_TERMS] /= denominator
        peaks = peaks.amax(dim=0)
        ctx.save_for_backward(grad_logprob, grad_entropy)
        ctx.denominator = denominator
        ctx.mark_non_differentiable(sums, peaks)
        return sums[:LOSS_TERMS].sum().to(logprob.dtype), sums, peaks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_logprob, grad_entropy = ctx.saved_tensors
        scale = grad / ctx.denominator
        return (
            grad_logprob * scale,
            None if grad_entropy is None else grad_entropy * scale,
            *(None,) * 7,
        )
