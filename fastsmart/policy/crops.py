"""Training rows cut from an encoded dataset. Shape letters: B rows, T tokens of a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsmart.errors import UserError
from fastsmart.tokens.dataset import TokenDataset

IGNORED = -100  # target of positions that are no target: torch's cross-entropy leaves it out


@dataclass(frozen=True)
class CropSettings:
    """Settings of cutting rows.

    length         : ids a row, at most
    transpose_down, transpose_up : semitones a row may be moved, drawn uniformly, as far as its pitches allow
    bos_share      : share of rows that begin with BOS, so that a policy can also start from nothing
    """

    length: int = 512
    transpose_down: int = 5
    transpose_up: int = 6
    bos_share: float = 0.1

    def __post_init__(self) -> None:
        if self.length < 8:
            raise UserError(f"--length is {self.length}; a row needs at least 8 tokens, a prompt and a note")


class Cropper:
    """Cuts rows that begin at a bar and read as if the piece began there: Bar, TimeSig, Position_0, tempo.

    That is the form of the prompts in reinforcement learning, so every row also teaches the policy to answer a prompt.
    """

    def __init__(self, dataset: TokenDataset, pieces: np.ndarray, settings: CropSettings) -> None:
        vocab = dataset.vocab
        self.dataset, self.settings = dataset, settings
        self.eos, self.bos, self.pad = vocab.eos_id, vocab.bos_id, vocab.pad_id
        self.position_0 = vocab.id("Position_0")
        pitches = vocab.ids_of("Pitch")
        self.pitch_low, self.pitch_high = pitches[0], pitches[-1]
        kinds = {kind: vocab.ids_of(kind) for kind in ("Tempo", "Position")}
        self.is_tempo = np.isin(np.arange(len(vocab)), kinds["Tempo"])
        self.is_position = np.isin(np.arange(len(vocab)), kinds["Position"])
        starts, ends, tempos = zip(*(self._bars(dataset, p) for p in pieces), strict=True)
        if not sum(map(len, starts)):
            raise UserError("no bar with a time signature in these pieces; the vocabulary needs TimeSig tokens")
        self.start, self.end, self.tempo = np.concatenate(starts), np.concatenate(ends), np.concatenate(tempos)

    def _bars(self, dataset: TokenDataset, p: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First token, end of piece and tempo in force (-1: none) of every bar that has events of its own."""
        ids = np.asarray(dataset.piece(p))
        bar, first = np.flatnonzero(ids == dataset.vocab.id("Bar_None")), int(dataset.offsets[p])
        bar = bar[bar + 2 < len(ids)]
        bar = bar[self.is_position[ids[bar + 2]]]  # Bar, TimeSig, Position: neither empty nor a change of meter
        latest = np.maximum.accumulate(np.where(self.is_tempo[ids], np.arange(len(ids)), -1))[bar]
        tempo = np.where(latest >= 0, ids[latest].astype(np.int64), -1)
        return bar + first, np.full(len(bar), first + len(ids)), tempo

    def rows(self, rng: np.random.Generator, count: int, augment: bool = True) -> np.ndarray:
        """`count` random rows, int64 [B, T + 1]: the ids, then EOS where the piece ended, then PAD."""
        out = np.full((count, self.settings.length + 1), self.pad, np.int64)
        for row, b in enumerate(rng.integers(len(self.start), size=count)):
            ids = self._row(int(b), self.settings.length + 1)
            ids = self._transposed(ids, rng) if augment else ids
            if rng.random() < self.settings.bos_share:
                ids = np.concatenate([[self.bos], ids])[: self.settings.length + 1]
            out[row, : len(ids)] = ids
        return out

    def _row(self, b: int, length: int) -> np.ndarray:
        start, end = self.start[b], min(self.start[b] + length, self.end[b])
        ids = self.dataset.ids[start:end].astype(np.int64)
        has_tempo = ids[2] == self.position_0 and len(ids) > 3 and self.is_tempo[ids[3]]
        if not has_tempo and self.tempo[b] >= 0:
            rest = ids[3:] if ids[2] == self.position_0 else ids[2:]
            ids = np.concatenate([ids[:2], [self.position_0, self.tempo[b]], rest])
        if end == self.end[b]:
            ids = np.append(ids, self.eos)
        return ids[:length]

    def _transposed(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        is_pitch = (ids >= self.pitch_low) & (ids <= self.pitch_high)
        if not is_pitch.any():
            return ids
        low = max(-self.settings.transpose_down, self.pitch_low - int(ids[is_pitch].min()))
        high = min(self.settings.transpose_up, self.pitch_high - int(ids[is_pitch].max()))
        return np.where(is_pitch, ids + rng.integers(low, high + 1), ids)


def targets(rows: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next-token targets, both int64 [B, T], of rows [B, T + 1]; padding is no target."""
    return rows[:, :-1], np.where(rows[:, 1:] == pad, IGNORED, rows[:, 1:])


def ngram_losses(train: list[np.ndarray], rows: np.ndarray, vocab_size: int, pad: int) -> dict[str, float]:
    """Mean loss, nats a token, of add-one smoothed unigram and bigram models of `train` on the targets of `rows`."""
    bigram, unigram = np.ones((vocab_size, vocab_size)), np.ones(vocab_size)
    for ids in train:
        np.add.at(bigram, (ids[:-1].astype(np.int64), ids[1:].astype(np.int64)), 1)
        unigram += np.bincount(ids, minlength=vocab_size)
    inputs, target = targets(rows, pad)
    real = target != IGNORED
    x, y = inputs[real], target[real]
    return {
        "unigram": float(-np.log(unigram[y] / unigram.sum()).mean()),
        "bigram": float(-np.log(bigram[x, y] / bigram[x].sum(-1)).mean()),
    }
