"""Played timing moved onto the grid of scores, in tokens. Shape letter: T tokens.

Positions and durations of the vocabulary are twelfths of a beat. A score uses few of them; a pianist all. Whoever
learns styles from both would learn who played, so both are read as a score: what lies a twelfth or two beside an
eighth, a sixteenth or a triplet is moved onto it. A score of plain rhythms stays as it is.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fastsmart.errors import UserError
from fastsmart.tokens.vocabulary import Vocabulary

STEPS = 12  # positions of a beat
DUPLE, TRIPLE = np.array([0, 3, 6, 9, 12]), np.array([0, 4, 8, 12])
BOTH = np.isin(np.arange(STEPS), np.concatenate([DUPLE, TRIPLE]))  # two voices may divide one beat differently
DENSE = 6  # onsets of a beat from which it is faster than the grid, and left as it is
LENGTHS = np.array([1, 2, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21, 24, 28, 30, 32, 33, 36, 40, 42, 44, 45, 48])


def on_grid(ids: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """The ids [T] of a piece as MidiTok encodes it, notes moved to the grid and their durations to plain ones.

    Of two notes of one pitch that come to begin together the first stays. Raises UserError for a vocabulary that
    divides a beat into other than twelve parts or has no time signatures.
    """
    ids = np.asarray(ids, np.int64)
    kind = {name: np.isin(ids, vocab.ids_of(name)) for name in ("Bar", "TimeSig", "Position", "Tempo", "Pitch")}
    bar = np.cumsum(kind["Bar"]) - 1
    latest = np.maximum.accumulate(np.where(kind["Position"], np.arange(len(ids)), 0))
    position = ids[latest] - vocab.id("Position_0")
    beats = np.array([int(text.split("/")[0]) for text in vocab.values_of("TimeSig")])
    bars = np.flatnonzero(kind["Bar"])
    if not kind["TimeSig"][np.minimum(bars + 1, len(ids) - 1)].all() or not vocab.values_of("Duration")[0].endswith(
        f".{STEPS}"
    ):
        raise UserError(
            f"styles need a vocabulary with time signatures and {STEPS} positions of a beat, as 'smart' has"
        )
    length = beats[ids[bars + 1] - vocab.ids_of("TimeSig")[0]] * STEPS
    start = np.concatenate([[0], np.cumsum(length)])

    note = np.flatnonzero(kind["Pitch"][:-2])
    onset, pitch = moved(start[bar[note]] + position[note]), ids[note]
    # a note moved over the last bar line stays in the last bar
    onset = np.where(onset >= start[-1], start[bar[note]] + position[note], onset)
    order = np.lexsort((pitch, onset))
    onset, pitch, note = onset[order], pitch[order], note[order]
    fresh = np.concatenate([[True], (np.diff(onset) != 0) | (np.diff(pitch) != 0)])[: len(note)]
    onset, note = onset[fresh], note[fresh]
    notes = np.stack([ids[note], ids[note + 1], _plain(ids[note + 2], vocab)], 1)

    tempo = np.flatnonzero(kind["Tempo"])
    tempo_at = start[bar[tempo]] + position[tempo]
    at = np.unique(np.concatenate([onset, tempo_at]))
    bar_of = np.searchsorted(start, at, side="right") - 1
    places = vocab.id("Position_0") + at - start[bar_of]
    time = np.concatenate([start[:-1], at, tempo_at, onset])
    rank = np.repeat([0, 1, 2, 3], [len(bars), len(at), len(tempo), len(notes)])
    rows = np.concatenate([_padded(ids[bars], ids[bars + 1]), _padded(places), _padded(ids[tempo]), notes])
    rows = rows[np.lexsort((np.concatenate([np.zeros(len(rows) - len(notes), np.int64), notes[:, 0]]), rank, time))]
    return rows[rows >= 0].astype(np.uint16)


def _padded(*columns: np.ndarray) -> np.ndarray:
    """Columns of ids as rows of three, -1 where there is none."""
    rows = np.full((len(columns[0]), 3), -1, np.int64)
    for i, column in enumerate(columns):
        rows[:, i] = column
    return rows


def moved(time: np.ndarray) -> np.ndarray:
    """Onsets, in twelfths of a beat from the start, each on the grid that its beat is nearest to."""
    out = time.copy()
    _move(time, np.argsort(time, kind="stable"), out)
    return out


@njit(cache=True)
def _move(time: np.ndarray, order: np.ndarray, out: np.ndarray) -> None:
    """Fill `out`, beat by beat; `order` sorts the onsets."""
    first = 0
    while first < len(order):
        beat, stop = time[order[first]] // STEPS, first
        seen = np.zeros(STEPS, np.bool_)
        while stop < len(order) and time[order[stop]] // STEPS == beat:
            seen[time[order[stop]] % STEPS] = True
            stop += 1
        duple = triple = beside = 0
        for phase in range(STEPS):
            if seen[phase]:
                duple += np.abs(DUPLE - phase).min()
                triple += np.abs(TRIPLE - phase).min()
                beside += not BOTH[phase]
        if seen.sum() < DENSE and beside:
            grid = DUPLE if duple <= triple else TRIPLE
            for k in order[first:stop]:
                out[k] = beat * STEPS + grid[np.abs(grid - time[k] % STEPS).argmin()]
        first = stop


def _plain(durations: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """Ids of durations as the ids of the nearest plain ones, the shorter of two as near."""
    ids = vocab.ids_of("Duration")
    lengths = LENGTHS[len(ids) >= LENGTHS]
    steps = durations - ids[0] + 1
    return ids[0] + lengths[np.abs(steps[:, None] - lengths).argmin(1)] - 1
