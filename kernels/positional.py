"""A grouped convolution of many taps over time, with GELU: the positional convolution of WavLM, for inference.

Shape letters: B windows, T frames, D width, G groups, I = D / G channels of a group, K taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.gelu import gelu
from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, tl

TOGETHER = 5  # outputs of a row: 240 columns of 256 for groups of 48, where one would fill 48 of 64
FRAMES = 8  # of a program that regroups


class Blocks(NamedTuple):
    """Cut of the product: rows and columns of a program, numbers of a step of its loop."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# measured on an H100 with 64, 8 and 1 windows; blocks of 256 x 128 take a tenth less for 64, but spill on sm_100
MANY, FEW = Blocks(128, 256, 64, 8, 3), Blocks(64, 64, 64, 4, 4)


class PositionalConvolution:
    """GELU of the convolution of x [B, T, D], zero from its frames[b] frames on and around it.

    Output t sees the inputs t - K // 2 .. t - K // 2 + K - 1. The result has the dtype of x (that of the twin on a CPU
    is float32). cuDNN has no tensor-core kernel for such groups. Ours multiplies without copying each input K times:
    where the frames of a group lie one after the other, the inputs of an output are I K numbers in a row, so that the
    convolution is a matrix product whose left rows overlap in memory.

    weight, bias : [D, I, K] and [D] as torch has them, of the dtype and on the device of x; the kernel takes 16 bit
    kernel       : "auto", "torch" or "triton"

    Raises UserError when "triton" is asked for where it cannot run.
    """

    def __init__(self, weight: Tensor, bias: Tensor, kernel: str = "auto") -> None:
        width, inner, self.taps = weight.shape
        self.groups = width // inner
        self.kernel = "torch" if weight.dtype == torch.float32 else choose_kernel(kernel, weight.device)
        self.weight, self.bias = together(weight) if self.kernel == "triton" else weight, bias

    def __call__(self, x: Tensor, frames: Tensor) -> Tensor:
        """x : [B, T, D], frames : [B] int32."""
        return self._triton(x, frames) if self.kernel == "triton" else self._torch(x, frames)

    def _torch(self, x: Tensor, frames: Tensor) -> Tensor:
        real = torch.arange(x.shape[1], device=x.device) < frames[:, None]
        x, weight, bias = x.masked_fill(~real[:, :, None], 0.0), self.weight, self.bias
        if x.device.type == "cpu":  # oneDNN's grouped convolutions in bfloat16 are wrong on AMX for some group widths
            x, weight, bias = x.float(), weight.float(), bias.float()
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=self.taps // 2, groups=self.groups)
        return F.gelu(y[:, :, : x.shape[1]].transpose(1, 2))

    def _triton(self, x: Tensor, frames: Tensor) -> Tensor:
        batch, count, width = x.shape
        _, columns, depth = self.weight.shape
        inner, each = width // self.groups, -(-count // TOGETHER)
        long = each * TOGETHER + self.taps - 1
        apart = torch.empty(self.groups, batch, long, inner, dtype=x.dtype, device=x.device)
        _regroup_kernel[(-(-long // FRAMES), batch)](
            x.contiguous(), frames, apart, count, width, long, self.taps // 2,
            INNER=inner, FRAMES=FRAMES, BLOCK_D=next_power_of_2(width),
        )  # fmt: skip
        out = torch.empty(batch, count, width, dtype=x.dtype, device=x.device)
        blocks = blocks_for(batch * each)
        grid = (-(-batch * each // blocks.rows) * -(-columns // blocks.columns), self.groups)
        _product_kernel[grid](
            apart, self.weight, self.bias, out, batch * each, each, count, width, long, depth,
            INNER=inner, TOGETHER=TOGETHER, EVEN=depth % blocks.depth == 0,
            BLOCK_M=blocks.rows, BLOCK_N=blocks.columns, BLOCK_K=blocks.depth,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        return out


def together(weight: Tensor) -> Tensor:
    """The weight as the kernel takes it, [G, 5 I, (K + 4) I], of one [D, I, K].

    Five outputs that follow each other are one row of a product: the taps of the second stand one frame later than
    those of the first.
    """
    width, inner, taps = weight.shape
    by_tap = weight.view(width // inner, inner, inner, taps).transpose(2, 3)  # [G, out, K, in]
    shifted = [F.pad(by_tap, (0, 0, j, TOGETHER - 1 - j)) for j in range(TOGETHER)]
    return torch.stack(shifted, 1).flatten(1, 2).flatten(2)


def blocks_for(rows: int) -> Blocks:
    """The blocks for so many rows of a group, 100 a window of ten seconds."""
    return MANY if rows > 400 else FEW


@jit
def _regroup_kernel(
    x_ptr,
    frames_ptr,
    out_ptr,
    count,
    width,
    long,
    before,
    INNER: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[B, T, D] with zeros around it -> [G, B, long, I]; one program is some frames of one window."""
    window = tl.program_id(1).to(tl.int64)
    to, d = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES), tl.arange(0, BLOCK_D)
    frame = to - before
    heard = (frame >= 0) & (frame < tl.load(frames_ptr + window))
    at = (window * count + frame)[:, None] * width + d[None, :]
    x = tl.load(x_ptr + at, mask=heard[:, None] & (d < width)[None, :], other=0.0)
    group = tl.num_programs(1).to(tl.int64) * long * INNER
    at = (window * long + to)[:, None] * INNER + (d // INNER * group + d % INNER)[None, :]
    tl.store(out_ptr + at, x, mask=(to < long)[:, None] & (d < width)[None, :])


@jit
def _product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    each,
    count,
    width,
    long,
    depth,
    INNER: tl.constexpr,
    TOGETHER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program is some rows, each of some outputs of a window, and columns of one group."""
    columns = TOGETHER * INNER
    blocks = tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    # what is beyond the end reads the last row or column and is not written, so that no load has a mask
    read, known = tl.minimum(row, rows - 1), tl.minimum(column, columns - 1)
    k = tl.arange(0, BLOCK_K)
    x_at = (group * (rows // each) + read // each) * (long * INNER) + (read % each) * columns
    x_ptr += x_at[:, None] + k[None, :]
    weight_ptr += group * columns * depth + (known * depth)[None, :] + k[:, None]
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        if EVEN:
            x, weight = tl.load(x_ptr), tl.load(weight_ptr)
        else:
            x = tl.load(x_ptr, mask=(first + k < depth)[None, :], other=0.0)
            weight = tl.load(weight_ptr, mask=(first + k < depth)[:, None], other=0.0)
        y = tl.dot(x, weight, y)
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K
    channel = group * INNER + known % INNER
    y = gelu(y + tl.load(bias_ptr + channel).to(tl.float32)[None, :])
    window, frame = row // each, (row % each * TOGETHER)[:, None] + (column // INNER)[None, :]
    at = (window.to(tl.int64) * count)[:, None] * width + frame * width + (group * INNER + column % INNER)[None, :]
    wanted = (frame < count) & (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=wanted)


def _shipped(blocks: Blocks, kind: str) -> Shipped:
    return Shipped(
        f"positional, blocks of {blocks.rows}, {kind}",
        _product_kernel,
        dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{kind}")
        | dict.fromkeys(("rows", "each", "count", "width", "long", "depth"), "i32"),
        {"INNER": 48, "TOGETHER": TOGETHER, "EVEN": True}
        | {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_K": blocks.depth},
        blocks.warps,
        aligned=("width", "depth"),  # 768 and 6,336
        num_stages=blocks.stages,
    )


SHIPPED = [
    *(_shipped(blocks, "fp16") for blocks in (MANY, FEW)),
    _shipped(MANY, "bf16"),
    Shipped(
        "regroup",
        _regroup_kernel,
        {"x_ptr": "*fp16", "frames_ptr": "*i32", "out_ptr": "*fp16"}
        | dict.fromkeys(("count", "width", "long", "before"), "i32"),
        {"INNER": 48, "FRAMES": FRAMES, "BLOCK_D": 1024},
        aligned=("width", "before"),  # 768 and 64
    ),
]
