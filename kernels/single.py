"""Products of float32 matrices on tensor cores, as exact as those of a library in float32.

Each number is taken as two of TF32, and three of the four products of the parts are added up in float32 (3xTF32, as in
CUTLASS). On an H100 the head of the paper's policy, [17408, 512] times [512, 413], takes 134 µs so and 217 by cuBLAS,
at a relative error of 1.5e-7 against 4.0e-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmart.kernels.jit import Shipped, jit, tl, triton

# Of the fastest of six tiles for the head's forward product on an H100 the one that spills no registers
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
WARPS, STAGES = 4, 3
# A product whose result has few tiles is cut along K into so many parts that about this many programs run
PROGRAMS = 792


def single_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a [M, K] times b [K, N], float32 with any strides, to `out` [M, N], and give it.

    K is cut by the shapes alone, and parts are added in order: the same input gives the same bits. K times a stride is
    below 2^31. Needs Triton, and an NVIDIA GPU or its interpreter.
    """
    (m, k), n = a.shape, b.shape[1]
    tiles = triton.cdiv(m, TILE["BLOCK_M"]), triton.cdiv(n, TILE["BLOCK_N"])
    if not (m and n and k):
        return out.zero_()
    parts = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), k // (8 * TILE["BLOCK_K"])))
    length = triton.cdiv(triton.cdiv(k, parts), TILE["BLOCK_K"]) * TILE["BLOCK_K"]
    parts = triton.cdiv(k, length)
    target = out[None] if parts == 1 else out.new_empty(parts, m, n)
    strides = (*a.stride(), *b.stride(), *target.stride())
    _single_product[(*tiles, parts)](
        a, b, target, m, n, k, *strides, length, **TILE, num_warps=WARPS, num_stages=STAGES
    )
    return out if parts == 1 else torch.sum(target, dim=0, out=out)


@jit(varying=("m", "length"))
def _single_product(
    a,
    b,
    out,
    m,
    n,
    k,
    a_m,
    a_k,
    b_k,
    b_n,
    out_part,
    out_m,
    out_n,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the sum over k from part · length to (part + 1) · length."""
    part = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a += row.to(tl.int64)[:, None] * a_m
    b += column.to(tl.int64)[None, :] * b_n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, k), BLOCK_K):
        step = start + tl.arange(0, BLOCK_K)
        left = tl.load(a + step[None, :] * a_k, mask=(row < m)[:, None] & (step < k)[None, :], other=0.0)
        right = tl.load(b + step[:, None] * b_k, mask=(step < k)[:, None] & (column < n)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="tf32x3")
    at = part.to(tl.int64) * out_part + row.to(tl.int64)[:, None] * out_m + column[None, :] * out_n
    tl.store(out + at, total, mask=(row < m)[:, None] & (column < n)[None, :])


def _shipped() -> list[Shipped]:
    """The head's three products: logits, and the gradients of hidden states and weight."""
    types = dict.fromkeys(("a", "b", "out"), "*fp32")
    numbers = ("m", "n", "k", "a_m", "a_k", "b_k", "b_n", "out_part", "out_m", "out_n", "length")
    types |= dict.fromkeys(numbers, "i32")
    # a stride of 1 is a constant at a launch
    cases = {
        "logits": ({"a_k": 1, "b_k": 1, "out_n": 1}, ("n", "k", "a_m", "b_n", "out_m", "out_part")),
        "hidden": ({"a_k": 1, "b_n": 1, "out_n": 1}, ("n", "k", "a_m", "b_k", "out_m", "out_part")),
        "weight": ({"a_m": 1, "b_n": 1, "out_n": 1}, ("n", "a_k", "b_k", "out_m", "out_part")),
    }
    return [
        Shipped(
            f"single product, {name}",
            _single_product,
            {key: kind for key, kind in types.items() if key not in ones},
            TILE | ones,
            num_warps=WARPS,
            aligned=aligned,
        )
        for name, (ones, aligned) in cases.items()
    ]


SHIPPED = _shipped()
