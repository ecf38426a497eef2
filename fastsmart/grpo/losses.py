"""The policy losses of the GRPO family over packed tokens, with the statistics that tell whether they are healthy.

Shape letters: M completion tokens of a micro-batch, N completions. A micro-batch holds whole completions only, so the
length of each is counted from `sequence`. Every loss is a sum over tokens divided by ONE denominator of the whole
optimizer batch (`loss_denominator`): summed over micro-batches and ranks it is the loss of the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsmart.grpo.kl import k3, kl_divergence
from fastsmart.grpo.settings import MAX_LOG_RATIO, LossSettings


@dataclass(frozen=True)
class LossStats:
    """Statistics of one or more micro-batches on the loss's device; nothing waits for the device before `means`.

    sums  : float64 [len(TOTALS + MEANS)], add over micro-batches and ranks
    peaks : float64 [len(PEAKS)], take the maximum over micro-batches and ranks
    """

    sums: Tensor
    peaks: Tensor

    TOTALS = ("policy_loss", "kl_loss", "entropy_loss", "tokens", "dropped")
    MEANS = ("ratio", "clipped_low", "clipped_high", "masked", "kl", "entropy", "token_mult_prob_error", "mismatch_k3")
    PEAKS = ("ratio_max", "negative_ratio_min", "logprob_gap_max")

    @staticmethod
    @torch.no_grad()
    def of(
        kept: Tensor, totals: dict[str, Tensor], means: dict[str, Tensor | None], peaks: dict[str, Tensor]
    ) -> LossStats:
        """Sum those of one micro-batch: scalars and [M] values by name; `kept` bool [M]: the tokens that count."""
        totals = totals | {"tokens": kept.sum(), "dropped": (~kept).sum()}
        unknown = torch.full((), math.nan, dtype=torch.float64, device=kept.device)
        none = torch.full((1,), -math.inf, dtype=torch.float64, device=kept.device)  # the maximum of no tokens

        def total(x: Tensor | None) -> Tensor:
            return unknown if x is None else torch.where(kept, x.double(), 0.0).sum()

        sums = [totals[name].double() for name in LossStats.TOTALS] + [total(means[name]) for name in LossStats.MEANS]
        tops = [
            torch.cat([none, torch.where(kept, peaks[name].double(), -math.inf)]).amax() for name in LossStats.PEAKS
        ]
        return LossStats(torch.stack(sums), torch.stack(tops))

    def merge(self, other: LossStats) -> LossStats:
        """The statistics of both."""
        return LossStats(self.sums + other.sums, torch.maximum(self.peaks, other.peaks))

    def means(self, completions: int | None = None) -> dict[str, float]:
        """Plain numbers by name.

        completions: of the whole optimizer batch, all micro-batches and all ranks; needed for `kl_per_completion` only.

        loss = policy_loss + kl_loss + entropy_loss, each with its weight and the batch's denominator;
        tokens, dropped: completion tokens in the loss, and those left out for a sampler log-prob that is not finite.
        Means over the tokens in the loss (NaN where there are none, or what they need was not given):
        ratio, ratio_min, ratio_max: the ratio the loss uses, before clipping, truncation and masking;
        clipped_low, clipped_high, masked: shares of tokens the clip or the mask acts on;
        kl: the estimate of KL(policy ‖ reference), without beta; entropy: nats;
        token_mult_prob_error: exp |policy − sampler log-prob|, above 1.05 the two disagree (NeMo-RL's metric);
        mismatch_k3: k3 estimate of KL(sampler ‖ policy); logprob_gap_max: largest |policy − sampler log-prob|.
        kl_per_completion: nats a piece, the token estimates of `kl` summed over each completion, then the mean over
        completions. By the chain rule of the KL that is an estimate of the KL of whole completions, which the mean over
        tokens is not: pieces get longer and shorter in training.
        """
        sums = dict(zip(self.TOTALS + self.MEANS, self.sums.tolist(), strict=True))
        tokens = sums["tokens"]
        ratio_max, negative_ratio_min, gap_max = self.peaks.tolist() if tokens else [math.nan] * 3
        result = {name: sums[name] for name in self.TOTALS}
        result["loss"] = sums["policy_loss"] + sums["kl_loss"] + sums["entropy_loss"]
        result |= {name: sums[name] / tokens if tokens else math.nan for name in self.MEANS}
        if completions is not None:
            result["kl_per_completion"] = sums["kl"] / completions if tokens else math.nan
        return result | {"ratio_min": -negative_ratio_min, "ratio_max": ratio_max, "logprob_gap_max": gap_max}


def loss_denominator(lengths: Tensor, settings: LossSettings) -> float:
    """Divisor of the token sum of the whole optimizer batch, all micro-batches and all ranks.

    lengths [N]: completion tokens of each completion of that batch. Number of completions for grpo and gspo,
    completions × max_tokens for dr_grpo, tokens for the others; never below 1. A token dropped from the loss still
    counts here and in its completion's length: the others keep their weight.
    """
    if settings.per_sequence:
        return max(1.0, float(len(lengths)))
    if settings.loss == "dr_grpo":
        return max(1.0, float(len(lengths)) * settings.max_tokens)
    return max(1.0, float(sum(lengths.tolist())))  # a sum of PyTorch would be waited for


def clipped_surrogate(ratio: Tensor, logprob: Tensor, advantage: Tensor, settings: LossSettings) -> Tensor:
    """PPO's pessimistic objective as a loss (arXiv 1707.06347, eq. 7), truncated if asked; [M], logprob not used."""
    clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    if settings.truncate:
        ratio = ratio.clamp(max=settings.truncate)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def cispo_surrogate(ratio: Tensor, logprob: Tensor, advantage: Tensor, settings: LossSettings) -> Tensor:
    """REINFORCE weighted by the clipped ratio as a constant (arXiv 2506.13585, eq. 4); all [M]."""
    return -ratio.detach().clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high) * advantage * logprob


