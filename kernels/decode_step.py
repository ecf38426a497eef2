"""Work of a decode step between its matrix products, in three kernels: one token of each row, one row a program.

With them a layer is four products and four kernels, where operators of torch make twenty-four. A step of four layers
moves 4 MB of activations and some keys and values, so the floor is launches; inside a CUDA graph too.
Shape letters: R rows, D hidden size, H query heads, K key/value heads, E head size, S slots of the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, overlapped, tl

# Slots whose keys and values one pass of the loop reads: 32 x 64 numbers of each, 32 a lane of 2 warps
SLOTS = 32
FEATURES = 1024  # of the feed-forward that a program computes: 8 a lane


def add_normalised(x: Tensor, more: Tensor | None, epsilon: float, dtype: torch.dtype, kernel: str = "auto") -> Tensor:
    """x += more, in place; gives x / sqrt(mean(x²) + epsilon) in `dtype`, an RMSNorm (arXiv 1910.07467) of weight 1.

    x, more : [R, D] of one dtype, contiguous; the mean is taken in float32. `kernel`: "auto" (Triton on a GPU), "torch"
    or "triton"; raises UserError where that cannot run.
    """
    if choose_kernel(kernel, x.device) == "torch":
        return _torch_add_normalised(x, more, epsilon, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, width = x.shape
    if rows:
        other = x if more is None else more
        block = next_power_of_2(width)
        _add_normalised[(rows,)](x, other, out, width, epsilon, ADD=more is not None, BLOCK=block)
    return out


def attend_next(
    qkv: Tensor, kv: Tensor, rope: Tensor, slot: Tensor, left: Tensor, heads: int, kernel: str = "auto"
) -> Tensor:
    """Rotate the next token's queries and keys, put its keys and values into the cache, and attend to all it may see.

    qkv  : [R, (H + 2 K) E], queries scaled already; the coordinates that a rotation turns are neighbours
    kv   : [2, R, K, S, E], contiguous; written at `slot`. Slots nobody has written hold finite numbers
    rope : float32 [positions, E / 2, 2], cosine and sine of every position and pair (RoPE, arXiv 2104.09864)
    slot : int64 [1], that the token takes, a tensor so that a recorded step can be replayed for the next one
    left : int64 [R], slots of padding before each row's first token; its position is slot - left
    heads : H

    Gives [R, H E] in the dtype of qkv; scores and softmax are float32.
    """
    if choose_kernel(kernel, qkv.device) == "torch":
        return _torch_attend_next(qkv, kv, rope, slot, left, heads)
    _, rows, kv_heads, slots, size = kv.shape
    out = torch.empty(rows, heads * size, dtype=qkv.dtype, device=qkv.device)
    if rows:
        _attend_next[(rows, heads)](
            qkv, kv[0], kv[1], rope, slot, left, out, heads, kv_heads, slots, size, E=next_power_of_2(size),
            SLOTS=SLOTS, num_warps=_attention_warps(qkv.dtype.itemsize), **overlapped(qkv.device),
        )  # fmt: skip
    return out


def _attention_warps(itemsize: int) -> int:
    """Warps of a program: few leave room for the next kernel while this one ends; 1 to 8 were tried on an H100."""
    return 2 if itemsize == 2 else 4


def gated(gate_up: Tensor, kernel: str = "auto") -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202) of [R, 2 F], gates first: [R, F] in the same dtype."""
    if choose_kernel(kernel, gate_up.device) == "torch":
        return _torch_gated(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _gated[(rows, -(-width // FEATURES))](gate_up, out, width, BLOCK=FEATURES)
    return out


# ------------------------------------------------------------------------------------------------------- torch twins


def _torch_add_normalised(x: Tensor, more: Tensor | None, epsilon: float, dtype: torch.dtype) -> Tensor:
    if more is not None:
        x += more
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(dtype)


def _torch_attend_next(qkv: Tensor, kv: Tensor, rope: Tensor, slot: Tensor, left: Tensor, heads: int) -> Tensor:
    _, rows, kv_heads, slots, size = kv.shape
    qkv = qkv.view(rows, heads + 2 * kv_heads, size)
    rotated, values = qkv.split([heads + kv_heads, kv_heads], 1)
    cos, sin = rope[slot - left].unbind(-1)  # [R, E / 2]
    even, odd = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)  # [R, H + K, E / 2]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(qkv.dtype)
    q, keys = rotated.split([heads, kv_heads], 1)
    kv.index_copy_(3, slot, torch.stack([keys, values]).unsqueeze(3))
    place = torch.arange(slots, device=kv.device)
    seen = (place <= slot) & (place >= left[:, None])  # [R, S]
    q = q.reshape(rows, kv_heads, heads // kv_heads, size).float()
    scores = (q @ kv[0].float().transpose(-1, -2)).masked_fill(~seen[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ kv[1].float()).to(qkv.dtype).reshape(rows, heads * size)


def _torch_gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _add_normalised(x, more, out, width, epsilon, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row of D <= BLOCK numbers."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = (wide + tl.load(more + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, value, mask=inside)
        wide = value.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


@jit
def _rotated(start, feature, inside, cos, sin):
    """The vector at `start`, turned: each coordinate and its neighbour."""
    value = tl.load(start + feature, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(start + (feature ^ 1), mask=inside, other=0.0).to(tl.float32)
    return value * cos + tl.where(feature % 2 == 0, -other, other) * sin


@jit
def _attend_next(
    qkv,
    keys,
    values,
    rope,
    slot,
    left,
    out,
    heads,
    kv_heads,
    slots,
    size,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query head of a row. The token's own key and value come from registers: the first of the heads that share
    them writes them to the cache, when the others may have read it already.

    Each of SLOTS lanes has a softmax of its own, of every SLOTS-th slot, so that no lane waits for another in the loop;
    they become one at the end. Keys and values are loaded a block ahead.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind = qkv.dtype.element_ty
    kv_head = head * kv_heads // heads
    # older than the kernel before, as are all keys and values but the token's
    here, first = tl.load(slot).to(tl.int32), tl.load(left + row).to(tl.int32)
    feature = tl.arange(0, E)
    inside = feature < size
    keys += (row * kv_heads + kv_head) * slots * size
    values += (row * kv_heads + kv_head) * slots * size
    begin = first // SLOTS * SLOTS
    lane = begin + tl.arange(0, SLOTS)
    at = lane[:, None] * size + feature[None, :]
    mask = ((lane < here) & (lane >= first))[:, None] & inside[None, :]
    # read once a step, and weights again and again: those should stay in the cache of the GPU
    next_key = tl.load(keys + at, mask=mask, other=0.0, eviction_policy="evict_first")
    next_value = tl.load(values + at, mask=mask, other=0.0, eviction_policy="evict_first")
    angle = rope + (here - first) * size + feature // 2 * 2
    cos, sin = tl.load(angle, mask=inside, other=0.0), tl.load(angle + 1, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = qkv + row * (heads + 2 * kv_heads) * size
    # rounded as in the cache, so that what is seen does not depend on where it comes from
    q = _rotated(token + head * size, feature, inside, cos, sin).to(kind).to(tl.float32)
    key = _rotated(token + (heads + kv_head) * size, feature, inside, cos, sin).to(kind)
    value = tl.load(token + (heads + kv_heads + kv_head) * size + feature, mask=inside, other=0.0)
    if head % (heads // kv_heads) == 0:
        tl.store(keys + here * size + feature, key, mask=inside)
        tl.store(values + here * size + feature, value, mask=inside)
    own = tl.sum(q * key.to(tl.float32), axis=0)
    top = tl.zeros([SLOTS], tl.float32) + own  # running maximum of a lane's scores, their sum, and the mix so far
    total = tl.zeros([SLOTS], tl.float32)
    mixed = tl.zeros([SLOTS, E], tl.float32)
    for start in range(begin, here, SLOTS):
        place = start + tl.arange(0, SLOTS)
        seen = (place < here) & (place >= first)
        some_keys, some_values = next_key, next_value
        at += SLOTS * size
        mask = (place + SLOTS < here)[:, None] & inside[None, :]
        next_key = tl.load(keys + at, mask=mask, other=0.0, eviction_policy="evict_first")
        next_value = tl.load(values + at, mask=mask, other=0.0, eviction_policy="evict_first")
        scores = tl.sum(some_keys.to(tl.float32) * q[None, :], axis=1)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, scores)
        shrink, weight = tl.exp(top - higher), tl.exp(scores - higher)
        total = total * shrink + weight
        mixed = mixed * shrink[:, None] + some_values.to(tl.float32) * weight[:, None]
        top = higher
    highest = tl.max(top, axis=0)
    shrink, weight = tl.exp(top - highest), tl.exp(own - highest)
    whole = tl.sum(total * shrink, axis=0) + weight
    result = tl.sum(mixed * shrink[:, None], axis=0) + value.to(tl.float32) * weight
    tl.store(out + (row * heads + head) * size + feature, (result / whole).to(kind), mask=inside)


@jit
def _gated(gate_up, out, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + 2 * row * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def _shipped(kind: str) -> list[Shipped]:
    """The paper's policy, D 512, E 64, in one dtype; and a D of 2,048."""
    moved = dict.fromkeys(("x", "more", "out", "qkv", "keys", "values", "gate_up"), f"*{kind}")
    numbers = dict.fromkeys(("width", "heads", "kv_heads", "slots", "size"), "i32")
    types = moved | numbers | {"epsilon": "fp32", "rope": "*fp32", "slot": "*i64", "left": "*i64"}
    aligned = ("width", "slots", "size")  # 512 and more, a multiple of 64, 64
    return [
        Shipped(f"add_normalised, {kind}", _add_normalised, types, {"ADD": True, "BLOCK": 512}, aligned=aligned),
        Shipped(
            f"add_normalised, D 2048, {kind}", _add_normalised, types, {"ADD": True, "BLOCK": 2048}, aligned=aligned
        ),
        Shipped(
            f"attend_next, {kind}",
            _attend_next,
            types,
            {"E": 64, "SLOTS": SLOTS},
            num_warps=_attention_warps(4 if kind == "fp32" else 2),
            aligned=aligned,
        ),
        Shipped(f"gated, {kind}", _gated, types, {"BLOCK": FEATURES}, aligned=aligned),
    ]


SHIPPED = [*_shipped("bf16"), *_shipped("fp32")]
