"""A convolution of one channel into many and GELU, in one pass over its output, for inference.

Shape letters: B signals, S samples, T outputs of each, K taps, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, tl

BLOCK_T, BLOCK_C = 16, 128  # outputs and channels of a program
NUM_WARPS = 4


def convolution_gelu(
    samples: Tensor, weight: Tensor, bias: Tensor, stride: int, dtype: torch.dtype, kernel: str = "auto"
) -> Tensor:
    """GELU(sum_k samples[b, stride t + k] weight[b, k, c] + bias[b, c]), [B, T, C] in `dtype`, computed in float32.

    With one channel in, the arithmetic is nothing and the output is all: the kernel writes it once, in 16 bit, instead
    of writing, reading and writing it again around a matrix product.

    samples : [B, S] float32; T = (S - K) // stride + 1
    weight  : [B, K, C] float32, bias : [B, C] float32, of each signal its own
    kernel  : "auto", "torch" or "triton"

    Raises UserError when "triton" is asked for where it cannot run.
    """
    if choose_kernel(kernel, samples.device) == "torch":
        windows = samples.unfold(1, weight.shape[1], stride)
        return F.gelu(torch.baddbmm(bias[:, None], windows, weight)).to(dtype)
    batch, taps, channels = weight.shape
    outputs = (samples.shape[1] - taps) // stride + 1
    out = torch.empty(batch, outputs, channels, dtype=dtype, device=samples.device)
    grid = (-(-outputs // BLOCK_T), -(-channels // BLOCK_C), batch)
    samples, weight, bias = samples.contiguous(), weight.contiguous(), bias.contiguous()
    _convolution_kernel[grid](
        samples,
        weight,
        bias,
        out,
        samples.shape[1],
        outputs,
        channels,
        stride,
        TAPS=taps,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
        num_warps=NUM_WARPS,
    )
    return out


@jit
def _convolution_kernel(
    samples_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    length,
    outputs,
    channels,
    stride,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    signal = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    samples_ptr += signal.to(tl.int64) * length
    weight_ptr += signal * TAPS * channels
    bias = tl.load(bias_ptr + signal * channels + c, mask=c < channels, other=0.0)
    y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32) + bias[None, :]
    for k in tl.static_range(TAPS):
        x = tl.load(samples_ptr + t * stride + k, mask=t < outputs, other=0.0)
        w = tl.load(weight_ptr + k * channels + c, mask=c < channels, other=0.0)
        y += x[:, None] * w[None, :]
    y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    at = (signal.to(tl.int64) * outputs + t[:, None]) * channels + c[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(t < outputs)[:, None] & (c < channels)[None, :])


SHIPPED = [
    Shipped(
        f"convolution and GELU, {dtype}",
        _convolution_kernel,
        dict.fromkeys(("samples_ptr", "weight_ptr", "bias_ptr"), "*fp32")
        | {"out_ptr": f"*{dtype}"}
        | dict.fromkeys(("length", "outputs", "channels", "stride"), "i32"),
        {"TAPS": 10, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C},
        NUM_WARPS,
        aligned=("length", "channels"),  # 160,000 and 512
    )
    for dtype in ("fp16", "bf16")
]
