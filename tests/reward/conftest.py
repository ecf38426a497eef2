"""Clips made by hand for the reward tests."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from fastsmart.notes import NoteBatch, ticks_to_seconds

Note = tuple[int, int, int, int]  # onset tick, duration ticks, pitch, velocity


@pytest.fixture(scope="session")
def make_notes() -> Callable[..., NoteBatch]:
    """A batch of clips from lists of (onset tick, duration ticks, pitch, velocity), at one tempo."""

    def make(*clips: Sequence[Note], ticks_per_beat: int = 12, bpm: float = 120.0) -> NoteBatch:
        tables = [np.array(clip, np.int64).reshape(-1, 4) for clip in clips]
        table = np.concatenate(tables)
        counts = np.array([len(t) for t in tables])
        none, tempo = np.zeros(0, np.int64), (np.zeros(1, np.int64), np.array([bpm]))

        def seconds(ticks: np.ndarray) -> np.ndarray:
            return ticks_to_seconds(ticks, ticks_per_beat, *tempo)

        return NoteBatch(
            onset_s=seconds(table[:, 0]),
            duration_s=seconds(table[:, 1]),
            pitch=table[:, 2].astype(np.uint8),
            velocity=table[:, 3].astype(np.uint8),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            end_s=np.array([seconds((t[:, 0] + t[:, 1]).max(initial=0)) for t in tables]),
            onset_tick=table[:, 0].astype(np.int32),
            duration_tick=table[:, 1].astype(np.int32),
            ticks_per_beat=ticks_per_beat,
            tempo_tick=np.zeros(len(clips), np.int32),
            tempo_bpm=np.full(len(clips), bpm),
            tempo_offsets=np.arange(len(clips) + 1, dtype=np.int64),
            meter_tick=none.astype(np.int32),
            meter=np.zeros((0, 2), np.int32),
            meter_offsets=np.zeros(len(clips) + 1, np.int64),
        )

    return make


@pytest.fixture(scope="session")
def make_pieces(make_notes: Callable[..., NoteBatch]) -> Callable[..., NoteBatch]:
    """Seeded tonal pieces: a walking melody over broken chords in one key, a minute or so each."""

    def make(count: int, seed: int) -> NoteBatch:
        rng = np.random.default_rng(seed)
        scale = np.array([0, 2, 4, 5, 7, 9, 11])

        def piece() -> list[Note]:
            key, loudness = int(rng.integers(-5, 7)), int(rng.integers(60, 95))
            degree, notes = 7, []
            for bar in range(28):
                root = int(rng.choice([0, 3, 4, 5]))
                for eighth in range(8):
                    at = bar * 48 + eighth * 6
                    step = root + (0, 4, 2, 4)[eighth % 4]
                    bass = 48 + key + int(scale[step % 7]) + 12 * (step // 7)
                    notes.append((at, 24 if eighth == 0 else 6, bass, loudness - 15))
                    if rng.random() < 0.6:
                        degree = int(np.clip(degree + rng.integers(-2, 3), 0, 13))
                        pitch = 60 + key + int(scale[degree % 7]) + 12 * (degree // 7)
                        notes.append((at, int(rng.choice([6, 12, 18])), pitch, loudness + int(rng.integers(-8, 9))))
            return notes

        return make_notes(*[piece() for _ in range(count)], bpm=100.0)

    return make
