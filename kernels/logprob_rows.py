"""The two passes over the rows of a chunk of logits: log-prob and entropy forwards, the logits' gradient backwards.

`fastsmart.kernels.logprob` makes the chunks. Shape letters: R tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmart.kernels.jit import Shipped, jit, next_power_of_2, tl, triton

# Up to here a Triton program holds whole rows in registers, several at once; above, it loops over one row.
WHOLE_ROW = 4096
BACKWARD_TILE = 2048  # logits of a program; twice as many take 160 registers a thread


class Rows(NamedTuple):
    """Numbers that the backward pass needs of each row, [R, 1] each.

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
    stride,
    TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of V <= BLOCK logits, read once and held in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (column < vocabulary)[None, :]
    x = _tempered(tl.load(logits + row[:, None] * stride + column[None, :], mask=inside, other=0.0), TEMPERATURE)
    x = tl.where(inside, x, -float("inf"))
    top = tl.max(x, axis=1)
    d = x - top[:, None]
    e = tl.where(inside, tl.exp(d), 0.0)
    total = tl.sum(e, axis=1)
    mean = tl.sum(tl.where(e > 0.0, e * d, 0.0), axis=1) / total
    log_sum = tl.log(total)
    chosen = tl.load(ids + row, mask=live, other=-1)
    known = (chosen >= 0) & (chosen < vocabulary)
    picked = _tempered(tl.load(logits + row * stride + chosen, mask=known, other=float("nan")), TEMPERATURE)
    tl.store(logprob + row, picked - top - log_sum, mask=live)
    tl.store(entropy + row, log_sum - mean, mask=live)
    tl.store(peak + row, top, mask=live)
    tl.store(log_total + row, log_sum, mask=live)


@jit
def _forward_looped(
    logits, ids, logprob, entropy, peak, log_total, vocabulary, stride, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of any length, read once: the sums are carried along and rescaled as the peak grows."""
    row = tl.program_id(0)
    start_of_row = logits + row * stride
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
    stride,
    TEMPERATURE: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of the gradient with respect to the tempered logits; `out` may be `logits`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    place = row[:, None] * stride + column[None, :]
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
    # columns beyond the vocabulary take part in products
    tl.store(out + place, tl.where(inside, gradient, 0.0), mask=live[:, None] & (column < stride)[None, :])


def _tile(vocabulary: int, elements: int) -> dict[str, int]:
    """Rows and columns of a program's tile of that many logits; whole rows where they fit."""
    columns = min(next_power_of_2(vocabulary), elements)
    return {"ROWS": elements // columns, "BLOCK": columns}


def triton_forward(logits: Tensor, work: Tensor, ids: Tensor, temperature: float, rows: Rows, keep: bool) -> None:
    """Run `rows_forward` on a GPU, which leaves the logits what they are: `work` is `logits`."""
    r, v = logits.shape
    if v <= WHOLE_ROW:
        tile = _tile(v, WHOLE_ROW)
        _forward_whole[(triton.cdiv(r, tile["ROWS"]),)](
            logits, ids, *rows, r, v, logits.stride(0), TEMPERATURE=temperature, **tile
        )
    else:
        _forward_looped[(r,)](logits, ids, *rows, v, logits.stride(0), TEMPERATURE=temperature, BLOCK=WHOLE_ROW)


def triton_backward(
    work: Tensor, out: Tensor, ids: Tensor, temperature: float, rows: Rows, slopes: Slopes, kept: bool
) -> None:
    """Run `rows_backward` on a GPU, from logits in either case."""
    r, v = work.shape
    tile = _tile(v, BACKWARD_TILE)
    stride = work.stride(0)
    grid = (triton.cdiv(r, tile["ROWS"]), triton.cdiv(stride, tile["BLOCK"]))
    with_entropy = slopes.entropy is not None
    given = (*rows[1:], slopes.chosen, slopes.entropy if with_entropy else slopes.chosen, slopes.row, r, v, stride)
    _backward[grid](work, out, ids, *given, TEMPERATURE=temperature, WITH_ENTROPY=with_entropy, **tile)


def _shipped() -> list[Shipped]:
    """Both regimes in fp32: the 413 tokens of preset smart, and the 151,936 of a large language model."""
    ours, wide, even = 413, 151_936, ("vocabulary", "stride")  # 151,936 is a multiple of 16; 413 is padded
    padded = ("stride",)
    floats = ("logits", "out", *Rows._fields, "slope_chosen", "slope_entropy", "slope_row")
    types = dict.fromkeys(floats, "*fp32") | {"ids": "*i64", "rows": "i32", "vocabulary": "i32", "stride": "i32"}
    plain = {"TEMPERATURE": 1.0, "WITH_ENTROPY": False, **_tile(ours, BACKWARD_TILE)}
    full = plain | {"WITH_ENTROPY": True}
    return [
        Shipped(f"logprob forward, V {ours}", _forward_whole, types, plain | _tile(ours, WHOLE_ROW), aligned=padded),
        Shipped(f"logprob forward, V {wide}", _forward_looped, types, plain | {"BLOCK": WHOLE_ROW}, aligned=even),
        Shipped(f"logprob backward, V {ours}", _backward, types, plain, aligned=padded),
        Shipped(f"logprob backward, V {ours}, entropy", _backward, types, full, aligned=padded),
        Shipped(f"logprob backward, V {wide}", _backward, types, plain | _tile(wide, BACKWARD_TILE), aligned=even),
    ]


SHIPPED = _shipped()
