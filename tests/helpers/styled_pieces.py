"""Pieces in two invented styles: `march`, chords on the beat, and `drone`, a syncopated tune over one low note."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from made_notes import TICKS_PER_BEAT, made

from fastsmart.notes import NoteBatch

STYLES = ("drone", "march")
SCALE = (0, 2, 4, 5, 7, 9, 11)


def styled_clip(style: str, seed: int, beats: int = 20) -> list[tuple[int, int, int]]:
    """Notes (onset tick, duration ticks, pitch) of a piece, twelve ticks a beat."""
    random = np.random.default_rng(seed)
    tonic, degree, notes = 60 + int(random.integers(-5, 6)), int(random.integers(7)), []

    def pitch(step: int) -> int:
        return tonic + 12 * (step // 7) + SCALE[step % 7]

    for beat in range(beats):
        at = beat * TICKS_PER_BEAT
        degree = int(np.clip(degree + random.integers(-2, 3), -4, 9))
        if style == "march":
            notes += [(at, 12, pitch(degree + third)) for third in (0, 2, 4)] + [(at, 12, pitch(degree) - 24)]
        else:
            notes += [(at + 3, 3, pitch(degree)), (at + 6, 6, pitch(degree + 1))]
            notes += [(at, 48, tonic - 24)] if beat % 4 == 0 else []
    return notes


def styled_clips(style: str, seeds: range, beats: int = 20) -> NoteBatch:
    """A clip for each seed."""
    return made([styled_clip(style, seed, beats) for seed in seeds])


def write_styled(folder: Path, pieces: int = 10, beats: int = 32) -> None:
    """MIDI files `STYLE/NN.mid` of both styles below the folder."""
    for style in STYLES:
        (folder / style).mkdir(parents=True)
        notes = styled_clips(style, range(pieces), beats)
        for i in range(pieces):
            notes.to_midi(i, folder / style / f"{i:02d}.mid")
