"""Sums and products of the windows of signals, in one pass over the samples and in float64.

Shape letters: B signals, S samples, K taps of a window, C chunks of windows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, tl

WINDOWS = 512  # of a program, 4 a lane: with 8 Triton 3.6 spills; a signal of 10 s at 16 kHz has 63 programs


def window_moments(samples: Tensor, taps: int, stride: int, count: int, kernel: str = "auto") -> tuple[Tensor, Tensor]:
    """Sum [B, K] and sum of products [B, K, K] over `count` windows x[t] = samples[t stride : t stride + K], float64.

    The twin copies all windows, twice 164 MB for 64 signals of 10 s, for one narrow product a signal; the kernel reads
    the samples.

    samples : [B, S] float32; what a window reaches beyond S is silence
    kernel  : "auto" (Triton on a GPU), "torch" or "triton"

    Raises UserError when "triton" is asked for where it cannot run.
    """
    if choose_kernel(kernel, samples.device) == "torch":
        x = F.pad(samples.double(), (0, taps)).unfold(1, taps, stride)[:, :count]
        return x.sum(1), x.transpose(1, 2) @ x
    chunks, samples = -(-count // WINDOWS), samples.contiguous()
    sums = torch.empty(len(samples), chunks, taps, dtype=torch.float64, device=samples.device)
    products = sums.new_empty(len(samples), chunks, taps, taps)
    _moments_kernel[(chunks, len(samples))](
        samples, sums, products, samples.shape[1], count, stride, TAPS=taps, WINDOWS=WINDOWS
    )
    return sums.sum(1), products.sum(1)


@jit
def _moments_kernel(
    samples_ptr, sums_ptr, products_ptr, length, count, stride, TAPS: tl.constexpr, WINDOWS: tl.constexpr
):
    """A chunk of windows of one signal; nothing is added to by two programs, so the same samples give the same bits."""
    signal, place = tl.program_id(1), tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    t = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    samples_ptr += signal.to(tl.int64) * length
    at = t * stride
    for k in tl.static_range(TAPS):
        a = tl.load(samples_ptr + at + k, mask=(t < count) & (at + k < length), other=0.0).to(tl.float64)
        tl.store(sums_ptr + place * TAPS + k, tl.sum(a, axis=0))
        for m in tl.static_range(TAPS):
            if m >= k:
                b = tl.load(samples_ptr + at + m, mask=(t < count) & (at + m < length), other=0.0).to(tl.float64)
                both = tl.sum(a * b, axis=0)
                tl.store(products_ptr + (place * TAPS + k) * TAPS + m, both)
                tl.store(products_ptr + (place * TAPS + m) * TAPS + k, both)


SHIPPED = [
    Shipped(
        "window moments",
        _moments_kernel,
        {"samples_ptr": "*fp32", "sums_ptr": "*fp64", "products_ptr": "*fp64"}
        | dict.fromkeys(("length", "count", "stride"), "i32"),
        {"TAPS": 10, "WINDOWS": WINDOWS},
        aligned=("length",),  # 160,000
    )
]
