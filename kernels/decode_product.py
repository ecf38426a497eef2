"""The matrix products of a decode step with what stands before and after them: 16 to 128 rows, weights of 16 bit.

A layer is four of these and one attention (`fastsmart.kernels.decode_step`), five kernels. Each is over in some
microseconds, so what counts is how many loads wait for each other: a program loads some hundred inputs' weights at
once, before it waits for the kernel before it where a GPU lets it start that early, then its rows at once.

Shape letters: R rows, D inputs, N outputs, F units of the feed-forward, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, overlapped, tl

MOST_ROWS = 128  # beyond which a library's products win


@dataclass(frozen=True)
class Tile:
    """Work of one program: `rows` x `columns` outputs, from `depth` inputs at a time, in `shares` of them."""

    rows: int
    columns: int
    depth: int
    warps: int
    shares: int = 0  # 0 = one a warp


def serves(rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a decode step of so many rows should take these products, or those of a library."""
    return dtype.itemsize == 2 and rows <= MOST_ROWS and choose_kernel("auto", device) == "triton"


def normalised_product(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    ids: Tensor | None = None,
    place: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) @ weight^T, an RMSNorm (arXiv 1910.07467) and a product: [R, N] like `weight`.

    x      : [R, D] of 16 bit, or a table [V, D] of which `ids` int64 [R] names the rows
    weight : [N, D], of the dtype of x or float32, then multiplied as exactly as float32 is
    place  : int64 [2], to which one is added

    `kernel`: "auto" (Triton on a GPU), "torch" or "triton"; raises UserError where that cannot run.
    """
    if choose_kernel(kernel, x.device) == "torch":
        if place is not None:
            place += 1
        return _torch_normalised_product(x if ids is None else x[ids], weight, epsilon).to(weight.dtype)
    return _launch(x, weight, epsilon=epsilon, ids=ids, place=place)


def gated_product(x: Tensor, weight: Tensor, epsilon: float, kernel: str = "auto") -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202) of the normalised product of x [R, D] with weight [2 F, D], gates
    first: [R, F]."""
    if choose_kernel(kernel, x.device) == "torch":
        gate, up = _torch_normalised_product(x, weight, epsilon).chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)
    return _launch(x, weight, epsilon=epsilon, gated=True)


def added_product(
    residual: Tensor, x: Tensor, weight: Tensor, ids: Tensor | None = None, kernel: str = "auto"
) -> Tensor:
    """residual + x @ weight^T: [R, N], in place of the residual unless that is a table.

    residual : [R, N], or a table [V, N] of which `ids` int64 [R] names the rows
    x        : [R, D]; weight: [N, D]
    """
    if choose_kernel(kernel, x.device) == "torch":
        total = (residual if ids is None else residual[ids]).float() + x.float() @ weight.float().t()
        return total.to(x.dtype) if ids is not None else residual.copy_(total)
    return _launch(x, weight, residual=residual, ids=ids)


# ------------------------------------------------------------------------------------------------------- torch twins


def _torch_normalised_product(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()) @ weight.float().t()


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _multiplied(x, weight, total, SPLIT: tl.constexpr):
    """total [SPLIT, ROWS, COLUMNS] + x [SPLIT, ROWS, each] @ weight [SPLIT, COLUMNS, each]^T."""
    if weight.dtype == tl.float32:
        x = x.to(tl.float32)  # 16-bit numbers are exact in tf32
    if SPLIT == 1:
        y = tl.reshape(x, (x.shape[1], x.shape[2]))
        w = tl.trans(tl.reshape(weight, (weight.shape[1], weight.shape[2])))
        total += tl.reshape(tl.dot(y, w, input_precision="tf32x3"), (1, x.shape[1], weight.shape[1]))
    else:
        total = tl.dot(x, tl.permute(weight, (0, 2, 1)), total, input_precision="tf32x3")
    return total


