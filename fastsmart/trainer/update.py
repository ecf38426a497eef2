"""One optimizer batch: the policy's log-probs, the loss, the step, and the line of metrics about it.

Shape letters: N completions, B completions of a micro-batch, T tokens of a row, M completion tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from fastsmart.errors import UserError
from fastsmart.grpo.fused import fused_policy_loss
from fastsmart.grpo.losses import LossStats, loss_denominator, policy_loss
from fastsmart.grpo.settings import LossSettings
from fastsmart.kernels.jit import choose_kernel
from fastsmart.kernels.logprob import LogProb, logprob
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.optimizer import set_learning_rate, step_if_finite
from fastsmart.policy.transformer import Policy
from fastsmart.reward.constraints import Constraint, share_met
from fastsmart.run.trace import Trace
from fastsmart.trainer.batch import Batch, MicroBatch, uploaded
from fastsmart.trainer.recorded import passes_of


@dataclass(frozen=True)
class Update:
    """Result of an optimizer step.

    stats         : loss terms, means over tokens and the KL a completion, by name (see `LossStats.means`)
    grad_norm     : before clipping
    learning_rate : of this step
    skipped       : whether the gradient was not finite and the weights have been left as they were
    """

    stats: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool = False

    def mismatch(self, limit: float) -> bool:
        """Whether sampler and trainer disagreed beyond the limit, for a batch that the policy itself has drawn."""
        error = self.stats["token_mult_prob_error"]
        empty = math.isnan(error) and not self.stats["tokens"]  # NaN also where there were no tokens
        return not error <= limit and not empty


def metrics(step: int, batch: Batch, advantage: torch.Tensor, change: Update) -> dict[str, Any]:
    """Line of metrics of a step, about its batch and its update; `step` counts from 1."""
    scores = batch.scores
    met = scores.terms.get(Constraint.name)
    return {
        "step": step,
        "reward": known_mean(scores.total),
        "terms": {name: known_mean(values) for name, values in scores.terms.items()},
        **({} if met is None else {"constraints_met": share_met(met)}),
        "notes": float(batch.notes.mean()),
        "empty": int((batch.notes == 0).sum()),
        "unscored": int(np.isnan(scores.total).sum()),
        "idle_completions": int((advantage == 0).sum()),
        "completion_tokens": float(batch.lengths.mean()),
        "staleness": step - 1 - batch.version,
        "skipped": change.skipped,
        "grad_norm": change.grad_norm,
        "learning_rate": change.learning_rate,
        **change.stats,
    }


def known_mean(values: np.ndarray) -> float:
    """Mean of what could be scored; NaN where nothing could."""
    known = np.isfinite(values)
    return float(np.mean(values, where=known, dtype=np.float64)) if known.any() else math.nan


@record_function("forward")
def completion_logprobs(
    policy: Policy, batch: MicroBatch, temperature: float, dtype: torch.dtype, kernel: str = "auto"
) -> LogProb:
    """Log-prob, entropy and log-sum-exp of every completion token of a micro-batch, [M] each."""
    picked = completion_states(policy, batch, temperature, dtype, kernel)
    return logprob(picked, policy.lm_head.weight, batch.ids, temperature, kernel)


def completion_states(
    policy: Policy, batch: MicroBatch, temperature: float, dtype: torch.dtype, kernel: str = "auto"
) -> Tensor:
    """Hidden states float32 [M, D] that predict every completion token of a micro-batch."""
    device = batch.rows.device
    if fused(device, dtype, kernel):
        cast = passes_of(policy, dtype, temperature, kernel).cast
        cast.refresh()
        hidden = cast.hidden(batch.rows)
    else:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = policy.hidden(batch.rows)
    return hidden.flatten(0, 1).index_select(0, batch.gather_index).float()


def fused(device: torch.device, dtype: torch.dtype, kernel: str) -> bool:
    """Whether passes are those of `fastsmart.trainer.recorded`: on a GPU, in 16 bit, by kernels of Triton."""
    return device.type == "cuda" and dtype != torch.float32 and choose_kernel(kernel, device) == "triton"


@record_function("reference")
@torch.no_grad()
def reference_logprobs(
    reference: Policy, batches: Sequence[MicroBatch], temperature: float, dtype: torch.dtype, kernel: str = "auto"
) -> list[Tensor]:
    """Log-probs [M] of each micro-batch under the reference policy."""
    if fused(reference.device, dtype, kernel):
        passes = passes_of(reference, dtype, temperature, kernel)
        return [passes.logprobs(batch) for batch in batches]
    return [completion_logprobs(reference, batch, temperature, dtype, kernel).logprob for batch in batches]


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    ref_logprobs: Sequence[Tensor],
    advantage: Tensor,
    settings: LossSettings,
    *,
    temperature: float,
    learning_rate: float,
    max_grad_norm: float,
    dtype: torch.dtype = torch.float32,
    lengths: Tensor | None = None,
    ranks: Ranks | None = None,
    trace: Trace | None = None,
) -> Update:
    """One optimizer step on a rollout, its gradient accumulated over micro-batches and ranks.

    ref_logprobs : `reference_logprobs` of the micro-batches
    advantage : float32 [N], by number in the rollout
    lengths   : int64, completion tokens of each completion of all ranks; None = those of the micro-batches
    ranks     : over which gradients and statistics are added up
    trace     : counts that as "reduce"

    Nothing waits for the device before the end of the step. A gradient that is not finite changes nothing
    (`Update.skipped`). Raises UserError when the new weights are no longer finite; a run then goes on from its last
    checkpoint.
    """
    kernel = choose_kernel(settings.kernel, policy.device)
    ranks, trace = ranks or Ranks(), trace or Trace()
    lengths = torch.cat([batch.lengths for batch in batches]) if lengths is None else lengths
    denominator = loss_denominator(lengths, settings)
    recorded = fused(policy.device, dtype, kernel)
    policy.train()
    total: LossStats | None = None
    for batch, ref_logprob in zip(batches, ref_logprobs, strict=True):
        batch_advantage = uploaded(advantage[batch.completions], policy.device)
        if recorded:
            passes = passes_of(policy, dtype, temperature, kernel)
            given = (batch, ref_logprob, batch_advantage, settings, denominator)
            stats = passes.add_gradients(*given, alone=len(batches) == 1)
        else:
            ours = completion_logprobs(policy, batch, temperature, dtype, kernel)
            entropy = ours.entropy if settings.entropy_bonus else ours.entropy.detach()
            logprobs = (ours.logprob, batch.sampler_logprobs, ref_logprob, batch_advantage)
            if kernel == "triton":
                loss, stats = fused_policy_loss(*logprobs, batch.offsets, settings, denominator, entropy)
            else:
                loss, stats = policy_loss(*logprobs, batch.sequence, settings, denominator, entropy)
            loss.backward()
        total = stats if total is None else total.merge(stats)
    assert total is not None  # a rollout holds at least one completion
    sums, peaks, change = step_on_gradients(
        policy, optimizer, total.sums, total.peaks, learning_rate, max_grad_norm, ranks, trace
    )
    of_all = LossStats(torch.from_numpy(sums), torch.from_numpy(peaks))
    return replace(change, stats=of_all.means(len(lengths)))


def step_on_gradients(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    sums: Tensor,
    peaks: Tensor,
    learning_rate: float,
    max_grad_norm: float,
    ranks: Ranks,
    trace: Trace,
) -> tuple[np.ndarray, np.ndarray, Update]:
    """One optimizer step on the gradients that the policy's parameters hold, added up over the ranks, which drops them.

    sums, peaks : float64 [K] and [L], statistics of this rank

    Gives the sums [K] and the maxima [L] over all ranks, and the update without `stats`. A rank that had nothing to
    learn from holds no gradients, which count as zeros. Raises UserError as `update` does.
    """
    for parameter in policy.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with trace("reduce"):
        ranks.all_reduce_gradients(policy.parameters())
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    set_learning_rate(optimizer, learning_rate)
    step_if_finite(optimizer, grad_norm)
    largest = torch.stack(torch._foreach_norm([p.detach() for p in policy.parameters()], math.inf)).amax()
    optimizer.zero_grad(set_to_none=True)
    policy.eval()
    numbers = torch.cat([sums, peaks, torch.stack([grad_norm.double(), largest.double()])])
    *mine, norm, top = numbers.tolist()  # the step's only wait for the device
    with trace("reduce"):
        of_all = ranks.gather(np.array([mine], np.float64), ranks.world)
    if not math.isfinite(top):
        raise UserError("the weights are no longer finite; lower train.learning_rate and start again")
    change = Update({}, norm, learning_rate, not math.isfinite(norm))
    return of_all[:, : len(sums)].sum(0), of_all[:, len(sums) :].max(0), change
