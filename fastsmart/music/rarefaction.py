"""Comparing clips at equal size: what a fixed number of neighbouring notes (or tokens) of each has in common.

The fewer notes two clips have, the less their histograms overlap, whoever wrote them: counting noise looks like
diversity. Ecology meets the same in species counts and compares samples at the size of the smallest, which it calls
rarefaction (Hurlbert 1971, Ecology 52). Here a clip is seen through excerpts of k neighbours, each start
as likely as any other, and clips of fewer than k are not compared. Neighbours, because the notes of a piece are no
independent draws: k notes picked from a whole long piece cover more of it than a piece of k notes does, so a long one
would look more like others (Chiarucci et al. 2009, Community Ecology 10, "Spatially constrained rarefaction"). Of a
source that goes on as it began, the excerpts of long and of short pieces have the same distribution, so every mean over
excerpts, and over pairs of excerpts of different pieces, is the same whatever the lengths. What does not go on as it
began is the place in the bar: clips start on a bar line, so those hardly longer than an excerpt differ a little less in
their onsets than longer ones of the same source.

Shape letters: N clips, K of them long enough, R excerpts of each, k their size, B bins, W items of all clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXCERPTS = 4  # of each clip; what they miss is far below the differences between clips


@dataclass(frozen=True)
class Excerpts:
    """R excerpts of each of the K sequences, of N, that are long enough.

    of    : int64 [K], number of the sequence, rising
    start : int64 [K, R], place in its sequence of the first item of each excerpt
    size  : k, items of an excerpt
    count : N
    """

    of: np.ndarray
    start: np.ndarray
    size: int
    count: int

    @staticmethod
    def draw(lengths: np.ndarray, size: int, excerpts: int = EXCERPTS, seed: int = 0) -> Excerpts:
        """Excerpts of sequences of these lengths, int64 [N]; a sequence's random numbers depend on its number only."""
        chance = np.random.default_rng(seed).random((len(lengths), excerpts))
        of = np.flatnonzero(lengths >= size)
        start = (chance[of] * (lengths[of] - size + 1)[:, None]).astype(np.int64)
        return Excerpts(of, start, size, len(lengths))

    @property
    def known(self) -> np.ndarray:
        """Mask of the sequences that are long enough, bool [N]."""
        return np.isin(np.arange(self.count), self.of)

    def rows(self, offsets: np.ndarray, size: int | None = None) -> np.ndarray:
        """Places of the excerpts' items in an array of all sequences, int64 [K, R, size].

        offsets : int64 [N + 1], where each sequence starts in that array
        size    : items of each excerpt, k if not given; k - 3 for the four-item windows of k items
        """
        size = self.size if size is None else size
        return (offsets[self.of][:, None] + self.start)[..., None] + np.arange(size)

    def per_sequence(self, values: np.ndarray) -> np.ndarray:
        """Means over excerpts of values [K, R], float64 [N]; NaN for a sequence that is too short."""
        means = np.full(self.count, np.nan)
        means[self.of] = values.mean(axis=1)
        return means

    def per_pair(self, values: np.ndarray, other: float) -> np.ndarray:
        """Values [K, K] among all sequences, [N, N]; `other` where one is too short."""
        table = np.full((self.count, self.count), other, values.dtype)
        table[np.ix_(self.of, self.of)] = values
        return table


def bin_counts(bins: np.ndarray, number: int) -> np.ndarray:
    """Count of each bin in each excerpt, int16 [K, R, B].

    bins : int64 [K, R, items], 0 ... number - 1
    """
    excerpts = bins.reshape(-1, bins.shape[-1])
    at = np.arange(len(excerpts))[:, None] * number + excerpts
    counts = np.bincount(at.ravel(), minlength=len(excerpts) * number).astype(np.int16)
    return counts.reshape(*bins.shape[:-1], number)


def expected_similarity(counts: np.ndarray) -> np.ndarray:
    """Mean histogram intersection of an excerpt of one clip and an excerpt of another, float32 [K, K].

    counts : [K, R, B], of excerpts of one size

    Over all R² pairs of excerpts at once: the smaller of two counts is how many thresholds both exceed, and whether one
    clip's excerpt does is independent of the other's, so with S_ib(t) the share of clip i's excerpts that have more
    than t items in bin b, the mean intersection is the sum over b and t of S_ib(t) S_jb(t), over the size. The diagonal
    is a clip against another excerpt of itself, or the same one, and is not a similarity of different clips.
    """
    size = int(counts[0, 0].sum()) if len(counts) else 1
    total = np.zeros((len(counts), len(counts)), np.float32)
    for t in range(counts.max(initial=0)):
        _add_products(total, (counts > t).mean(axis=1, dtype=np.float32))
    return total / np.float32(size)


def intersections(counts: np.ndarray) -> np.ndarray:
    """Histogram intersection of every two clips, float32 [K, K], 1 on the diagonal and positive semidefinite.

    counts : [K, B], of one excerpt of each clip, all of one size
    """
    return expected_similarity(counts[:, None])


def _add_products(total: np.ndarray, rows: np.ndarray) -> None:
    """total += rows rowsᵀ, without the columns that are all 0."""
    rows = rows[:, rows.any(axis=0)]
    total += rows @ rows.T
