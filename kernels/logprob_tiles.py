"""Log-probs over a wide vocabulary on a CPU: tiles of logits that stay in the cache, for any number of tokens.

A row of 151,936 logits is 594 KiB, so that whatever goes over whole rows goes over memory. Here the hidden states
of 256 tokens meet 2,048 rows of the head at a time, and all that is asked of those logits is asked while they are in
the cache. Each tile leaves three numbers a row, and the row's own are made of those at the end, as in Milakov and
Gimelshein (2018, arXiv 1805.02867). The backward pass makes the tiles again. At M = 256, V = 151,936 and D = 64 both
passes take 1.3 times as long as the three products over whole logits (docs/log.md).

Shape letters: M packed tokens, R tokens of a tile, D hidden width, V vocabulary, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmart.kernels.logprob_rows import Rows, Slopes

TILE_ROWS, TILE_COLUMNS = 256, 2048


def tiles_forward(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, rows: Rows) -> None:
    """Fill `rows` [M, 1] for hidden [M, D], weight [V, D] and ids [M]; raises IndexError for an id that V has not."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
        raise IndexError(f"an id is outside 0 … {len(weight) - 1}")
    dtype, blocks = rows.peak.dtype, -(-len(weight) // TILE_COLUMNS)
    peak, total, weighted = (hidden.new_empty(blocks, len(hidden), 1, dtype=dtype) for _ in range(3))
    chosen, least = torch.empty_like(rows.peak), torch.finfo(dtype).min
    exps = _scratch(hidden, weight, dtype)
    for tile in _tiles(hidden, weight, ids, temperature, dtype):
        x, e = tile.logits, _shaped(exps, tile.states, tile.weight)
        top = peak[tile.block, tile.part]
        torch.amax(x, dim=1, keepdim=True, out=top)
        top.clamp_(min=least)  # a tile of nothing but -inf: x less it is -inf
        if len(tile.row):
            chosen[tile.part][tile.row, 0] = x[tile.row, tile.column]
        torch.exp(x.sub_(top).clamp_(min=least), out=e)  # so that a probability of 0 times its logit is 0, not NaN
        torch.sum(e, dim=1, keepdim=True, out=total[tile.block, tile.part])
        torch.sum(x.mul_(e), dim=1, keepdim=True, out=weighted[tile.block, tile.part])
    torch.amax(peak, dim=0, out=rows.peak)
    peak.sub_(rows.peak).clamp_(min=least)
    scale = peak.exp()
    whole = (total * scale).sum(dim=0)
    whole.masked_fill_(whole == 0.0, torch.nan)  # a row of nothing but -inf
    mean = (weighted * scale + total * (peak * scale)).sum(dim=0) / whole  # total * peak could overflow
    torch.log(whole, out=rows.log_total)
    torch.sub(chosen - rows.peak, rows.log_total, out=rows.logprob)
    torch.sub(rows.log_total, mean, out=rows.entropy)


def tiles_backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    rows: Rows,
    slopes: Slopes,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients with respect to hidden and weight, as far as `wanted`, times the temperature."""
    dtype = rows.peak.dtype
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
    grad_weight = torch.empty_like(weight, dtype=dtype) if wanted[1] else None
    grad_blocks = () if grad_weight is None else grad_weight.split(TILE_COLUMNS)
    if not len(hidden) and grad_weight is not None:
        grad_weight.zero_()
    for tile in _tiles(hidden, weight, ids, temperature, dtype):
        of, slope = rows.part(tile.part), slopes.part(tile.part)
        p = tile.logits.sub_(of.peak).sub_(of.log_total).exp_()
        moved = None
        if slope.entropy is not None:
            moved = torch.special.xlogy(p, p).addcmul_(p, of.entropy)
        p.mul_(slope.row)
        if moved is not None and slope.entropy is not None:
            p.addcmul_(moved, slope.entropy, value=-1.0)
        if len(tile.row):
            p[tile.row, tile.column] += slope.chosen[tile.row, 0]
        if grad_hidden is not None:
            grad_hidden[tile.part].addmm_(p, tile.weight)
        if grad_blocks and tile.part.start == 0:
            torch.mm(p.t(), tile.states, out=grad_blocks[tile.block])
        elif grad_blocks:
            grad_blocks[tile.block].addmm_(p.t(), tile.states)
    return grad_hidden, grad_weight


class _Tile(NamedTuple):
    """Logits of some tokens and some of the vocabulary.

    part        : which tokens
    block       : which columns: number of the block of `TILE_COLUMNS`
    states      : their hidden states [R, D], in the dtype of the logits
    weight      : their rows of the head [C, D], in the dtype of the logits
    logits      : tempered, [R, C]; the next tile is made in the same memory
    row, column : of the ids that are in the tile, int64 [K] each
    """

    part: slice
    block: int
    states: Tensor
    weight: Tensor
    logits: Tensor
    row: Tensor
    column: Tensor


def _tiles(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype) -> Iterator[_Tile]:
    scratch, blocks = _scratch(hidden, weight, dtype), weight.split(TILE_COLUMNS)
    edges = torch.arange(0, (len(blocks) + 1) * TILE_COLUMNS, TILE_COLUMNS, device=ids.device)
    for start in range(0, len(hidden), TILE_ROWS):
        part = slice(start, min(start + TILE_ROWS, len(hidden)))
        states = hidden[part].to(dtype)
        inside, row = ids[part].sort()
        first = torch.searchsorted(inside, edges).tolist()
        for block, of_weight in enumerate(blocks):
            wide = of_weight.to(dtype)
            x = _shaped(scratch, states, wide)
            torch.mm(states, wide.t(), out=x)  # autocast leaves operations with `out` alone
            if temperature != 1.0:
                x.div_(temperature)
            here = slice(first[block], first[block + 1])
            yield _Tile(part, block, states, wide, x, row[here], inside[here] - block * TILE_COLUMNS)


def _scratch(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for one tile."""
    return hidden.new_empty(min(TILE_ROWS, len(hidden)) * min(TILE_COLUMNS, len(weight)), dtype=dtype)


def _shaped(scratch: Tensor, tokens: Tensor, vocabulary: Tensor) -> Tensor:
    """A tile of memory for a row of each."""
    shape = len(tokens), len(vocabulary)
    return scratch[: shape[0] * shape[1]].view(shape)
