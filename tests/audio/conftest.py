"""Pieces made by hand for the audio tests."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fastsmart.notes import NoteBatch

TimedNote = tuple[float, float, int, int]  # onset s, duration s, pitch, velocity


@pytest.fixture(scope="session")
def pieces_of() -> Callable[..., NoteBatch]:
    """A batch of pieces, each a list of (onset s, duration s, pitch, velocity); a tick is a millisecond."""

    def make(*pieces: Sequence[TimedNote]) -> NoteBatch:
        tables = [np.array(piece, np.float64).reshape(-1, 4) for piece in pieces]
        table = np.concatenate(tables)
        none = np.zeros(len(pieces) + 1, np.int64)
        return NoteBatch(
            onset_s=table[:, 0],
            duration_s=table[:, 1],
            pitch=table[:, 2].astype(np.uint8),
            velocity=table[:, 3].astype(np.uint8),
            offsets=np.cumsum([0, *(len(t) for t in tables)]),
            end_s=np.array([(t[:, 0] + t[:, 1]).max(initial=0.0) for t in tables]),
            onset_tick=np.rint(table[:, 0] * 1000).astype(np.int32),
            duration_tick=np.rint(table[:, 1] * 1000).astype(np.int32),
            ticks_per_beat=480,
            tempo_tick=np.zeros(len(pieces), np.int32),
            tempo_bpm=np.full(len(pieces), 125.0),
            tempo_offsets=np.arange(len(pieces) + 1),
            meter_tick=np.zeros(0, np.int32),
            meter=np.zeros((0, 2), np.int32),
            meter_offsets=none,
        )

    return make


@pytest.fixture(scope="session")
def random_pieces(pieces_of: Callable[..., NoteBatch]) -> Callable[..., NoteBatch]:
    """Seeded pieces of 20-60 notes on a few keys, so that keys are struck again while they sound."""

    def make(count: int, seed: int, seconds: float = 4.0) -> NoteBatch:
        rng = np.random.default_rng(seed)

        def piece() -> list[TimedNote]:
            onsets = np.sort(rng.uniform(0.0, seconds - 1.0, rng.integers(20, 60)))
            keys = rng.integers(30, 100, 12)
            return [
                (float(onset), float(rng.uniform(0.02, 1.0)), int(rng.choice(keys)), int(rng.integers(1, 128)))
                for onset in onsets
            ]

        return pieces_of(*[piece() for _ in range(count)])

    return make