def policy_loss(
    logprob: Tensor,
    sampler_logprobs: Tensor,
    reference: Tensor | None,
    advantage: Tensor,
    sequence: Tensor,
    settings: LossSettings,
    denominator: float,
    entropy: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """One micro-batch's share of the loss, a scalar to call backward on, and its statistics.

    logprob   [M]: of the sampled tokens under the policy, with gradient
    sampler_logprobs [M]: under the distribution they were sampled from; a token where it is not finite is dropped and
                   counted
    reference [M]: under the reference policy, or None without KL; with beta = 0 the KL is measured only
    advantage [N], sequence int64 [M]: token m belongs to completion sequence[m]; any order, but whole completions
    denominator  : `loss_denominator` of the whole optimizer batch. Add gradients over micro-batches and ranks (where
                   DDP averages them, multiply the loss by the number of ranks)
    entropy   [M]: of the policy, for the bonus and the statistics

    Raises ValueError when settings ask for a KL or entropy term and its input is None.
    """
    if settings.beta and reference is None:
        raise ValueError("policy_loss needs reference log-probs when beta is above 0")
    if settings.entropy_bonus and entropy is None:
        raise ValueError("policy_loss needs the entropy when entropy_bonus is above 0")
    kept = sampler_logprobs.isfinite()
    # zeros now, not a mask at the end: what a dropped token holds may be infinite, and 0 · inf is NaN, in gradients too
    logprob, sampler_logprobs = torch.where(kept, logprob, 0.0), torch.where(kept, sampler_logprobs, 0.0)
    gap = logprob - sampler_logprobs  # of policy and sampler
    log_ratio = gap if settings.ratio == "behaviour" else logprob - logprob.detach()
    if settings.loss == "gspo":
        log_ratio = _sequence_mean(log_ratio, kept, sequence, len(advantage))
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    token_advantage = advantage.to(logprob.dtype)[sequence]

    weight = kept.to(logprob.dtype) / denominator
    if settings.per_sequence:
        weight = weight / _sequence_sum(torch.ones_like(logprob), sequence, len(advantage))[sequence]
    inside = _inside_mask(gap.detach(), kept, sequence, len(advantage), settings)
    surrogate = cispo_surrogate if settings.loss == "cispo" else clipped_surrogate
    policy_term = (torch.where(inside, surrogate(ratio, logprob, token_advantage, settings), 0.0) * weight).sum()

    kl_term = entropy_term = torch.zeros_like(policy_term)
    kl = None
    if reference is not None:
        reference = torch.where(kept, reference, 0.0)
        kl = kl_divergence(logprob if settings.beta else logprob.detach(), reference, settings.kl, settings.kl_clamp)
    if settings.beta and kl is not None:
        kl_term = settings.beta * ((kl * ratio if settings.kl_ratio else kl) * weight).sum()
    if settings.entropy_bonus and entropy is not None:
        entropy_term = -settings.entropy_bonus * (torch.where(kept, entropy, 0.0) * weight).sum()

    stats = LossStats.of(
        kept,
        totals={"policy_loss": policy_term, "kl_loss": kl_term, "entropy_loss": entropy_term},
        means={"masked": ~inside, "kl": kl, "entropy": entropy, **_ratio_means(ratio, gap, token_advantage, settings)},
        peaks={"ratio_max": ratio, "negative_ratio_min": -ratio, "logprob_gap_max": gap.abs()},
    )
    return policy_term + kl_term + entropy_term, stats


@torch.no_grad()
def _ratio_means(ratio: Tensor, gap: Tensor, advantage: Tensor, settings: LossSettings) -> dict[str, Tensor]:
    """Those of `LossStats.MEANS` that come of the ratio, and of the gap of policy and sampler; [M] each."""
    low, high = ratio < 1.0 - settings.clip_low, ratio > 1.0 + settings.clip_high
    if settings.loss == "cispo":
        low, high = low & (advantage != 0), high & (advantage != 0)
    else:  # the minimum picks the clipped branch on one side only
        low, high = low & (advantage < 0), high & (advantage > 0)
    gap = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    means = {"ratio": ratio, "clipped_low": low, "clipped_high": high}
    return means | {"token_mult_prob_error": gap.abs().exp(), "mismatch_k3": k3(gap)}


def _inside_mask(gap: Tensor, kept: Tensor, sequence: Tensor, sequences: int, settings: LossSettings) -> Tensor:
    """Mask of the tokens that stay in the policy term, bool [M]."""
    if settings.mask_level == "sequence":
        gap = _sequence_mean(gap, kept, sequence, sequences)
    inside = torch.ones_like(kept)
    if settings.mask_low:
        inside &= gap >= math.log(settings.mask_low)
    if settings.mask_high:
        inside &= gap <= math.log(settings.mask_high)
    return inside


def _sequence_mean(x: Tensor, kept: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """The mean of x over the kept tokens of each completion, given to each of its tokens; x is 0 where not kept."""
    count = _sequence_sum(kept.to(x.dtype), sequence, sequences).clamp(min=1.0)
    return (_sequence_sum(x, sequence, sequences) / count)[sequence]


def _sequence_sum(x: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    return torch.zeros(sequences, dtype=x.dtype, device=x.device).index_add(0, sequence, x)
