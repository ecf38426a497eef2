"""`TokenBatch`: token sequences of different lengths in one array. Shape letters: N sequences, T tokens of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastsmart.errors import UserError


@dataclass(frozen=True)
class TokenBatch:
    """N token sequences as compressed sparse rows: sequence i is `ids[offsets[i]:offsets[i + 1]]`.

    ids     : int32 [T]
    offsets : int64 [N + 1]

    Raises ValueError when the offsets do not cut `ids` into N pieces.
    """

    ids: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        o = self.offsets
        if len(o) == 0 or o[0] != 0 or o[-1] != len(self.ids) or (o[1:] < o[:-1]).any():
            raise ValueError(f"offsets must rise from 0 to len(ids) = {len(self.ids)}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.row(i) for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each sequence, int64 [N]."""
        return np.diff(self.offsets)

    def row(self, i: int) -> np.ndarray:
        """Ids of sequence i, int32: a view, not a copy."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sequence {i} of a batch of {len(self)}")
        i %= len(self)
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    @staticmethod
    def pack(sequences: Sequence[Sequence[int] | np.ndarray] | np.ndarray) -> TokenBatch:
        """One batch of N sequences of whole numbers (lists, arrays, or the rows of a matrix), in order.

        Raises ValueError for anything but whole numbers, UserError for one that does not fit 32 bits.
        """
        rows = [np.asarray(s) for s in sequences]
        for i, row in enumerate(rows):
            if row.ndim != 1 or (row.dtype.kind not in "iu" and row.size):
                raise ValueError(f"sequence {i} is not a flat list of token ids, but {row.dtype} {list(row.shape)}")
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        wide = np.concatenate([row for row in rows if row.size] or [np.empty(0, np.int32)])
        ids = wide.astype(np.int32, copy=False)
        if (ids != wide).any():
            raise UserError(f"token id {wide[ids != wide][0]} does not fit 32 bits; no vocabulary is as large")
        return TokenBatch(ids, offsets)
