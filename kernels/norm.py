"""Layer norm of a sum, its copy in 16 bit and its mean over time, in one pass, for inference.

Shape letters: B windows, T frames of each, D width, C chunks of frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, tl

ROWS = 8  # frames of a program
NUM_WARPS = 4


def norm_of_sum(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    frames: Tensor,
    dtype: torch.dtype,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """z = norm(x + y) as float32 [B, T, D], the same in `dtype`, and parts of its mean over real frames [B, C, D].

    The mean of window b over its first frames[b] frames is the sum of its C parts; two programs never add to the same
    number, so the same input gives the same bits.

    x      : [B, T, D] of any floating dtype, y : the same or None
    weight, bias : [D] float32
    frames : [B] int32, each 1..T
    kernel : "auto", "torch" or "triton"

    Raises UserError when "triton" is asked for where it cannot run.
    """
    if choose_kernel(kernel, x.device) == "torch":
        x = x.float() if y is None else x.float() + y.float()
        z = F.layer_norm(x, weight.shape, weight, bias, eps)
        real = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[:, :, None]
        return z, z.to(dtype), (z * (real / frames[:, None, None])).sum(1, keepdim=True)
    batch, count, width = x.shape
    chunks = -(-count // ROWS)
    z = torch.empty(batch, count, width, device=x.device)
    rounded = z if dtype == torch.float32 else torch.empty(batch, count, width, dtype=dtype, device=x.device)
    means = torch.empty(batch, chunks, width, device=x.device)
    x = x.contiguous()
    _norm_kernel[(chunks, batch)](
        x, x if y is None else y.contiguous(), weight, bias, frames, z, rounded, means, count, width, eps,
        SUM=y is not None, ROUND=dtype != torch.float32, ROWS=ROWS, BLOCK_D=next_power_of_2(width),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return z, rounded, means


@jit
def _norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    frames_ptr,
    z_ptr,
    rounded_ptr,
    means_ptr,
    count,
    width,
    eps,
    SUM: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program is some frames of one window."""
    window = tl.program_id(1)
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = (window.to(tl.int64) * count + row)[:, None] * width + d[None, :]
    inside = (row < count)[:, None] & (d < width)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SUM:
        x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < width, other=0.0)
    bias = tl.load(bias_ptr + d, mask=d < width, other=0.0)
    mean = tl.sum(x, 1) / width
    x = tl.where((d < width)[None, :], x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    z = x * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(z_ptr + at, z, mask=inside)
    if ROUND:
        tl.store(rounded_ptr + at, z.to(rounded_ptr.dtype.element_ty), mask=inside)
    frames = tl.load(frames_ptr + window)
    total = tl.sum(tl.where((row < frames)[:, None], z, 0.0), 0) / frames
    tl.store(means_ptr + (window * tl.num_programs(0) + tl.program_id(0)) * width + d, total, mask=d < width)


SHIPPED = [
    Shipped(
        f"norm of a sum, {dtype}",
        _norm_kernel,
        dict.fromkeys(("weight_ptr", "bias_ptr", "x_ptr", "z_ptr", "means_ptr"), "*fp32")
        | {"y_ptr": f"*{dtype}", "rounded_ptr": f"*{dtype}", "frames_ptr": "*i32"}
        | {"count": "i32", "width": "i32", "eps": "fp32"},
        {"SUM": True, "ROUND": True, "ROWS": ROWS, "BLOCK_D": 1024},
        NUM_WARPS,
        aligned=("width",),
    )
    for dtype in ("fp16", "bf16")
]
