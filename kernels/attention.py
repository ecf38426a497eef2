"""Attention whose relative position bias is gated by the query (WavLM, arXiv 2110.13900), for inference.

Shape letters: B windows, H heads, T frames, E size of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, tl

HEAD_SIZES = (16, 32, 64, 128)  # that the kernel takes
QUERIES, KEYS = 64, 32  # of a program, and of a step of its loop; larger ones are no faster on an H100
NUM_WARPS, NUM_STAGES = 4, 3
LOG2_E = 1.4426950408889634


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, raw: Tensor, gate: Tensor, bias: Tensor, lengths: Tensor, kernel: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(E) + gates x bias) v over the first `lengths` keys, [B, H, T, E] in the dtype of v.

    The kernel gates the bias where it is needed, so nothing of the size [B, H, T, T] is ever in memory; scores and
    softmax are float32.

    q, k, v : [B, H, T, E], any strides as long as E is contiguous; read as vectors where they are multiples of 16
    raw     : [B, T, 2 H], two raw gates of every head for every query, any strides as long as the last is contiguous
    gate    : [H] float32; `gates` makes of both how much of the bias a query takes
    bias    : [H, T, S] of any floating dtype, of key j for query i at [i, j]; S at least T, and what is beyond T is not
              looked at. The kernel takes it as it is where S is a multiple of 32, else it makes a copy: 16-bit rows of
              512 for 12 heads of 499 frames are 6 MB, which stay in a GPU's L2 cache
    lengths : [B] int32, each 1..T; of the queries all are computed
    kernel  : "auto", "torch" or "triton"

    Raises UserError when "triton" is asked for where it cannot run.
    """
    if q.shape[-1] not in HEAD_SIZES and kernel == "auto":
        kernel = "torch"
    if choose_kernel(kernel, q.device) == "torch":
        return _torch(q, k, v, gates(raw.float(), gate).transpose(1, 2), bias, lengths)
    return _triton(q, k, v, raw, gate, bias, lengths)


def gates(raw: Tensor, gate: Tensor) -> Tensor:
    """Share of the relative bias that a query takes (WavLM eq. 4-6): [..., H] from the two raw gates [..., 2 H]."""
    a, b = raw.unflatten(-1, (-1, 2)).sigmoid().unbind(-1)
    return a * (b * gate - 1.0) + 2.0


