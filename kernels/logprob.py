"""Log-probability, entropy and log-sum-exp of chosen tokens, straight from the hidden state.

This is the boundary between kernels and readable code: everything above it (ratio, clipping, KL, loss) works on
[M] vectors. Shape letters: M packed tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A chunk of logits should stay in a core's L2 cache between the passes over it: 2**18 fp32 are 1 MiB, 634 rows at
# V = 413. Wide vocabularies get at least MIN_ROWS rows, or the matrix product would only re-read the weight.
CHUNK_ELEMENTS = 2**18
MIN_ROWS = 64
# Up to this many probabilities (64 MiB in fp32) are kept for the backward pass, more are recomputed: at M = 16,384,
# V = 413, D = 256 forward, loss and backward took 103 ms of one core with kept and 135 ms with recomputed ones.
KEEP_ELEMENTS = 2**24


class LogProb(NamedTuple):
    """What the policy said about M tokens, each [M], in float32 (float64 for float64 input).

    logprob   : log p(id)
    entropy   : of the whole distribution, in nats
    logsumexp : of the tempered logits
    """

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor


def logprob(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> LogProb:
    """Log-prob of `ids` under softmax(hidden @ weight.T / temperature), with the entropy and log-sum-exp of each row.

    hidden [M, D] and weight [V, D] of any floating dtype, ids [M] int64. Logits, sums and gradients are computed in
    float32 (float64 where an input is float64), also under autocast; a weight in 16 bits is widened once per call. All
    three results are differentiable, once, with respect to hidden and weight. Never more than a chunk of logits exists
    at a time, apart from the probabilities kept for the backward pass when M·V is small (`KEEP_ELEMENTS`).

    A logit of −inf has probability 0 and adds nothing to the entropy; a row of nothing but −inf is NaN.

    Raises ValueError when shapes do not fit or the temperature is not positive, IndexError or RuntimeError for an id
    outside 0 … V − 1.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"logprob needs hidden [M, D], weight [V, D] and ids [M]; "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(ids.shape)}"
        )
    if not temperature > 0.0:
        raise ValueError(f"logprob needs a temperature above 0; got {temperature}")
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = wanted and len(hidden) * len(weight) <= KEEP_ELEMENTS
    return LogProb(*_LogProb.apply(hidden, weight, ids, float(temperature), keep))


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(hidden, weight)
        m, v = len(hidden), len(weight)
        rows = _chunk_rows(v)
        log_p, entropy, logsumexp, peak, log_total = (hidden.new_empty(m, 1, dtype=dtype) for _ in range(5))
        kept = hidden.new_empty(m if keep else 0, v, dtype=dtype)
        scratch = hidden.new_empty(1 if keep else 2, min(rows, m), v, dtype=dtype)
        wide = weight.to(dtype)
        for start in range(0, m, rows):
            part = slice(start, min(start + rows, m))
            n = part.stop - start
            logits = _logits(hidden[part], wide, temperature, out=scratch[0, :n])
            torch.amax(logits, dim=1, keepdim=True, out=peak[part])
            logits.sub_(peak[part])
            chosen = logits.gather(1, ids[part, None])
            logits.clamp_(min=torch.finfo(dtype).min)  # so that a probability of 0 times its logit is 0, not NaN
            weights = torch.exp(logits, out=kept[part] if keep else scratch[1, :n])
            total = weights.sum(dim=1, keepdim=True)
            mean_logit = logits.mul_(weights).sum(dim=1, keepdim=True) / total
            torch.log(total, out=log_total[part])
            torch.sub(chosen, log_total[part], out=log_p[part])
            torch.sub(log_total[part], mean_logit, out=entropy[part])
            torch.add(log_total[part], peak[part], out=logsumexp[part])
            if keep:
                weights.div_(total)
        ctx.temperature, ctx.keep = temperature, keep
        ctx.save_for_backward(hidden, weight, ids, kept, entropy, peak, log_total)
        ctx.set_materialize_grads(False)
        return log_p[:, 0], entropy[:, 0], logsumexp[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # With p the probabilities and H the entropy of a row, and x the tempered logits:
        #   d logprob / dx = onehot(id) − p      d logsumexp / dx = p      d H / dx = −p (log p + H)
        hidden, weight, ids, kept, entropy, peak, log_total = ctx.saved_tensors
        dtype = entropy.dtype
        grad_chosen, grad_entropy, grad_logsumexp = (None if g is None else g[:, None] for g in grads)
        grad_chosen = torch.zeros_like(entropy) if grad_chosen is None else grad_chosen
        grad_row = -grad_chosen if grad_logsumexp is None else grad_logsumexp - grad_chosen

        m, v = len(hidden), len(weight)
        rows = _chunk_rows(v)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        scratch = hidden.new_empty(2, min(rows, m), v, dtype=dtype)
        wide = weight.to(dtype)
        for start in range(0, m, rows):
            part = slice(start, min(start + rows, m))
            n = part.stop - start
            if ctx.keep:
                p = kept[part]
            else:
                p = _logits(hidden[part], wide, ctx.temperature, out=scratch[0, :n])
                # not x − logsumexp: beside a logit of 1e4 fp32 has lost the digits of log 2
                p.sub_(peak[part]).sub_(log_total[part]).exp_()
            grad_logits = torch.mul(p, grad_row[part], out=scratch[1, :n])
            if grad_entropy is not None:
                slope = torch.special.xlogy(p, p).addcmul_(p, entropy[part])
                grad_logits.addcmul_(slope, grad_entropy[part], value=-1.0)
            chosen = ids[part, None]  # gather and scatter: scatter_add_ has no deterministic form on a GPU
            grad_logits.scatter_(1, chosen, grad_logits.gather(1, chosen) + grad_chosen[part])
            if grad_hidden is not None:
                torch.mm(grad_logits, wide, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[part].to(dtype))
        if grad_hidden is not None:
            grad_hidden = grad_hidden.div_(ctx.temperature).to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.div_(ctx.temperature).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float, out: Tensor) -> Tensor:
    """hidden @ weight.T / temperature into `out`, in weight's dtype: autocast leaves operations with `out` alone."""
    torch.mm(hidden.to(weight.dtype), weight.t(), out=out)
    return out if temperature == 1.0 else out.div_(temperature)


def _chunk_rows(vocabulary: int) -> int:
    return max(MIN_ROWS, CHUNK_ELEMENTS // vocabulary)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