@jit
def _product(
    x,
    weight,
    residual,
    ids,
    place,
    out,
    rows,
    columns,
    epsilon,
    INPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    GATHER: tl.constexpr,
    ADVANCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Outputs ROWS x COLUMNS; warp s takes the s-th of SPLIT shares of every DEPTH inputs."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there, wanted = row < rows, column < columns
    EACH: tl.constexpr = DEPTH // SPLIT
    share = tl.arange(0, SPLIT)[:, None, None] * EACH + tl.arange(0, EACH)[None, None, :]
    from_weight = weight + column[None, :, None] * INPUTS + share
    mask = wanted[None, :, None] & (share < INPUTS)
    # nobody changes weights between the launch of the kernel before and its end
    w = tl.load(from_weight, mask=mask, other=0.0)
    if GATED:
        u = tl.load(from_weight + columns * INPUTS, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    source = row.to(tl.int64)
    if GATHER:
        source = tl.load(ids + row, mask=there, other=0)
    if ADD:
        at_residual = residual + source[:, None] * columns + column[None, :]
        before = tl.load(at_residual, mask=there[:, None] & wanted[None, :], other=0.0).to(tl.float32)
        source = row.to(tl.int64)
    total = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
    total_up = tl.zeros([SPLIT, ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([SPLIT, ROWS], tl.float32)
    for begin in tl.static_range(0, INPUTS, DEPTH):
        if begin > 0:
            mask = wanted[None, :, None] & (begin + share < INPUTS)
            w = tl.load(from_weight + begin, mask=mask, other=0.0)
            if GATED:
                u = tl.load(from_weight + columns * INPUTS + begin, mask=mask, other=0.0)
        mask = there[None, :, None] & (begin + share < INPUTS)
        part = tl.load(x + source[None, :, None] * INPUTS + begin + share, mask=mask, other=0.0)
        if NORM:
            wide = part.to(tl.float32)
            squares += tl.sum(wide * wide, axis=2)
        total = _multiplied(part, w, total, SPLIT)
        if GATED:
            total_up = _multiplied(part, u, total_up, SPLIT)
    result = tl.sum(total, axis=0)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + epsilon)[:, None]
        result *= scale
        if GATED:
            result = result / (1.0 + tl.exp(-result)) * (tl.sum(total_up, axis=0) * scale)
    if ADD:
        result += before
    if ADVANCE:
        counter = tl.arange(0, 2)
        first = counter + 2 * (tl.program_id(0) + tl.program_id(1)) < 2  # of all programs, one
        tl.store(place + counter, tl.load(place + counter) + 1, mask=first)
    at = out + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=there[:, None] & wanted[None, :])


def _is_hopper(device: torch.device) -> bool:
    """Or later, or no GPU, where only the interpreter runs kernels."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(
    x: Tensor,
    weight: Tensor,
    epsilon: float | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    ids: Tensor | None = None,
    place: Tensor | None = None,
) -> Tensor:
    rows = len(x) if ids is None or residual is not None else len(ids)
    columns, inputs = weight.shape[0] // (1 + gated), weight.shape[1]
    if residual is not None and ids is None:
        out = residual
    else:
        out = torch.empty(rows, columns, dtype=weight.dtype, device=x.device)
    if not rows:
        return out
    weight = weight.contiguous()
    tile = choose_tile(rows, columns, inputs, gated, weight.dtype, _is_hopper(x.device))
    _product[(-(-columns // tile.columns), -(-rows // tile.rows))](
        x,
        weight,
        out if residual is None else residual,
        out if ids is None else ids,
        out if place is None else place,
        out,
        rows,
        columns,
        epsilon or 0.0,
        **_constants(tile, inputs),
        NORM=epsilon is not None,
        GATED=gated,
        ADD=residual is not None,
        GATHER=ids is not None,
        ADVANCE=place is not None,
        num_warps=tile.warps,
        **overlapped(x.device),
    )
    return out


def choose_tile(rows: int, columns: int, inputs: int, gated: bool, dtype: torch.dtype, hopper: bool = True) -> Tile:
    """The tile of a product: for 64 rows and the paper's policy the fastest of those tried on an H100, in a whole step.

    64 rows are what a Hopper's tensor cores take at once; fewer, and products of few outputs or float32, have their
    inputs shared among warps. More than four warps were slower wherever they were tried but for the head.

    hopper : whether the GPU has tensor cores that take their operands from shared memory; others lack registers for as
             many inputs at a time
    """
    depth = min(max(64, next_power_of_2(inputs)), 512)
    if dtype == torch.float32:
        return Tile(16, 16, depth, 8 if depth >= 128 else 4)
    if rows <= 32 or columns < 1024:
        return Tile(16, 16, depth, 4)
    return Tile(64, 16, min(depth, 128) if gated or not hopper else depth, 4, shares=1)


def _shipped(kind: str) -> list[Shipped]:
    """The products of the paper's policy, D 512, F 2,048, V 413, for 64 rows and for 16."""
    tensors = dict.fromkeys(("x", "weight", "residual", "out"), f"*{kind}")
    types = tensors | {"ids": "*i64", "place": "*i64", "rows": "i32", "columns": "i32", "epsilon": "fp32"}
    parts = ("NORM", "GATED", "ADD", "GATHER", "ADVANCE")
    products = {
        "qkv": (1536, 512, {"NORM", "GATHER"}),
        "out": (512, 512, {"ADD", "GATHER"}),
        "gate and up": (2048, 512, {"NORM", "GATED"}),
        "down": (512, 2048, {"ADD"}),
        "head": (413, 512, {"NORM", "ADVANCE"}),
    }
    shipped = []
    for rows, hopper in ((64, True), (64, False), (16, True)):
        for name, (columns, inputs, wanted) in products.items():
            head = {"weight": "*fp32", "out": "*fp32"} if name == "head" else {}
            dtype = torch.float32 if head else torch.bfloat16
            gated = name == "gate and up"
            tile, other = (choose_tile(rows, columns, inputs, gated, dtype, h) for h in (hopper, not hopper))
            if not hopper and tile == other:
                continue
            since = 90 if hopper and tile != other else 0
            constants = {part: part in wanted for part in parts} | _constants(tile, inputs)
            aligned = ("rows",) if head else ("rows", "columns")
            case = f"{name}, {rows} rows, {kind}"
            shipped.append(Shipped(case, _product, types | head, constants, tile.warps, aligned, since=since))
    return shipped


def _constants(tile: Tile, inputs: int) -> dict[str, int]:
    return {
        "INPUTS": inputs,
        "DEPTH": tile.depth,
        "SPLIT": tile.shares or tile.warps,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }


SHIPPED = [*_shipped("bf16"), *_shipped("fp16")]