def _torch(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    frames = q.shape[2]
    unheard = torch.arange(frames, device=q.device) >= lengths[:, None]
    scores = (gate[..., None] * bias[:, :, :frames]).masked_fill_(unheard[:, None, None], -torch.inf)
    single = q.float(), k.float(), v.float()
    if q.device.type == "cuda":  # which wants rows that begin at multiples of 16 bytes
        single = single[0].contiguous(), single[1].contiguous(), single[2].contiguous()
    return F.scaled_dot_product_attention(single[0], single[1], single[2], attn_mask=scores).to(v.dtype)


@jit
def _step(state, q, gate, k_ptr, v_ptr, bias_ptr, key, length, stride_t, scale, inside, coordinate, LAST: tl.constexpr):
    """A block of keys: running maximum, sum and mix after it. Only the last one may hold keys that do not count."""
    highest, total, y = state
    at = key[:, None] * stride_t + coordinate[None, :]
    # a row of bias holds whole blocks of keys, so that no mask parts a vector
    bias = tl.load(bias_ptr + key[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    if LAST:
        heard = key < length
        k = tl.load(k_ptr + at, mask=heard[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=heard[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") + gate[:, None] * bias
    if LAST:
        score = tl.where(heard[None, :], score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score, 1))
    shrink = tl.exp2((highest - new_highest) * scale)
    p = tl.exp2(score * scale - (new_highest * scale)[:, None])
    total = total * shrink + tl.sum(p, 1)
    y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
    return new_highest, total, y


@jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    raw_ptr,
    gate_ptr,
    bias_ptr,
    lengths_ptr,
    out_ptr,
    stride_b,
    stride_h,
    stride_t,
    raw_stride_b,
    raw_stride_t,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    bias_stride_h,
    bias_stride_t,
    heads,
    frames,
    scale,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program is one block of queries of one head of one window.

    Scores are in units of q k^T; times `scale`, which holds log2 e since exp2 is the faster one, they are exponents.
    """
    window, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    inside = query < frames
    coordinate, key = tl.arange(0, E), tl.arange(0, KEYS)
    base = window.to(tl.int64) * stride_b + head * stride_h
    q = tl.load(q_ptr + base + query[:, None] * stride_t + coordinate[None, :], mask=inside[:, None], other=0.0)
    raw_ptr += window.to(tl.int64) * raw_stride_b + query * raw_stride_t + 2 * head
    a = tl.sigmoid(tl.load(raw_ptr, mask=inside, other=0.0).to(tl.float32))
    b = tl.sigmoid(tl.load(raw_ptr + 1, mask=inside, other=0.0).to(tl.float32))
    gate = (a * (b * tl.load(gate_ptr + head) - 1.0) + 2.0) * (1.4426950408889634 / scale)
    length = tl.load(lengths_ptr + window)
    bias_ptr += head * bias_stride_h + query[:, None] * bias_stride_t
    k_ptr += base
    v_ptr += base

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    y = tl.zeros([QUERIES, E], tl.float32)
    whole = length // KEYS * KEYS
    for first in range(0, whole, KEYS):
        state = highest, total, y
        highest, total, y = _step(
            state, q, gate, k_ptr, v_ptr, bias_ptr, first + key, length, stride_t, scale, inside, coordinate, False
        )
    if whole < length:
        state = highest, total, y
        highest, total, y = _step(
            state, q, gate, k_ptr, v_ptr, bias_ptr, whole + key, length, stride_t, scale, inside, coordinate, True
        )
    out = out_ptr + window.to(tl.int64) * out_stride_b + head * out_stride_h
    out += query[:, None] * out_stride_t + coordinate[None, :]
    tl.store(out, (y / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])


def _triton(q: Tensor, k: Tensor, v: Tensor, raw: Tensor, gate: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    batch, heads, frames, size = q.shape
    bias = F.pad(bias, (0, -bias.shape[2] % KEYS)) if bias.shape[2] % KEYS else bias.contiguous()
    if k.stride() != q.stride() or v.stride() != q.stride() or q.stride(3) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    raw = raw if raw.stride(2) == 1 else raw.contiguous()
    out = torch.empty(batch, frames, heads, size, dtype=v.dtype, device=v.device).transpose(1, 2)
    _attention_kernel[(-(-frames // QUERIES), batch * heads)](
        q,
        k,
        v,
        raw,
        gate,
        bias,
        lengths,
        out,
        *q.stride()[:3],
        *raw.stride()[:2],
        *out.stride()[:3],
        *bias.stride()[:2],
        heads,
        frames,
        LOG2_E * size**-0.5,
        E=size,
        QUERIES=QUERIES,
        KEYS=KEYS,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out


_STRIDES = (
    *("stride_b", "stride_h", "stride_t", "raw_stride_b", "raw_stride_t"),
    *("out_stride_b", "out_stride_h", "out_stride_t", "bias_stride_h", "bias_stride_t"),
)
SHIPPED = [
    Shipped(
        f"gated attention, {dtype}",
        _attention_kernel,
        dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "raw_ptr", "out_ptr"), f"*{dtype}")
        | {"gate_ptr": "*fp32", "bias_ptr": "*fp16", "lengths_ptr": "*i32", "scale": "fp32"}
        | dict.fromkeys((*_STRIDES, "heads", "frames"), "i32"),
        {"E": 64, "QUERIES": QUERIES, "KEYS": KEYS},
        NUM_WARPS,
        aligned=_STRIDES,  # all strides, where rows hold a multiple of 16 numbers; without it no load is a vector
        num_stages=NUM_STAGES,
    )
    for dtype in ("fp16", "bf16")
]
