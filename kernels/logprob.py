"""Log-probability, entropy and log-sum-exp of chosen tokens, straight from the hidden state.

This is the boundary between kernels and readable code: everything above it (ratio, clipping, KL, loss) works on
[M] vectors. Shape letters: M packed tokens, R tokens of a chunk, D hidden width, V vocabulary.

A chunk of logits is made in fp32 by the BLAS, reduced to four numbers a row, and
forgotten; for the backward pass it is kept (M·V small) or made again. A wide vocabulary on a CPU is cut the other way
(kernels/logprob_tiles.py). What that costs at least, on paper, on a GPU with
fp32 products at 50 TFLOP/s and 3.3 TB/s, for M = 8,192 and D = 512. V = 413: three products of 3.5 GFLOP, 208 µs, and
13.5 MB of logits, written once and read by each row kernel, and their gradient, written once and read by two products:
81 MB, 25 µs. Products and softmax in one kernel could save at most those 25 of 233 µs, hence the two row kernels of
kernels/logprob_rows.py. V = 151,936: four products, 102 ms; the row kernels move 15 GB, 4.5 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsmart.kernels.jit import choose_kernel
from fastsmart.kernels.logprob_rows import Rows, Slopes, rows_backward, rows_forward, triton_backward, triton_forward
from fastsmart.kernels.logprob_tiles import tiles_backward, tiles_forward

# CPU: a chunk of logits should stay in a core's L2 cache between the passes over it: 2**18 fp32 are 1 MiB, 634 rows at
# V = 413. From WIDE tokens on a chunk would have too few rows for a good product, and tiles of columns take its place.
CHUNK_ELEMENTS = 2**18
WIDE = 4096
MIN_ROWS = 64  # of a chunk, also where few rows of a wide vocabulary fit: the product would only re-read the weight
# GPU: 256 MiB, 441 rows at V = 151,936, enough for a product bound by arithmetic; and 32-bit offsets reach all of it.
GPU_CHUNK_ELEMENTS = 2**26
# Up to this many probabilities (64 MiB in fp32) are kept for the backward pass, more are recomputed: at M = 16,384,
# V = 413, D = 256 forward, loss and backward took 103 ms of one core with kept and 135 ms with recomputed ones.
KEEP_ELEMENTS = 2**24


class LogProb(NamedTuple):
    """Log-prob, entropy and normaliser of M tokens, each [M], in float32 (float64 for float64 input).

    logprob   : log p(id)
    entropy   : of the whole distribution, in nats
    logsumexp : of the tempered logits
    """

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor


def logprob(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, kernel: str = "auto") -> LogProb:
    """Log-prob of `ids` under softmax(hidden @ weight.T / temperature), with the entropy and log-sum-exp of each row.

    hidden [M, D] and weight [V, D] of any floating dtype, ids [M] int64. Logits, sums and gradients are computed in
    float32 (float64 where an input is float64), also under autocast; a weight in 16 bits is widened first. All
    three results are differentiable, once, with respect to hidden and weight. Never more than a chunk of logits exists
    at a time, apart from those kept for the backward pass when M·V is small (`KEEP_ELEMENTS`; none on a CPU from `WIDE`
    tokens on).

    A logit of −inf has probability 0 and adds nothing to the entropy; a row of nothing but −inf is NaN. `kernel`:
    "torch", "triton", or "auto" = Triton on a GPU.

    Raises ValueError when shapes do not fit or the temperature is not positive; IndexError or RuntimeError for an id
    outside 0 … V − 1, whose log-prob is NaN with Triton; UserError when Triton is asked for and cannot run.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"logprob needs hidden [M, D], weight [V, D] and ids [M]; "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(ids.shape)}"
        )
    if not temperature > 0.0:
        raise ValueError(f"logprob needs a temperature above 0; got {temperature}")
    passes = _PASSES[choose_kernel(kernel, hidden.device)]
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    tiled = passes.forward is rows_forward and hidden.device.type == "cpu" and len(weight) >= WIDE
    keep = wanted and not tiled and len(hidden) * len(weight) <= KEEP_ELEMENTS
    given = hidden, weight, ids.contiguous(), float(temperature)
    return LogProb(*(_TiledLogProb.apply(*given) if tiled else _LogProb.apply(*given, keep, passes)))


class _Passes(NamedTuple):
    """The two passes over a chunk.

    in_place : what they keep for the backward pass is the logits themselves
    multiple : rows of logits are padded with zeros to a multiple of it, for products that load 16 bytes at a time
    """

    forward: Callable[[Tensor, Tensor, Tensor, float, Rows, bool], None]
    backward: Callable[[Tensor, Tensor, Tensor, float, Rows, Slopes, bool], None]
    in_place: bool
    multiple: int


