"""Keys and values of the tokens so far, laid out for the one query that reads them all.

Shape letters: R rows, T new tokens of each, S slots, K key/value heads, H query heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.machine.files import mkl_knows_processor

BLOCK = 64  # tokens whose values are transposed at once


@dataclass
class LayerCache:
    """One layer's keys and values; all memory, nothing shared.

    kv     : [2, R, K, S, E]; on a CPU float32 where queries have 16 bit: of their products oneDNN would compile, and
             keep, one for every number of slots
    values_transposed : [S // 64, R, K, E, 64], the values of every full block of 64 slots, transposed; None where
             that is of no use. Read so, they and the keys are times one column, which MKL does at 31 GB/s, the memory's
             rate; one row times [S, E] values it does at 13 GB/s (two Zen 4 cores, more than the caches hold). On
             Intel's processors PyTorch's own attention takes 0.7 to 0.9 of the time of these products.
    """

    kv: Tensor
    values_transposed: Tensor | None

    @staticmethod
    def empty(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Uninitialised memory for [R, K, S, E], for queries of this dtype."""
        rows, heads, slots, size = shape
        values_transposed = None
        if device.type == "cpu" and dtype.itemsize <= 4:
            dtype = torch.float32
            if not mkl_knows_processor():
                values_transposed = torch.empty(slots // BLOCK, rows, heads, size, BLOCK)
        return LayerCache(torch.empty(2, *shape, dtype=dtype, device=device), values_transposed)

    def rows(self, keep: Tensor) -> LayerCache:
        """A copy of some rows."""
        return LayerCache(self.kv[:, keep], None if self.values_transposed is None else self.values_transposed[:, keep])

    def put(self, new: Tensor, start: int) -> None:
        """Keys and values [R, T, 2, K, E] of the slots from `start` on."""
        end = start + new.shape[1]
        self.kv[:, :, :, start:end] = new.permute(2, 0, 3, 1, 4)
        if self.values_transposed is not None:
            for block in range(start // BLOCK, end // BLOCK):
                self.values_transposed[block] = self.kv[1, :, :, block * BLOCK : (block + 1) * BLOCK].transpose(-1, -2)

    def attend(self, q: Tensor, end: int, seen: Tensor | None) -> Tensor:
        """Attention of queries q [R K, H / K T, E], scaled already, over the first `end` slots: of the same shape.

        seen : bool [T, end] or [R, 1, T, end], what each may look at; None = everything
        """
        keys, values = self.kv[:, :, :, :end]
        if q.dtype != keys.dtype:
            return self.attend(q.to(keys.dtype), end, seen).to(q.dtype)
        if self.values_transposed is None or q.shape[1] > 1:
            if seen is not None:
                seen = seen.repeat(*[1] * (seen.dim() - 2), q.shape[1] // seen.shape[-2], 1)
            in_rows = q.view(*keys.shape[:2], *q.shape[1:])
            return F.scaled_dot_product_attention(in_rows, keys, values, seen, scale=1.0).view(q.shape)
        scores = keys.flatten(0, 1) @ q.transpose(1, 2)
        if seen is not None:
            scores = scores.view(len(seen), -1, end).masked_fill(~seen[:, 0], -torch.inf).view(scores.shape)
        weights, full = scores.softmax(1), end // BLOCK
        y = values[:, :, full * BLOCK :].flatten(0, 1).transpose(1, 2) @ weights[:, full * BLOCK :]
        for block in range(full):
            part = weights[:, block * BLOCK : (block + 1) * BLOCK]
            y.baddbmm_(self.values_transposed[block].flatten(0, 1), part)
        return y.transpose(1, 2)
