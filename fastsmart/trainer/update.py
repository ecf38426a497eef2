"""One optimizer batch: the policy's log-probs, the loss, the step.

Shape letters: N completions, B completions of a micro-batch, T tokens of a row, M completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from fastsmart.policy.optimizer import set_learning_rate
from fastsmart.policy.transformer import Policy
from fastsmart.run.trace import Trace
from fastsmart.sampling.rollout import Rollout


@dataclass(frozen=True)
class Update:
    """What an optimizer step did.

    stats         : loss terms, means over tokens and the KL a completion, by name (see `LossStats.means`)
    grad_norm     : before clipping
    learning_rate : of this step
    skipped       : whether the gradient was not finite and the weights have been left as they were
    """

    stats: dict[str, float]
    grad_norm: float
    learning_rate: float
    skipped: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """B completions of a rollout, with their tokens packed.

    rows     : int64 [B, T], prompt and completion, padded on the right; the last token is no input and left out
    gather_index : int64 [M], place in the flattened [B, T] that predicts each completion token
    ids      : int64 [M]
    sequence : int64 [M], row of each token
    offsets  : int64 [B + 1], the tokens of row b are offsets[b] … offsets[b + 1] − 1
    sampler_logprobs : float32 [M]
    completions : int64 [B], number in the rollout of each row
    lengths  : int64 [B], completion tokens of each row
    """

    rows: Tensor
    gather_index: Tensor
    ids: Tensor
    sequence: Tensor
    offsets: Tensor
    sampler_logprobs: Tensor
    completions: Tensor
    lengths: Tensor


def micro_batches(rollout: Rollout, size: int, device: torch.device) -> Iterator[MicroBatch]:
    """The rollout in micro-batches of `size` completions of like length, longest first, so that little is padding."""
    total = rollout.prompt_lengths + rollout.lengths
    order = np.argsort(-total, kind="stable")
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = int(total[chosen].max()) - 1
        rows = np.zeros((len(chosen), width), np.int64)
        for row, i in zip(rows, chosen, strict=True):
            row[: total[i] - 1] = rollout.sequence(int(i))[:-1]
        lengths = rollout.lengths[chosen].astype(np.int64)
        sequence = np.repeat(np.arange(len(chosen)), lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        step = np.arange(len(sequence)) - offsets[sequence]
        gather_index = sequence * width + rollout.prompt_lengths[chosen][sequence] - 1 + step
        ids, sampler_logprobs = rollout.ids[chosen][sequence, step], rollout.logprobs[chosen][sequence, step]
        yield MicroBatch(
            rows=torch.from_numpy(rows).to(device),
            gather_index=torch.from_numpy(gather_index).to(device),
            ids=torch.from_numpy(ids.astype(np.int64)).to(device),
            sequence=torch.from_numpy(sequence).to(device),
            offsets=torch.from_numpy(offsets).to(device),
            sampler_logprobs=torch.from_numpy(sampler_logprobs).to(device),
            completions=torch.from_numpy(chosen),
            lengths=torch.from_numpy(lengths),
        )


@record_function("forward")
def completion_logprobs(
    policy: Policy, batch: MicroBatch, temperature: float, dtype: torch.dtype, kernel: str = "auto"
) -> LogProb:
    """Log-prob, entropy and log-sum-exp of every completion token of a micro-batch, [M] each."""
    device = batch.rows.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = policy.hidden(batch.rows)
    picked = hidden.flatten(0, 1).index_select(0, batch.gather_index).float()
    return logprob(picked, policy.lm_head.weight, batch.ids, temperature, kernel)


@record_function("reference")
@torch.no_grad()
def reference_logprobs(
    reference: Policy, batches: Sequence[MicroBatch], temperature: float, dtype: torch.dtype, kernel: str = "auto"
) -> list[Tensor]:
    """Log-probs [M] of each micro-batch under the reference policy."""
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

    A gradient that is not finite changes nothing (`Update.skipped`). Raises UserError when the new weights are no
    longer finite; a run then goes on from its last checkpoint.
    """
    kernel = choose_kernel(settings.kernel, policy.device)
    ranks, trace = ranks or Ranks(), trace or Trace()
    lengths = torch.cat([batch.lengths for batch in batches]) if lengths is None else lengths
    denominator = loss_denominator(lengths, settings)
    policy.train()
    total: LossStats | None = None
    for batch, ref_logprob in zip(batches, ref_logprobs, strict=True):
        ours = completion_logprobs(policy, batch, temperature, dtype, kernel)
        entropy = ours.entropy if settings.entropy_bonus else ours.entropy.detach()
        batch_advantage = advantage[batch.completions].to(policy.device)
        given = (ours.logprob, batch.sampler_logprobs, ref_logprob, batch_advantage)
        if kernel == "triton":
            loss, stats = fused_policy_loss(*given, batch.offsets, settings, denominator, entropy)
        else:
            loss, stats = policy_loss(*given, batch.sequence, settings, denominator, entropy)
        loss.backward()
        total = stats if total is None else total.merge(stats)
    assert total is not None  # a rollout holds at least one completion
    with trace("reduce"):
        ranks.all_reduce_gradients(policy.parameters())
        total = over_ranks(total, ranks)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    skipped = not bool(grad_norm.isfinite())
    if not skipped:
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        if not torch.stack([p.detach().sum() for p in policy.parameters()]).isfinite().all():
            raise UserError("the weights are no longer finite; lower train.learning_rate and start again")
    optimizer.zero_grad(set_to_none=True)
    policy.eval()
    return Update(total.means(len(lengths)), float(grad_norm), learning_rate, skipped)


def over_ranks(stats: LossStats, ranks: Ranks) -> LossStats:
    """The statistics of all ranks' micro-batches."""
    if ranks.world == 1:
        return stats
    sums = len(stats.sums)
    rows = ranks.gather(torch.cat([stats.sums, stats.peaks]).cpu().numpy()[None], ranks.world)
    return LossStats(torch.from_numpy(rows[:, :sums].sum(0)), torch.from_numpy(rows[:, sums:].max(0)))
