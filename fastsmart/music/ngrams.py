"""Runs of tokens and of notes as sets: what self-BLEU, novelty and the likeness to training pieces are counted on.

Shape letters: N outputs, M notes of all outputs, W windows (n-grams or figures) of all outputs, P training pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsmart.music.features import FIGURE_NOTES, GRID_PER_BEAT
from fastsmart.notes import NoteBatch
from fastsmart.tokens.token_batch import TokenBatch

HASH_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, from the golden ratio; see `ngrams`
LONGEST_STEP = 255  # sixteenths; longer waits between two notes are one and the same
BLEU_ORDER = 4  # the usual one


@dataclass(frozen=True)
class Windows:
    """Every window of N sequences.

    key   : uint64 [W], equal for equal windows
    owner : int64 [W], number of the sequence, rising
    count : N
    """

    key: np.ndarray
    owner: np.ndarray
    count: int

    @property
    def totals(self) -> np.ndarray:
        """Windows of each sequence, int64 [N]."""
        return np.bincount(self.owner, minlength=self.count)


def ngrams(tokens: TokenBatch, n: int) -> Windows:
    """The n-grams of each sequence, under a 64-bit polynomial hash.

    With 10 million different n-grams the chance that any two of them share a key is about 3 in a million.
    """
    ids = tokens.ids.astype(np.uint64) + np.uint64(1)
    sequence = np.repeat(np.arange(len(tokens)), tokens.lengths)
    length = max(len(ids) - n + 1, 0)
    key = np.zeros(length, np.uint64)
    for k in range(n):  # wraps around at 2^64, as a hash may
        key = (key ^ (key >> np.uint64(29))) * HASH_BASE + ids[k : k + length]
    inside = sequence[:length] == sequence[n - 1 :][:length]
    return Windows(key[inside], sequence[:length][inside], len(tokens))


def figures(notes: NoteBatch) -> Windows:
    """The four-note figures of each clip as `music.features` defines them: intervals, and steps in sixteenths.

    Notes go from left to right, then from low to high. A figure is the same in every key and at every tempo.
    """
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    per_beat = notes.ticks_per_beat
    at = (notes.onset_tick.astype(np.int64) * GRID_PER_BEAT + per_beat // 2) // per_beat
    pitch = notes.pitch.astype(np.int64)
    order = np.lexsort((pitch, at, clip))
    at, pitch, clip = at[order], pitch[order], clip[order]
    step = np.minimum((np.diff(at) * 4 + GRID_PER_BEAT // 2) // GRID_PER_BEAT, LONGEST_STEP)
    move = (step << 9) + np.diff(pitch) + 256
    moves = FIGURE_NOTES - 1
    length = max(len(move) - moves + 1, 0)
    key = np.zeros(length, np.int64)
    for k in range(moves):
        key = (key << 20) + move[k : k + length]
    inside = clip[:length] == clip[moves:][:length]
    return Windows(key[inside].astype(np.uint64), clip[:length][inside], len(notes))


def share_not_in(windows: Windows, known: np.ndarray) -> np.ndarray:
    """Share of each sequence's windows that are not in `known` (sorted keys), float64 [N]; NaN without windows."""
    at = np.searchsorted(known, windows.key)
    new = np.ones(len(windows.key))
    inside = at < len(known)
    new[inside] = known[at[inside]] != windows.key[inside]
    return _per_owner(windows, new)


def share_of_own(windows: Windows) -> np.ndarray:
    """Share of each sequence's windows that no other of the N sequences has, float64 [N]; NaN without windows."""
    _, column = np.unique(windows.key, return_inverse=True)
    pairs = np.unique(np.stack([column, windows.owner]), axis=1)
    owners = np.bincount(pairs[0], minlength=int(column.max(initial=-1)) + 1)
    return _per_owner(windows, (owners[column] == 1).astype(np.float64))


def self_bleu(tokens: TokenBatch, order: int = BLEU_ORDER) -> np.ndarray:
    """BLEU of each sequence against all the others as references, float64 [N], 0..1 (Zhu et al. 2018, Texygen).

    BLEU as Papineni et al. (2002) define it, without smoothing: geometric mean of the clipped precisions of 1-grams to
    `order`-grams, times the penalty for being shorter than the reference of the closest length. NaN for N = 1.
    """
    lengths = tokens.lengths
    if len(tokens) < 2:
        return np.full(len(tokens), np.nan)
    logs = np.zeros(len(tokens))
    for n in range(1, order + 1):
        windows = ngrams(tokens, n)
        _, column = np.unique(windows.key, return_inverse=True)
        pair, count = np.unique(np.stack([column, windows.owner]), axis=1, return_counts=True)
        first, second, whose = _two_largest(pair[0], pair[1], count)
        others = np.where(pair[1] == whose[pair[0]], second[pair[0]], first[pair[0]])
        matched = np.bincount(pair[1], np.minimum(count, others), len(tokens))
        with np.errstate(divide="ignore"):
            logs += np.log(matched / np.maximum(windows.totals, 1)) / order
    return np.exp(logs) * _brevity(lengths)


def _two_largest(group: np.ndarray, who: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest and second largest count of each group (0 where there is none), and whose the largest is."""
    groups = int(group.max(initial=-1)) + 1
    order = np.lexsort((-count, group))
    start = np.searchsorted(group[order], np.arange(groups))
    first, whose = count[order][start], who[order][start]
    has_second = np.bincount(group, minlength=groups) > 1
    second = np.zeros(groups, count.dtype)
    second[has_second] = count[order][start[has_second] + 1]
    return first, second, whose


def _brevity(lengths: np.ndarray) -> np.ndarray:
    """exp(1 - reference / length) where the closest other length, the shorter of two as close, is longer."""
    known, counts = np.unique(lengths, return_counts=True)
    closest = np.empty(len(lengths))
    for length, count in zip(known, counts, strict=True):
        others = known if count > 1 else known[known != length]
        closest[lengths == length] = min(others, key=lambda other: (abs(other - length), other))
    return np.where(lengths >= closest, 1.0, np.exp(1.0 - closest / np.maximum(lengths, 1)))


def _per_owner(windows: Windows, values: np.ndarray) -> np.ndarray:
    """Mean of the values of each sequence's windows, NaN where it has none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(windows.owner, values, windows.count) / windows.totals
