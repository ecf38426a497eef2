"""A convolution of one channel into many and GELU, in one pass over its output, for inference.

Shape letters: B signals, S samples, T outputs of each, K taps, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.gelu import gelu
from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, tl

BLOCK_T, BLOCK_C = 64, 128  # outputs of a program, and channels of a step of it
NUM_WARPS = 4


def convolution_gelu(
    samples: Tensor, weight: Tensor, bias: Tensor, stride: int, dtype: torch.dtype, kernel: str = "auto"
) -> Tensor:
    """GELU(sum_k samples[b, stride t + k] weight[b, k, c] + bias[b, c]), [B, T, C] in `dtype`, computed in float32.

    With one channel in, the arithmetic is little and the output is all: the kernel writes it once, in 16 bit, instead
    of writing, reading and writing it again around a matrix product. Tensor cores multiply, each number as the sum of
    two of float16, which is all but float32; where `dtype` is float32, numbers are multiplied as they are.

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
    samples, weight, bias = samples.contiguous(), weight.contiguous(), bias.contiguous()
    _convolution_kernel[(-(-outputs // BLOCK_T), batch)](
        samples,
        weight,
        bias,
        out,
        samples.shape[1],
        outputs,
        channels,
        stride,
        TAPS=taps,
        PADDED=max(16, next_power_of_2(taps)),
        SPLIT=dtype != torch.float32,
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
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program is some outputs of one signal, all channels of them, block by block."""
    signal = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, PADDED)
    samples_ptr += signal.to(tl.int64) * length
    weight_ptr += signal * TAPS * channels
    out_ptr += signal.to(tl.int64) * outputs * channels
    known = (t < outputs)[:, None] & (k < TAPS)[None, :]
    x = tl.load(samples_ptr + t[:, None] * stride + k[None, :], mask=known, other=0.0)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        w = tl.load(
            weight_ptr + k[:, None] * channels + c[None, :],
            mask=(k < TAPS)[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        bias = tl.load(bias_ptr + signal * channels + c, mask=c < channels, other=0.0)
        if SPLIT:
            x_high, w_high = x.to(tl.float16), w.to(tl.float16)
            x_low = (x - x_high.to(tl.float32)).to(tl.float16)
            w_low = (w - w_high.to(tl.float32)).to(tl.float16)
            y = tl.dot(x_high, w_high, tl.dot(x_high, w_low, tl.dot(x_low, w_high)))
        else:
            y = tl.dot(x, w, input_precision="ieee")
        y = gelu(y + bias[None, :])
        at = t[:, None] * channels + c[None, :]
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(t < outputs)[:, None] & (c < channels)[None, :])


SHIPPED = [
    Shipped(
        f"convolution and GELU, {dtype}",
        _convolution_kernel,
        dict.fromkeys(("samples_ptr", "weight_ptr", "bias_ptr"), "*fp32")
        | {"out_ptr": f"*{dtype}"}
        | dict.fromkeys(("length", "outputs", "channels", "stride"), "i32"),
        {"TAPS": 10, "PADDED": 16, "SPLIT": True, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C},
        NUM_WARPS,
        aligned=("length", "channels"),  # 160,000 and 512
    )
    for dtype in ("fp16", "bf16")
]
