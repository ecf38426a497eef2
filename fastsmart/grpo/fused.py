"""`policy_loss` by one Triton kernel: the same numbers for tokens packed completion by completion."""

from __future__ import annotations

import math

from torch import Tensor

from fastsmart.grpo.losses import LossStats
from fastsmart.grpo.settings import MAX_LOG_RATIO, LossSettings
from fastsmart.kernels.grpo import Objective, objective


def fused_policy_loss(
    logprob: Tensor,
    sampler_logprobs: Tensor,
    reference: Tensor | None,
    advantage: Tensor,
    offsets: Tensor,
    settings: LossSettings,
    denominator: float | Tensor,
    entropy: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """One micro-batch's share of the loss and its statistics, as `policy_loss` defines them.

    offsets int64 [N + 1]: completion n holds tokens offsets[n] … offsets[n + 1] − 1, or, with `ends` int64 [N],
    offsets[n] … ends[n] − 1 and what lies between counts for nothing. The denominator may be a float64 scalar on the
    tensors' device. All else as for `policy_loss`.

    Raises ValueError when settings ask for a KL or entropy term and its input is None.
    """
    if settings.beta and reference is None:
        raise ValueError("fused_policy_loss needs reference log-probs when beta is above 0")
    if settings.entropy_bonus and entropy is None:
        raise ValueError("fused_policy_loss needs the entropy when entropy_bonus is above 0")
    loss, sums, peaks = objective(
        logprob, sampler_logprobs, reference, entropy, advantage, offsets, denominator, _constants(settings), ends
    )
    return loss, LossStats(sums, peaks)


def _constants(settings: LossSettings) -> Objective:
    return Objective(
        CISPO=settings.loss == "cispo",
        GSPO=settings.loss == "gspo",
        RATIO_ONE=settings.ratio == "one",
        PER_SEQUENCE=settings.per_sequence,
        LOW=1.0 - settings.clip_low,
        HIGH=1.0 + settings.clip_high,
        TRUNCATE=settings.truncate,
        BETA=settings.beta,
        KL=settings.kl,
        KL_RATIO=settings.kl_ratio,
        KL_CLAMP=settings.kl_clamp,
        MASK_LOW=math.log(settings.mask_low) if settings.mask_low else 0.0,
        MASK_HIGH=math.log(settings.mask_high) if settings.mask_high else 0.0,
        SEQUENCE_MASK=settings.mask_level == "sequence" and bool(settings.mask_low or settings.mask_high),
        BONUS=settings.entropy_bonus,
        MAX_LOG_RATIO=MAX_LOG_RATIO,
    )