_PASSES = {
    "torch": _Passes(rows_forward, rows_backward, in_place=False, multiple=1),
    "triton": _Passes(triton_forward, triton_backward, in_place=True, multiple=16),
}


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, keep: bool, passes: _Passes
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(hidden, weight)
        m, v = len(hidden), len(weight)
        size = _chunk_rows(v, hidden.device)
        rows = Rows(*(hidden.new_empty(m, 1, dtype=dtype) for _ in Rows._fields))
        wide = _padded(weight.to(dtype), passes.multiple)
        kept = hidden.new_empty(m if keep else 0, len(wide), dtype=dtype)
        scratch = hidden.new_empty(2 - keep - passes.in_place, min(size, m), len(wide), dtype=dtype)
        for start in range(0, m, size):
            part = slice(start, min(start + size, m))
            n = part.stop - start
            work = kept[part] if keep else scratch[-1, :n]
            logits = work if passes.in_place else scratch[0, :n]
            torch.mm(hidden[part].to(dtype), wide.t(), out=logits)  # autocast leaves operations with `out` alone
            passes.forward(logits[:, :v], work[:, :v], ids[part], temperature, rows.part(part), keep)
        ctx.temperature, ctx.keep, ctx.passes = temperature, keep, passes
        ctx.save_for_backward(hidden, weight, ids, kept, *rows)
        ctx.set_materialize_grads(False)
        return rows.logprob[:, 0], rows.entropy[:, 0], (rows.peak + rows.log_total)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, kept, *saved = ctx.saved_tensors
        rows = Rows(*saved)
        dtype, passes = rows.entropy.dtype, ctx.passes
        slopes = _slopes(grads, rows.entropy)
        m, v = len(hidden), len(weight)
        size = _chunk_rows(v, hidden.device)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden, dtype=dtype) if want_hidden else None
        wide = _padded(weight.to(dtype), passes.multiple)
        grad_weight = torch.zeros_like(wide) if want_weight else None
        scratch = hidden.new_empty(1 if ctx.keep or passes.in_place else 2, min(size, m), len(wide), dtype=dtype)
        for start in range(0, m, size):
            part = slice(start, min(start + size, m))
            n = part.stop - start
            grad_logits = scratch[0, :n]
            work = kept[part] if ctx.keep else scratch[-1, :n]
            if not ctx.keep:
                torch.mm(hidden[part].to(dtype), wide.t(), out=work)
            given = (ids[part], ctx.temperature, rows.part(part), slopes.part(part), ctx.keep)
            passes.backward(work[:, :v], grad_logits[:, :v], *given)
            if grad_hidden is not None:
                torch.mm(grad_logits, wide, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[part].to(dtype))
        grads_of = grad_hidden, None if grad_weight is None else grad_weight[:v]
        return *_finished(grads_of, (hidden, weight), ctx.temperature), None, None, None, None


class _TiledLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(hidden, weight)
        rows = Rows(*(hidden.new_empty(len(hidden), 1, dtype=dtype) for _ in Rows._fields))
        tiles_forward(hidden, weight, ids, temperature, rows)
        ctx.temperature = temperature
        ctx.save_for_backward(hidden, weight, ids, *rows)
        ctx.set_materialize_grads(False)
        return rows.logprob[:, 0], rows.entropy[:, 0], (rows.peak + rows.log_total)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, *saved = ctx.saved_tensors
        rows = Rows(*saved)
        given = ids, ctx.temperature, rows, _slopes(grads, rows.entropy), ctx.needs_input_grad[:2]
        return *_finished(tiles_backward(hidden, weight, *given), (hidden, weight), ctx.temperature), None, None


def _finished(grads: tuple[Tensor | None, ...], like: tuple[Tensor, ...], temperature: float) -> list[Tensor | None]:
    """Gradients of the tempered logits as those of what came in, in its dtype."""
    if temperature != 1.0:
        _ = [g.div_(temperature) for g in grads if g is not None]
    return [None if g is None else g.to(x.dtype) for g, x in zip(grads, like, strict=True)]


def _slopes(grads: tuple[Tensor | None, ...], like: Tensor) -> Slopes:
    # contiguous: the gradient of a sum comes as one number expanded
    chosen, entropy, logsumexp = (None if g is None else g.contiguous()[:, None] for g in grads)
    chosen = torch.zeros_like(like) if chosen is None else chosen
    return Slopes(chosen, entropy, -chosen if logsumexp is None else logsumexp - chosen)


def _padded(weight: Tensor, multiple: int) -> Tensor:
    """Pad with rows of zeros up to a multiple."""
    more = -len(weight) % multiple
    return F.pad(weight, (0, 0, 0, more)) if more else weight


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    elements = GPU_CHUNK_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS
    return max(MIN_ROWS, elements // vocabulary)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
