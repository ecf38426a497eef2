"""Rewards read from the notes alone. All are bounded, 0 the worst, and 0 for a clip without notes.

Shape letters: N clips.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from fastsmart.music.features import features
from fastsmart.reward.base import Clips, Surroundings
from fastsmart.reward.settings import RewardSettings
from fastsmart.reward.typicality import TypicalityStats, required_statistics

KEYBOARD_SEMITONES = 87  # from the lowest to the highest key of a piano
EVEN_DIATONIC_BITS = math.log2(7)  # entropy of the seven pitch classes of a scale, all equally often
FULL_FIGURES = 16  # four-note figures under which a clip has too little to be called varied


class ScaleConsistency:
    """Notes that stay in one key: the share of notes in the best fitting major or minor scale (MusPy).

    Range 0..1; random pitches give about 0.7, real pieces nearly 1. Hacked by playing few notes, or one note often: a
    single pitch is in a scale whatever happens. Give it company that wants notes (`presence`) and pitches (`variety`).
    """

    name = "scale_consistency"
    needs_audio = False

    def __call__(self, clips: Clips) -> np.ndarray:
        return _or_zero(features(clips.notes)["scale_consistency"])


class PolyphonyRate:
    """Full harmony: the share of time in which more than two pitches sound together (MusPy).

    Range 0..1. Hacked by holding one chord throughout; `variety` falls then.
    """

    name = "polyphony_rate"
    needs_audio = False

    def __call__(self, clips: Clips) -> np.ndarray:
        return _or_zero(features(clips.notes)["polyphony_rate"])


class FilledBeats:
    """Music that does not stop: 1 - MusPy's empty-beat rate.

    Range 0..1. Hacked by one note held throughout, and by a clip that ends early, for beats are counted only up to the
    last note end; `presence` falls in both cases.
    """

    name = "filled_beats"
    needs_audio = False

    def __call__(self, clips: Clips) -> np.ndarray:
        return _or_zero(1.0 - features(clips.notes)["empty_beat_rate"])


class PitchRange:
    """Use of the keyboard: MusPy's pitch range as a share of the 87 semitones of a piano.

    Range 0..1. Hacked with two notes, the lowest and the highest.
    """

    name = "pitch_range"
    needs_audio = False

    def __call__(self, clips: Clips) -> np.ndarray:
        return np.minimum(features(clips.notes)["pitch_range"] / KEYBOARD_SEMITONES, 1.0).astype(np.float32)


class Variety:
    """Music that goes somewhere: many pitch classes and figures not yet heard.

    The geometric mean of (a) the pitch-class entropy over that of a diatonic scale evenly used, at most 1, and (b) the
    share of four-note figures (intervals and steps) that are new in the clip, where a clip of fewer than 16 figures
    counts as if the missing ones were repeats. Range 0..1; 0 for a clip on one pitch class or of fewer than four notes.

    Hacked by noise: random notes are as varied as can be. It is a counterweight to rewards that loops and pedal points
    satisfy, not an aim of its own; `typicality` and `scale_consistency` hold against noise.
    """

    name = "variety"
    needs_audio = False

    def __call__(self, clips: Clips) -> np.ndarray:
        feature = features(clips.notes)
        tonal = np.minimum(feature["pitch_class_entropy"] / EVEN_DIATONIC_BITS, 1.0)
        total = feature["figures"] / (1.0 - feature["repetition"])
        return _or_zero(np.sqrt(tonal * feature["figures"] / np.maximum(total, FULL_FIGURES)))


class Presence:
    """Someone is playing: as many notes, and as much sounding time, as the median clip of real pieces.

    The number of distinct notes over the median clip's, at most 1, times the seconds that sound over the median
    clip's, at most 1. Both are counted against the window of the statistics (10 s), not against the clip's own length:
    stopping early does not make a clip denser. Range 0..1; playing ever fewer notes lowers it in proportion, more notes
    than real pieces have do not raise it. Notes doubled at the same time count once.

    Hacked by any steady stream of notes, such as one note repeated; `variety` and `typicality` fall then.
    """

    name = "presence"
    needs_audio = False

    def __init__(self, statistics: str | Path | TypicalityStats) -> None:
        self.statistics = TypicalityStats.of(statistics)

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> Presence:
        return cls(required_statistics(cls.name, settings, surroundings))

    def __call__(self, clips: Clips) -> np.ndarray:
        feature, real = features(clips.notes), self.statistics
        played = np.minimum(feature["distinct_notes"] / real.median_notes, 1.0)
        sounding = np.minimum(feature["sounding_s"] / real.median_sounding_s, 1.0)
        return (played * sounding).astype(np.float32)


def _or_zero(values: np.ndarray) -> np.ndarray:
    """float32, 0 where a feature has no value because there are no notes to measure it on."""
    return np.nan_to_num(values, nan=0.0).astype(np.float32)
