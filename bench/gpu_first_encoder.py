"""Checks of gpu_first.py of what the audio encoder does around its attention, each beside its twin and its floor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_first_kernels import EAR_WIDTH, FRAMES
from gpu_look import Finding, Look, apart
from harness import Work

from fastsmart.kernels.norm import norm_of_sum
from fastsmart.kernels.positional import PositionalConvolution

GROUPS, TAPS = 16, 128  # of Audiobox
LIMIT = 2e-3  # of what 16 bit makes of a result


def norm(look: Look) -> Iterator[Finding]:
    """The norm of residual stream and update, with its copy in 16 bit and its mean; the work is to read and write."""
    frames, width, dtype = look.size(FRAMES, 20), look.size(EAR_WIDTH, 48), look.dtype(torch.float16)
    for batch in (2, 8, 64) if not look.quick else (1,):
        x, y = look.normal(batch, frames, width), look.normal(batch, frames, width, dtype=dtype)
        count = torch.full((batch,), frames, dtype=torch.int32, device=look.device)
        count[0] = frames // 2
        norm = look.normal(width), look.normal(width)
        found, exact = (norm_of_sum(x, y, *norm, 1e-5, count, dtype, kernel) for kernel in (look.kernel, "torch"))
        off = max(apart(a.sum(1), b.sum(1)) for a, b in zip(found, exact, strict=True))
        us = look.replayed_us(lambda a=(x, y, *norm, 1e-5, count, dtype): norm_of_sum(*a, look.kernel), 10)
        work = [Work("rows", gbyte=1e-9 * x.numel() * (8 + 2 * dtype.itemsize))]
        yield look.finding(f"{batch} windows", us=us, work=work, apart=off, limit=LIMIT)


def position(look: Look) -> Iterator[Finding]:
    """The positional convolution."""
    frames, taps, dtype = look.size(FRAMES, 20), look.size(TAPS, 8), torch.float16  # that the kernels take
    inner = EAR_WIDTH // GROUPS if not look.quick else 8
    width = inner * look.size(GROUPS, 2)
    weight, bias = look.normal(width, inner, taps) / (inner * taps) ** 0.5, look.normal(width)
    kernel = PositionalConvolution(weight.to(dtype), bias.to(dtype), look.kernel)
    exact = PositionalConvolution(weight.to(dtype).float(), bias.to(dtype).float(), "torch")
    for batch in (1, 8, 64) if not look.quick else (1,):
        x, count = look.normal(batch, frames, width, dtype=dtype), torch.full((batch,), frames, device=look.device)
        count[0] = frames // 2
        off = apart(kernel(x, count), exact(x.float(), count)) if batch == 1 else None
        us = look.replayed_us(lambda a=(x, count): kernel(*a), 5)
        work = [Work("product", 2e-9 * x.numel() * inner * taps, 2e-9 * x.numel() * dtype.itemsize)]
        yield look.finding(f"{batch} windows", us=us, work=work, dtype=dtype, apart=off, limit=LIMIT)
