"""Log-probability, entropy and log-sum-exp of chosen tokens, straight from the hidden state.

This is the boundary between kernels and readable code: everything above it (ratio, clipping, KL, loss) works on
[M] vectors. Shape letters: M packed tokens, R tokens of a chunk, D hidden width, V vocabulary.

A chunk of logits is made by the BLAS in fp32, reduced to four numbers a row, and forgotten; for the backward pass it is
kept (M·V small) or made again. What that costs at least, on paper, on a GPU with fp32 products at 50 TFLOP/s and
3.3 TB/s, for M = 8,192 and D = 512. V = 413: three products of 3.5 GFLOP, 208 µs, and 13.5 MB of logits, written once
and read by each row kernel, and their gradient, written once and read by two products: 81 MB, 25 µs. Products and
softmax in one kernel could save at most those 25 of 233 µs and would need a product better than cuBLAS's, hence the two
row kernels here. V = 151,936: four products, 102 ms; the row kernels move 15 GB, 4.5 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, tl, triton

# CPU: a chunk of logits should stay in a core's L2 cache between the passes over it: 2**18 fp32 are 1 MiB, 634 rows at
# V = 413. Wide vocabularies get at least MIN_ROWS rows, or the matrix product would only re-read the weight.
CHUNK_ELEMENTS = 2**18
MIN_ROWS = 64
# GPU: 256 MiB, 441 rows at V = 151,936, enough for a product bound by arithmetic; and 32-bit offsets reach all of it.
GPU_CHUNK_ELEMENTS = 2**26
# Up to this many probabilities (64 MiB in fp32) are kept for the backward pass, more are recomputed: at M = 16,384,
# V = 413, D = 256 forward, loss and backward took 103 ms of one core with kept and 135 ms with recomputed ones.
KEEP_ELEMENTS = 2**24
# Up to here a Triton program holds whole rows in registers, several at once; above, it loops over one row.
WHOLE_ROW = 4096
BACKWARD_TILE = 2048  # logits of a program; twice as many take 160 registers a thread


class LogProb(NamedTuple):
    """What the policy said about M tokens, each [M], in float32 (float64 for float64 input).

    logprob   : log p(id)
    entropy   : of the whole distribution, in nats
    logsumexp : of the tempered logits
    """

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor


class Rows(NamedTuple):
    """What the backward pass needs to know of each row, [R, 1] each.

    The largest tempered logit and the log of the sum of exp(logit − peak) are apart: beside a peak of 1e4 their sum has
    lost the digits of log 2, and probabilities made from it are wrong by 1e-4.
    """

    logprob: Tensor
    entropy: Tensor
    peak: Tensor
    log_total: Tensor

    def part(self, rows: slice) -> Rows:
        return Rows(*(x[rows] for x in self))


class Slopes(NamedTuple):
    """Gradients of the loss, [R, 1] each, None where there are none.

    chosen  : with respect to logprob
    entropy : with respect to entropy
    row     : of logsumexp less that of logprob
    """

    chosen: Tensor
    entropy: Tensor | None
    row: Tensor

    def part(self, rows: slice) -> Slopes:
        return Slopes(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def logprob(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, kernel: str = "auto") -> LogProb:
    """Log-prob of `ids` under softmax(hidden @ weight.T / temperature), with the entropy and log-sum-exp of each row.

    hidden [M, D] and weight [V, D] of any floating dtype, ids [M] int64. Logits, sums and gradients are computed in
    float32 (float64 where an input is float64), also under autocast; a weight in 16 bits is widened once per call. All
    three results are differentiable, once, with respect to hidden and weight. Never more than a chunk of logits exists
    at a time, apart from those kept for the backward pass when M·V is small (`KEEP_ELEMENTS`).

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
    keep = wanted and len(hidden) * len(weight) <= KEEP_ELEMENTS
    return LogProb(*_LogProb.apply(hidden, weight, ids.contiguous(), float(temperature), keep, passes))


# ------------------------------------------------------------------------------------------------------- torch twin


