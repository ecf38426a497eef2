"""A checkpoint of M3, CLaMP 2 or CLaMP 3 that reads notes: clips in, one vector each out. Shape letters: N clips, D."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastsmart.notes import NoteBatch
from fastsmart.reward.clamp3.architecture import SEGMENT
from fastsmart.reward.clamp3.encoder import Segment, make_encoder
from fastsmart.reward.clamp3.mtf import notes_text, patches
from fastsmart.reward.clamp3.weights import read_weights


class MusicReader:
    """The encoder of music of a checkpoint, on a device.

    checkpoint : as of `reward.clamp_checkpoint`

    kind   : "M3", "CLaMP 2" or "CLaMP 3"
    sha256 : of its weights
    random : whether they were drawn at random, so that no vector means anything

    Raises UserError when the weights are missing, broken or of another model.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu") -> None:
        weights = read_weights(checkpoint)
        self.kind, self.sha256, self.random = weights.kind.name, weights.sha256, weights.random
        self.width, self.projects = weights.size.out, bool(weights.kind.music_projection)
        self.encoder = make_encoder(weights, device)
        self._last: tuple[NoteBatch | None, str, np.ndarray] = (None, "", np.zeros(0))

    @staticmethod
    def shared(checkpoint: str | Path, device: str = "cpu") -> MusicReader:
        """A reader that is loaded once, as long as no other checkpoint or device is asked for."""
        return _shared(str(checkpoint), device)

    def read(self, notes: NoteBatch, writer: str = "note_on") -> np.ndarray:
        """Vectors of clips, float32 [N, D], not of length 1; `writer` as of `notes_text`.

        Those of the batch that was read last are kept: a run's terms ask for the same one after the other.
        """
        before, how, vectors = self._last
        if before is notes and how == writer:
            return vectors
        vectors = self.read_patches([patches(notes_text(notes, i, writer)) for i in range(len(notes))])
        self._last = notes, writer, vectors
        return vectors

    def read_patches(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Vectors of pieces that are patches, uint8 [P, 64] each.

        A piece of more than 512 is read in segments of 512, the last of them the last 512. CLaMP averages segments by
        their length, the last by what is left for it; M3 counts every patch once.
        """
        segments: list[Segment] = []
        piece: list[int] = []
        weight: list[int] = []
        for i, table in enumerate(pieces):
            whole, rest = divmod(len(table), SEGMENT)
            parts = [Segment(table[at * SEGMENT : (at + 1) * SEGMENT], SEGMENT) for at in range(whole)]
            if rest:
                last = table[-SEGMENT:]
                parts.append(Segment(last, len(last) if self.projects else rest))
            segments += parts
            piece += [i] * len(parts)
            weight += [SEGMENT] * whole + [rest] * (rest > 0)
        vectors = self.encoder(segments).double().cpu().numpy()
        sums = np.zeros((len(pieces), self.width))
        np.add.at(sums, np.array(piece, np.int64), vectors * np.array(weight, np.float64)[:, None])
        lengths = np.array([len(table) for table in pieces], np.float64)
        return (sums / lengths[:, None]).astype(np.float32)


@lru_cache(maxsize=1)
def _shared(checkpoint: str, device: str) -> MusicReader:
    return MusicReader(checkpoint, device)
