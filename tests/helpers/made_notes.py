"""Note batches made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastsmart.notes import NoteBatch

TICKS_PER_BEAT = 12
TICKS_PER_S = 24  # 120 beats a minute


def made(clips: Sequence[Sequence[tuple[int, int, int]]], meter: tuple[int, int] = (4, 4)) -> NoteBatch:
    """Clips of (onset tick, duration ticks, pitch), twelve ticks a beat."""
    table = np.array([note for clip in clips for note in clip], np.int64).reshape(-1, 3)
    offsets = np.cumsum([0, *map(len, clips)])
    nothing = np.zeros(len(clips) + 1, np.int64)
    ends = [max((onset + duration for onset, duration, _ in clip), default=0) / TICKS_PER_S for clip in clips]
    return NoteBatch(
        table[:, 0] / TICKS_PER_S,
        table[:, 1] / TICKS_PER_S,
        table[:, 2].astype(np.uint8),
        np.full(len(table), 80, np.uint8),
        offsets,
        np.array(ends, np.float64),
        table[:, 0].astype(np.int32),
        table[:, 1].astype(np.int32),
        TICKS_PER_BEAT,
        *(np.zeros(0, np.int32), np.zeros(0), nothing),
        *(np.zeros(len(clips), np.int32), np.tile(np.int32(meter), (len(clips), 1)), np.arange(len(clips) + 1)),
    )


def melody(seed: int, notes: int = 24) -> list[tuple[int, int, int]]:
    """A clip of random notes, one after the other."""
    random = np.random.default_rng(seed)
    onsets = np.cumsum(random.choice([3, 6, 12], notes))
    return [(int(at), 6, int(pitch)) for at, pitch in zip(onsets, random.integers(40, 90, notes), strict=True)]
