"""The pieces a policy was trained on, as what its outputs are compared with to see copies. Letters as in `ngrams`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastsmart.music.ngrams import Windows, figures, ngrams
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch

if TYPE_CHECKING:
    from scipy import sparse

NGRAM = 4  # tokens, about one note


@dataclass(frozen=True)
class TrainingSet:
    """Training pieces, with which outputs are compared to see whether they were copied.

    ngrams  : sorted distinct keys of its token 4-grams, uint64
    figures : sorted distinct keys of its four-note figures, uint64 [F]
    pieces  : which piece has which figure, float32 0/1 [F, P], sparse
    """

    ngrams: np.ndarray
    figures: np.ndarray
    pieces: sparse.csr_matrix

    @staticmethod
    def of(dataset: TokenDataset) -> TrainingSet:
        """The n-grams and figures of an encoded dataset."""
        tokens = TokenBatch(np.asarray(dataset.ids, np.int32), dataset.offsets)
        found = figures(decode(tokens, dataset.vocab))
        keys, row = np.unique(found.key, return_inverse=True)
        from scipy import sparse

        ones = np.ones(len(row), np.float32)
        pieces = sparse.csr_matrix((ones, (row, found.owner)), shape=(len(keys), len(dataset)))
        pieces.data[:] = 1.0  # how often is of no interest
        return TrainingSet(np.unique(ngrams(tokens, NGRAM).key), keys, pieces)

    def distance(self, windows: Windows) -> np.ndarray:
        """`training_distance` of each output from its figures, float64 [N]; NaN for an output without figures."""
        from scipy import sparse

        at = np.minimum(np.searchsorted(self.figures, windows.key), len(self.figures) - 1)
        known = self.figures[at] == windows.key
        ones = np.ones(known.sum(), np.float32)
        shape = (windows.count, len(self.figures))
        found = sparse.csr_matrix((ones, (windows.owner[known], at[known])), shape=shape) @ self.pieces
        with np.errstate(invalid="ignore"):
            return 1.0 - found.max(axis=1).toarray()[:, 0] / windows.totals
