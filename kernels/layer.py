"""What a layer of the policy does between its matrix products when it is trained, forwards and backwards.

Three functions of autograd, each one kernel a direction: the sum of the residual stream and its RMSNorm, the rotation
of queries and keys, SwiGLU. Products are in 16 bit, sums and what the kernels compute inside in float32, and nothing is
rounded in between. Operators of PyTorch make 14 kernels of the three forwards and write each step of theirs to memory.

What is moved at least, at R = 16,576 tokens, D = 512, F = 2,048 and 3.0 TB/s: the norm 102 MB forwards and 136 MB
backwards (34 and 45 µs), the rotation 68 and 102 MB (23 and 34 µs), SwiGLU 204 and 340 MB (68 and 113 µs).
Shape letters: B rows, T positions, R = B T tokens, D hidden size, F feed-forward size, H query heads, K key/value
heads, E head size, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, tl, triton

TILE = 4096  # numbers that a program of the norm holds at once: 32 a thread
FEATURES = 1024  # of the feed-forward that a program computes: 8 a thread
# Of the norm backwards, each with a sum for the weight of its own: two a multiprocessor of an H100, where it takes
# 60 µs; 1,056 programs with tiles of 2,048 take 70
PROGRAMS = 264


def normalised_sum(
    x: Tensor, more: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x + more, float32 [R, D], and its RMSNorm (arXiv 1910.07467) in `dtype`; differentiable, once.

    x float32 [R, D], more [R, D] of any floating dtype or None, weight float32 [D]. `kernel`: "auto" (Triton on a GPU),
    "torch" or "triton"; raises UserError where that cannot run.
    """
    if choose_kernel(kernel, x.device) == "torch":
        total = x if more is None else x + more
        return total, F.rms_norm(total, weight.shape, weight, epsilon).to(dtype)
    total, normed = _NormalisedSum.apply(x.contiguous(), _contiguous(more), weight, epsilon, dtype)
    return x if more is None else total, normed


def rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, kernel: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, E] and k [B, T, K, E] turned by their positions' angles (RoPE, arXiv 2104.09864), v [B, T, K, E].

    qkv [B, T, H + 2 K, E]; cos, sin float32 [T, E / 2]; the two halves of a head are the coordinates. v is a view of
    qkv. `kernel` as for `normalised_sum`.
    """
    if choose_kernel(kernel, qkv.device) == "torch":
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
        q, k = _turned(qk, cos, sin).split([heads, kv_heads], dim=-2)
        return q, k, v
    return _Rotated.apply(qkv.contiguous(), cos, sin, heads, kv_heads)


def swiglu(gate_up: Tensor, kernel: str = "auto") -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), [R, F], of gate_up [R, 2 F], gates first; `kernel`: see `normalised_sum`."""
    if choose_kernel(kernel, gate_up.device) == "torch":
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)
    return _SwiGLU.apply(gate_up.contiguous())


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, E] turned by the angles of its positions, in float32, rounded at the end."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit(varying=("rows",))
def _norm_forward(
    x,
    more,
    weight,
    total,
    normed,
    scale,
    rows,
    width,
    epsilon,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows of D <= BLOCK numbers; `scale`: one over the root of each row's mean square."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        value += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value, mask=inside)
    r = tl.rsqrt(tl.sum(value * value, axis=1) / width + epsilon)
    w = tl.load(weight + column, mask=column < width, other=0.0)
    tl.store(normed + at, (value * r[:, None] * w[None, :]).to(normed.dtype.element_ty), mask=inside)
    tl.store(scale + row, r, mask=row < rows)


@jit(varying=("rows", "tiles"))
def _norm_backward(
    total,
    weight,
    scale,
    grad_normed,
    grad_total,
    grad_x,
    grad_more,
    partial,
    rows,
    width,
    tiles,
    WITH_TOTAL: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`tiles` tiles of ROWS rows, and what they add to the gradient of the weight, into row p of `partial` [P, D]."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < width, other=0.0)
    for_weight = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        r = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(total + at, mask=inside, other=0.0) * r
        g = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
        for_weight += tl.sum(g * unit, axis=0)
        g *= w[None, :]
        g = r * (g - unit * (tl.sum(g * unit, axis=1) / width)[:, None])
        if WITH_TOTAL:
            g += tl.load(grad_total + at, mask=inside, other=0.0)
        tl.store(grad_x + at, g, mask=inside)
        if ADD:
            tl.store(grad_more + at, g.to(grad_more.dtype.element_ty), mask=inside)
    tl.store(partial + program.to(tl.int64) * width + column, for_weight, mask=column < width)


@jit(varying=("tokens", "positions"))
def _rotate(qkv, cos, sin, out, tokens, positions, qkv_heads, heads, half, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """The first `heads` heads of ROWS tokens: all their pairs of coordinates."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = (token < tokens)[:, None] & (pair < heads * half)[None, :]
    head, coordinate = pair // half, pair % half
    angle = (token % positions)[:, None] * half + coordinate[None, :]
    c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
    within = (head * 2 * half + coordinate)[None, :]
    place = token.to(tl.int64)[:, None]
    start = qkv + place * (qkv_heads * 2 * half) + within
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    end = out + place * (heads * 2 * half) + within
    tl.store(end, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(end + half, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@jit(varying=("tokens", "positions", "q_row", "q_step", "k_row", "k_step", "v_row", "v_step"))
def _rotate_back(
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    out,
    tokens,
    positions,
    q_row,
    q_step,
    q_head,
    k_row,
    k_step,
    k_head,
    v_row,
    v_step,
    v_head,
    heads,
    kv_heads,
    half,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """ROWS tokens of dqkv [B, T, H + 2 K, E] from dq, dk and dv, strides of each by row, position and head."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    all_heads = heads + 2 * kv_heads
    live = (token < tokens)[:, None]
    inside = live & (pair < all_heads * half)[None, :]
    head, coordinate = pair // half, pair % half
    row, step = (token // positions).to(tl.int64), (token % positions).to(tl.int64)
    angle = step[:, None] * half + coordinate[None, :]
    turns = inside & (head < heads + kv_heads)[None, :]
    c, s = tl.load(cos + angle, mask=turns, other=1.0), tl.load(sin + angle, mask=turns, other=0.0)
    # each pair belongs to one of the three, the others give 0
    is_q = live & (head < heads)[None, :]
    is_k = turns & (head >= heads)[None, :]
    is_v = inside & (head >= heads + kv_heads)[None, :]
    q = grad_q + (row * q_row + step * q_step)[:, None] + (head * q_head + coordinate)[None, :]
    k = grad_k + (row * k_row + step * k_step)[:, None] + ((head - heads) * k_head + coordinate)[None, :]
    v = grad_v + (row * v_row + step * v_step)[:, None] + ((head - heads - kv_heads) * v_head + coordinate)[None, :]
    first = tl.load(q, mask=is_q, other=0.0).to(tl.float32) + tl.load(k, mask=is_k, other=0.0).to(tl.float32)
    second = tl.load(q + half, mask=is_q, other=0.0).to(tl.float32)
    second += tl.load(k + half, mask=is_k, other=0.0).to(tl.float32)
    first += tl.load(v, mask=is_v, other=0.0).to(tl.float32)
    second += tl.load(v + half, mask=is_v, other=0.0).to(tl.float32)
    end = out + (token.to(tl.int64) * (all_heads * 2 * half))[:, None] + (head * 2 * half + coordinate)[None, :]
    tl.store(end, (first * c + second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(end + half, (second * c - first * s).to(out.dtype.element_ty), mask=inside)


@jit
def _gate_forward(gate_up, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    start = gate_up + 2 * row * width + column
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


@jit
def _gate_backward(gate_up, grad, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = 2 * row * width + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    open_ = 1.0 / (1.0 + tl.exp(-gate))
    kind = out.dtype.element_ty
    tl.store(out + at, (g * up * open_ * (1.0 + gate * (1.0 - open_))).to(kind), mask=inside)
    tl.store(out + at + width, (g * gate * open_).to(kind), mask=inside)


def _tile(width: int) -> dict[str, int]:
    """Rows and columns of a program's tile: whole rows, several where they are short.

    Of 2,048 numbers one: with two, ptxas of Triton 3.6 spills 8 bytes for sm_100.
    """
    block = next_power_of_2(width)
    return {"ROWS": TILE // block if 2 * block < TILE else 1, "BLOCK": block}


def _pair_tile(pairs: int) -> dict[str, int]:
    """The same for pairs of coordinates, of which each tile holds a quarter as many; rows may be cut."""
    block = min(next_power_of_2(pairs), TILE // 4)
    return {"ROWS": TILE // 4 // block, "PAIRS": block}


def _shipped(kind: str) -> list[Shipped]:
    """The paper's policy, D 512, E 64, F 2,048, in one dtype of products; and a D of 2,048."""
    floats = ("x", "weight", "total", "scale", "grad_total", "grad_x", "partial", "cos", "sin")
    others = (
        *("more", "normed", "grad_normed", "grad_more", "qkv", "out", "gate_up", "grad"),
        *("grad_q", "grad_k", "grad_v"),
    )
    strides = tuple(f"{name}_{of}" for name in "qkv" for of in ("row", "step", "head"))
    numbers = ("rows", "width", "tiles", "tokens", "positions", "qkv_heads", "heads", "kv_heads", "half", *strides)
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(others, f"*{kind}") | dict.fromkeys(numbers, "i32")
    types["epsilon"] = "fp32"
    aligned = ("width", "half", "q_head", "k_head", "v_head")  # 512 and more, 32, 64
    both = {"ADD": True, "WITH_TOTAL": True}
    found = []
    for width in (512, 2048):
        tile = both | _tile(width)
        found += [
            Shipped(f"layer norm, D {width}, {kind}", _norm_forward, types, tile, aligned=aligned),
            Shipped(f"layer norm backward, D {width}, {kind}", _norm_backward, types, tile, aligned=aligned),
        ]
    return [
        *found,
        Shipped(f"layer rotate, {kind}", _rotate, types, _pair_tile(512), aligned=aligned),
        Shipped(f"layer rotate backward, {kind}", _rotate_back, types, _pair_tile(768), aligned=aligned),
        Shipped(f"layer gate, {kind}", _gate_forward, types, {"BLOCK": FEATURES}, aligned=aligned),
        Shipped(f"layer gate backward, {kind}", _gate_backward, types, {"BLOCK": FEATURES}, aligned=aligned),
    ]


SHIPPED = _shipped("bf16")


# ------------------------------------------------------------------------------------------------ autograd wrappers


class _NormalisedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        rows, width = x.shape
        total = None if more is None else torch.empty_like(x)
        normed, scale = torch.empty_like(x, dtype=dtype), x.new_empty(rows)
        tile = _tile(width)
        if rows:
            given = (x if more is None else more, weight, x if total is None else total, normed, scale)
            grid = (triton.cdiv(rows, tile["ROWS"]),)
            _norm_forward[grid](x, *given, rows, width, epsilon, ADD=more is not None, **tile)
        ctx.save_for_backward(x if total is None else total, weight, scale)
        ctx.more_dtype = None if more is None else more.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        rows, width = total.shape
        if grad_normed is None:
            return grad_total, grad_total, None, None, None
        grad_normed, grad_total = grad_normed.contiguous(), _contiguous(grad_total)
        grad_x = torch.empty_like(total)
        grad_more = None if ctx.more_dtype is None else torch.empty_like(total, dtype=ctx.more_dtype)
        tile = _tile(width)
        tiles = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), PROGRAMS)
        programs = triton.cdiv(rows, tile["ROWS"] * max(tiles, 1))
        partial = total.new_empty(programs, width)
        if rows:
            given = (grad_x if grad_total is None else grad_total, grad_x, grad_x if grad_more is None else grad_more)
            flags = {"WITH_TOTAL": grad_total is not None, "ADD": grad_more is not None}
            _norm_backward[(programs,)](
                total, weight, scale, grad_normed, *given, partial, rows, width, tiles, **flags, **tile
            )
        return grad_x, grad_more, partial.sum(0), None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, positions, all_heads, size = qkv.shape
        turning = heads + kv_heads
        out = qkv.new_empty(rows, positions, turning, size)
        pairs = turning * size // 2
        tile = _pair_tile(pairs)
        if qkv.numel():
            grid = (triton.cdiv(rows * positions, tile["ROWS"]), triton.cdiv(pairs, tile["PAIRS"]))
            _rotate[grid](qkv, cos, sin, out, rows * positions, positions, all_heads, turning, size // 2, **tile)
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads, kv_heads
        return out[:, :, :heads], out[:, :, heads:], qkv[:, :, turning:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads, kv_heads = ctx.heads
        grads = tuple(g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        rows, positions, _, size = grads[0].shape
        out = grads[0].new_empty(rows, positions, heads + 2 * kv_heads, size)
        pairs = (heads + 2 * kv_heads) * size // 2
        tile = _pair_tile(pairs)
        if out.numel():
            grid = (triton.cdiv(rows * positions, tile["ROWS"]), triton.cdiv(pairs, tile["PAIRS"]))
            strides = [stride for g in grads for stride in g.stride()[:3]]
            sizes = (*strides, heads, kv_heads, size // 2)
            _rotate_back[grid](*grads, cos, sin, out, rows * positions, positions, *sizes, **tile)
        return out, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        if rows:
            _gate_forward[(rows, triton.cdiv(width, FEATURES))](gate_up, out, width, BLOCK=FEATURES)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty_like(gate_up)
        if rows:
            grid = (rows, triton.cdiv(width, FEATURES))
            _gate_backward[grid](gate_up, grad.contiguous(), out, width, BLOCK=FEATURES)
        return out