def rows_forward(logits: Tensor, work: Tensor, ids: Tensor, temperature: float, rows: Rows, keep: bool) -> None:
    """Fill `rows` from logits [R, V], which are overwritten; with `keep`, leave the probabilities in `work` [R, V]."""
    if temperature != 1.0:
        logits.div_(temperature)
    torch.amax(logits, dim=1, keepdim=True, out=rows.peak)
    logits.sub_(rows.peak)
    chosen = logits.gather(1, ids[:, None])
    logits.clamp_(min=torch.finfo(logits.dtype).min)  # so that a probability of 0 times its logit is 0, not NaN
    torch.exp(logits, out=work)
    total = work.sum(dim=1, keepdim=True)
    mean_logit = logits.mul_(work).sum(dim=1, keepdim=True) / total
    torch.log(total, out=rows.log_total)
    torch.sub(chosen, rows.log_total, out=rows.logprob)
    torch.sub(rows.log_total, mean_logit, out=rows.entropy)
    if keep:
        work.div_(total)


def rows_backward(
    work: Tensor, out: Tensor, ids: Tensor, temperature: float, rows: Rows, slopes: Slopes, kept: bool
) -> None:
    """Write the gradient with respect to the tempered logits to `out` [R, V].

    work [R, V]: what `rows_forward` left there if `kept`, else the logits, which are overwritten.

    With p the probabilities and H the entropy of a row, and x the tempered logits:
        d logprob / dx = onehot(id) − p      d logsumexp / dx = p      d H / dx = −p (log p + H)
    """
    p = work
    if not kept:
        if temperature != 1.0:
            p.div_(temperature)
        p.sub_(rows.peak).sub_(rows.log_total).exp_()
    torch.mul(p, slopes.row, out=out)
    if slopes.entropy is not None:
        slope = torch.special.xlogy(p, p).addcmul_(p, rows.entropy)
        out.addcmul_(slope, slopes.entropy, value=-1.0)
    chosen = ids[:, None]  # gather and scatter: scatter_add_ has no deterministic form on a GPU
    out.scatter_(1, chosen, out.gather(1, chosen) + slopes.chosen)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _tempered(x, TEMPERATURE: tl.constexpr):
    """x / TEMPERATURE, rounded once: Triton's own division of float32 may be 2 ulp off, 1e-5 of a logit of 70."""
    if TEMPERATURE == 1.0:
        return x
    if x.dtype == tl.float32:
        return tl.div_rn(x, tl.full(x.shape, TEMPERATURE, x.dtype))
    return x / TEMPERATURE


