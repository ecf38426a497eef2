"""The pieces a policy was trained on, as what its outputs are compared with to see copies. Letters as in `ngrams`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastsmart.errors import UserError
from fastsmart.music.ngrams import Windows, figures, ngrams
from fastsmart.notes import MIDI_SUFFIXES
from fastsmart.tokens.dataset import TokenDataset, encode_folder
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

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

    @staticmethod
    def open(source: str | Path, keep: Path, vocab: Vocabulary, progress: Callable[[int, int], None]) -> TrainingSet:
        """The pieces of an encoded dataset, or of a folder of MIDI files, which is encoded once, into `keep`.

        progress : called with the files read, and how many there are

        Raises UserError where the pieces cannot be read, are encoded with another vocabulary, or hold too little.
        """
        folder = Path(source)
        if not (folder / "dataset.json").is_file():
            folder = keep
            if not folder.is_dir() or TokenDataset.open(folder).source != str(Path(source).resolve()):
                encode_folder(source, folder, vocab, 0, lambda done, total, _: progress(done, total))
        dataset = TokenDataset.open(folder)
        if dataset.vocab.tokens != vocab.tokens:
            raise UserError(f"{folder} was encoded with another vocabulary than the policy's; name its MIDI files")
        training = TrainingSet.of(dataset)
        if not len(training.figures):
            raise UserError(f"no piece in {source} has as many as four notes; name what the policy was trained on")
        return training

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


def require_training_set(source: str | Path, where: str) -> None:
    """Raise UserError where this is no folder of MIDI files and no encoded dataset; "" is none that is wanted.

    where : option or key that names it
    """
    if not source:
        return
    files = Path(source).rglob("*")
    if not any(path.suffix.lower() in MIDI_SUFFIXES or path.name == "tokens.bin" for path in files):
        raise UserError(f"{where} {source} holds no MIDI files; name a folder of them, or leave it out")