@jit(varying=("rows",))
def _forward_whole(
    logits,
    ids,
    logprob,
    entropy,
    peak,
    log_total,
    rows,
    vocabulary,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of V <= BLOCK logits, read once and held in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (column < vocabulary)[None, :]
    x = _tempered(tl.load(logits + row[:, None] * vocabulary + column[None, :], mask=inside, other=0.0), TEMPERATURE)
    x = tl.where(inside, x, -float("inf"))
    top = tl.max(x, axis=1)
    d = x - top[:, None]
    e = tl.where(inside, tl.exp(d), 0.0)
    total = tl.sum(e, axis=1)
    mean = tl.sum(tl.where(e > 0.0, e * d, 0.0), axis=1) / total
    log_sum = tl.log(total)
    chosen = tl.load(ids + row, mask=live, other=-1)
    known = (chosen >= 0) & (chosen < vocabulary)
    picked = _tempered(tl.load(logits + row * vocabulary + chosen, mask=known, other=float("nan")), TEMPERATURE)
    tl.store(logprob + row, picked - top - log_sum, mask=live)
    tl.store(entropy + row, log_sum - mean, mask=live)
    tl.store(peak + row, top, mask=live)
    tl.store(log_total + row, log_sum, mask=live)


@jit
def _forward_looped(
    logits, ids, logprob, entropy, peak, log_total, vocabulary, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of any length, read once: the sums are carried along and rescaled as the peak grows."""
    row = tl.program_id(0)
    start_of_row = logits + row * vocabulary
    column = tl.arange(0, BLOCK)
    top = tl.full((), -float("inf"), logits.dtype.element_ty)
    total = tl.full((), 0.0, logits.dtype.element_ty)
    weighted = tl.full((), 0.0, logits.dtype.element_ty)  # sum of exp(x − top) (x − top)
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        x = _tempered(tl.load(start_of_row + start + column, mask=inside, other=0.0), TEMPERATURE)
        x = tl.where(inside, x, -float("inf"))
        new = tl.maximum(top, tl.max(x, axis=0))
        d = x - new
        e = tl.where(x == -float("inf"), 0.0, tl.exp(d))
        scale = tl.where(total > 0.0, tl.exp(top - new), 0.0)
        moved = tl.where(total > 0.0, total * (top - new), 0.0)
        weighted = scale * (weighted + moved) + tl.sum(tl.where(e > 0.0, e * d, 0.0), axis=0)
        total = scale * total + tl.sum(e, axis=0)
        top = new
    total = tl.where(top == -float("inf"), float("nan"), total)
    log_sum = tl.log(total)
    chosen = tl.load(ids + row)
    known = (chosen >= 0) & (chosen < vocabulary)
    picked = _tempered(tl.load(start_of_row + chosen, mask=known, other=float("nan")), TEMPERATURE)
    tl.store(logprob + row, picked - top - log_sum)
    tl.store(entropy + row, log_sum - weighted / total)
    tl.store(peak + row, top)
    tl.store(log_total + row, log_sum)


@jit(varying=("rows",))
def _backward(
    logits,
    out,
    ids,
    entropy,
    peak,
    log_total,
    slope_chosen,
    slope_entropy,
    slope_row,
    rows,
    vocabulary,
    TEMPERATURE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of the gradient with respect to the tempered logits; `out` may be `logits`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    place = row[:, None] * vocabulary + column[None, :]
    inside = live[:, None] & (column < vocabulary)[None, :]
    x = _tempered(tl.load(logits + place, mask=inside, other=0.0), TEMPERATURE)
    top = tl.load(peak + row, mask=live, other=0.0)
    log_sum = tl.load(log_total + row, mask=live, other=0.0)
    # not x − logsumexp, see Rows
    log_p = x - top[:, None] - log_sum[:, None]
    p = tl.exp(log_p)
    gradient = p * tl.load(slope_row + row, mask=live, other=0.0)[:, None]
    if WITH_ENTROPY:
        h = tl.load(entropy + row, mask=live, other=0.0)
        slope = tl.load(slope_entropy + row, mask=live, other=0.0)
        gradient -= slope[:, None] * tl.where(p > 0.0, p * (log_p + h[:, None]), 0.0)
    chosen = tl.load(ids + row, mask=live, other=-1)
    slope = tl.load(slope_chosen + row, mask=live, other=0.0)
    gradient += tl.where(column[None, :] == chosen[:, None], slope[:, None], 0.0)
    tl.store(out + place, gradient, mask=inside)


def _tile(vocabulary: int, elements: int) -> dict[str, int]:
    """Rows and columns of a program's tile of that many logits; whole rows where they fit."""
    columns = min(next_power_of_2(vocabulary), elements)
    return {"ROWS": elements // columns, "BLOCK": columns}


def _triton_forward(logits: Tensor, work: Tensor, ids: Tensor, temperature: float, rows: Rows, keep: bool) -> None:
    """As `rows_forward`, but the logits stay what they are: `work` is `logits`."""
    r, v = logits.shape
    if v <= WHOLE_ROW:
        tile = _tile(v, WHOLE_ROW)
        _forward_whole[(triton.cdiv(r, tile["ROWS"]),)](logits, ids, *rows, r, v, TEMPERATURE=temperature, **tile)
    else:
        _forward_looped[(r,)](logits, ids, *rows, v, TEMPERATURE=temperature, BLOCK=WHOLE_ROW)


def _triton_backward(
    work: Tensor, out: Tensor, ids: Tensor, temperature: float, rows: Rows, slopes: Slopes, kept: bool
) -> None:
    """As `rows_backward`, from logits in either case."""
    r, v = work.shape
    tile = _tile(v, BACKWARD_TILE)
    grid = (triton.cdiv(r, tile["ROWS"]), triton.cdiv(v, tile["BLOCK"]))
    with_entropy = slopes.entropy is not None
    given = (*rows[1:], slopes.chosen, slopes.entropy if with_entropy else slopes.chosen, slopes.row, r, v)
    _backward[grid](work, out, ids, *given, TEMPERATURE=temperature, WITH_ENTROPY=with_entropy, **tile)


def _shipped() -> list[Shipped]:
    """Both regimes in fp32: the 413 tokens of preset smart, and the 151,936 of a large language model."""
    ours, wide, even = 413, 151_936, ("vocabulary",)  # 151,936 is a multiple of 16, 413 is not
    floats = ("logits", "out", *Rows._fields, "slope_chosen", "slope_entropy", "slope_row")
    types = dict.fromkeys(floats, "*fp32") | {"ids": "*i64", "rows": "i32", "vocabulary": "i32"}
    plain = {"TEMPERATURE": 1.0, "WITH_ENTROPY": False, **_tile(ours, BACKWARD_TILE)}
    return [
        Shipped(f"logprob forward, V {ours}", _forward_whole, types, plain | _tile(ours, WHOLE_ROW)),
        Shipped(f"logprob forward, V {wide}", _forward_looped, types, plain | {"BLOCK": WHOLE_ROW}, aligned=even),
        Shipped(f"logprob backward, V {ours}", _backward, types, plain),
        Shipped(f"logprob backward, V {ours}, entropy", _backward, types, plain | {"WITH_ENTROPY": True}),
        Shipped(f"logprob backward, V {wide}", _backward, types, plain | _tile(wide, BACKWARD_TILE), aligned=even),
    ]


SHIPPED = _shipped()


# ------------------------------------------------------------------------------------------------- autograd wrapper


class _Passes(NamedTuple):
    """The two passes over a chunk; `in_place`: what they keep for the backward pass is the logits themselves."""

    forward: Callable[[Tensor, Tensor, Tensor, float, Rows, bool], None]
    backward: Callable[[Tensor, Tensor, Tensor, float, Rows, Slopes, bool], None]
    in_place: bool


_PASSES = {
    "torch": _Passes(rows_forward, rows_backward, in_place=False),
    "triton": _Passes(_triton_forward, _triton_backward, in_place=True),
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
        kept = hidden.new_empty(m if keep else 0, v, dtype=dtype)
        scratch = hidden.new_empty(2 - keep - passes.in_place, min(size, m), v, dtype=dtype)
        wide = weight.to(dtype)
        for start in range(0, m, size):
            part = slice(start, min(start + size, m))
            n = part.stop - start
            work = kept[part] if keep else scratch[-1, :n]
            logits = work if passes.in_place else scratch[0, :n]
            torch.mm(hidden[part].to(dtype), wide.t(), out=logits)  # autocast leaves operations with `out` alone
            passes.forward(logits, work, ids[part], temperature, rows.part(part), keep)
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
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        scratch = hidden.new_empty(1 if ctx.keep or passes.in_place else 2, min(size, m), v, dtype=dtype)
        wide = weight.to(dtype)
        for start in range(0, m, size):
            part = slice(start, min(start + size, m))
            n = part.stop - start
            grad_logits = scratch[0, :n]
            work = kept[part] if ctx.keep else scratch[-1, :n]
            if not ctx.keep:
                torch.mm(hidden[part].to(dtype), wide.t(), out=work)
            passes.backward(work, grad_logits, ids[part], ctx.temperature, rows.part(part), slopes.part(part), ctx.keep)
            if grad_hidden is not None:
                torch.mm(grad_logits, wide, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[part].to(dtype))
        pairs = ((grad_hidden, hidden), (grad_weight, weight))
        if ctx.temperature != 1.0:
            _ = [g.div_(ctx.temperature) for g, _ in pairs if g is not None]
        scaled = (None if g is None else g.to(x.dtype) for g, x in pairs)
        return *scaled, None, None, None, None


def _slopes(grads: tuple[Tensor | None, ...], like: Tensor) -> Slopes:
    # contiguous: the gradient of a sum comes as one number expanded
    chosen, entropy, logsumexp = (None if g is None else g.contiguous()[:, None] for g in grads)
    chosen = torch.zeros_like(like) if chosen is None else chosen
    return Slopes(chosen, entropy, -chosen if logsumexp is None else logsumexp - chosen)


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    elements = GPU_CHUNK_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS
    return max(MIN_ROWS, elements // vocabulary)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
