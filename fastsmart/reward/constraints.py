"""The reward `constraint`: what a musician can state, key, metre, range, density, voices, a cadence at the end.

Shape letters: N clips, M notes of all clips, K constraints that are set.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch
from fastsmart.reward.base import Clips, Surroundings
from fastsmart.reward.settings import ConstraintSettings, RewardSettings, parsed_key
from fastsmart.reward.taste_features import key_fit

if TYPE_CHECKING:
    from collections.abc import Callable

NEAR = 0.5  # score that a clip which misses a constraint stays below, however near it is
MAJOR = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1], np.float64)
MINOR = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1], np.float64)  # natural minor and its leading tone
MAJOR_TRIAD, MINOR_TRIAD = (0, 4, 7), (0, 3, 7)
BEFORE_TONIC = (7, 5, 11)  # semitones of the bass above the tonic: dominant, subdominant, leading tone
COMMON_TIME = (4, 4)


class Constraint:
    """A hard gate: 1 for a clip that meets every constraint that is set, less than a half for one that misses any.

    A clip that misses gets half the mean of how nearly it meets each (0 .. 1), so that there is something to climb
    before the first clip passes. 0 for a clip without notes.

    settings, keys : what it asks for, as `ConstraintSettings` or key by key

    Hacked by whatever is left open: one held note is in every key and range. Set the density, and give it company that
    wants music (`typicality`, `variety`).
    """

    name = "constraint"
    needs_audio = False

    def __init__(self, settings: ConstraintSettings | None = None, **keys: Any) -> None:
        settings = replace(settings or ConstraintSettings(), **keys)
        if settings == ConstraintSettings():
            raise UserError(
                "reward.terms.constraint asks for nothing; set one of reward.constraint.key, metre, lowest, highest, "
                "least_density, most_density, voices or cadence"
            )
        self.settings = settings

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> Constraint:
        return cls(settings.constraint)

    def __call__(self, clips: Clips) -> np.ndarray:
        degrees = np.stack(list(self.degrees(clips.notes).values()), axis=1)
        score = np.where((degrees >= 1.0).all(axis=1), 1.0, NEAR * np.minimum(degrees, 0.999).mean(axis=1))
        score[clips.notes.counts == 0] = 0.0
        return score.astype(np.float32)

    def degrees(self, notes: NoteBatch) -> dict[str, np.ndarray]:
        """Degree to which each clip meets each constraint that is set, float64 [N] by name; 1 = meets it."""
        s = self.settings
        asked: dict[str, tuple[bool, Callable[[NoteBatch], np.ndarray]]] = {
            "key": (bool(s.key), self._key),
            "metre": (bool(s.metre), self._metre),
            "range": (s.lowest > 0 or s.highest < 127, self._range),
            "density": (s.least_density > 0 or s.most_density > 0, self._density),
            "voices": (s.voices > 0, self._voices),
            "cadence": (s.cadence, self._cadence),
        }
        return {name: np.where(notes.counts > 0, of(notes), 0.0) for name, (is_set, of) in asked.items() if is_set}

    def _key(self, notes: NoteBatch) -> np.ndarray:
        """The share of notes in the scale over the share asked for; at most a half where another key fits better."""
        tonic, minor = parsed_key(self.settings.key)
        scale = np.roll(MINOR if minor else MAJOR, tonic)
        inside = _shares(notes, scale[notes.pitch.astype(np.int64) % 12])
        fits = key_fit(notes)
        degree = np.minimum(inside / self.settings.key_share, 1.0)
        return np.where(fits.argmax(axis=1) == tonic + 12 * minor, degree, degree / 2)

    def _metre(self, notes: NoteBatch) -> np.ndarray:
        """Whether the time signature from its first onset to its last is the one asked for; before any it is 4/4."""
        wanted = tuple(int(number) for number in self.settings.metre.split("/"))
        degree = np.zeros(len(notes))
        for i in np.flatnonzero(notes.counts):
            onset, at = notes.onset_tick[notes.rows(int(i))], slice(*notes.meter_offsets[i : i + 2])
            in_force = {-1: COMMON_TIME} | dict(
                zip(notes.meter_tick[at].tolist(), notes.meter[at].tolist(), strict=True)
            )
            first = max(tick for tick in in_force if tick <= onset.min())
            degree[i] = all(tuple(m) == wanted for tick, m in in_force.items() if first <= tick <= onset.max())
        return degree

    def _range(self, notes: NoteBatch) -> np.ndarray:
        """The share of notes from the lowest to the highest."""
        inside = (notes.pitch >= self.settings.lowest) & (notes.pitch <= self.settings.highest)
        return _shares(notes, inside.astype(np.float64))

    def _density(self, notes: NoteBatch) -> np.ndarray:
        """Notes a second over the least, or the most over notes a second."""
        least, most = self.settings.least_density, self.settings.most_density or np.inf
        density = notes.counts / np.maximum(notes.end_s, 1e-3)
        too_many = np.divide(most, density, out=np.ones(len(notes)), where=density > most)
        return np.minimum(np.minimum(density / least if least else 1.0, too_many), 1.0)

    def _voices(self, notes: NoteBatch) -> np.ndarray:
        """The most notes that may sound together over the most that do."""
        sounding = np.array([_most_together(*_of(notes, i)) for i in range(len(notes))], np.float64)
        return np.minimum(self.settings.voices / np.maximum(sounding, 1.0), 1.0)

    def _cadence(self, notes: NoteBatch) -> np.ndarray:
        """A third each for a tonic in the bass at the end, a tonic triad above it, and a dominant, subdominant or
        leading tone in the bass before."""
        if self.settings.key:
            tonic, minor = parsed_key(self.settings.key)
            best = np.full(len(notes), tonic + 12 * minor)
        else:
            best = key_fit(notes).argmax(axis=1)
        degree = np.zeros(len(notes))
        for i in np.flatnonzero(notes.counts):
            start, end = _of(notes, int(i))
            degree[i] = cadence_degree(start, end, notes.pitch[notes.rows(int(i))], int(best[i]))
        return degree


def cadence_degree(start: np.ndarray, end: np.ndarray, pitch: np.ndarray, key: int) -> float:
    """Degree to which a clip ends on a cadence in a key (see `key_fit`), in thirds.

    start, end, pitch : of its notes, in ticks and MIDI numbers, at least one note

    The last chord is what sounds at the last onset; the bass before is the lowest of what begins or sounds at the last
    onset whose lowest pitch class is another than the last chord's.
    """
    tonic, triad = key % 12, MINOR_TRIAD if key >= 12 else MAJOR_TRIAD
    onsets = np.unique(start)[::-1]
    last = pitch[(start <= onsets[0]) & ((end > onsets[0]) | (start == onsets[0]))].astype(np.int64)
    above = (last - tonic) % 12
    bass = (int(last.min()) - tonic) % 12
    thirds = int(bass == 0) + int(np.isin(above, triad).all())
    for onset in onsets[1:]:
        sounding = pitch[(start <= onset) & ((end > onset) | (start == onset))].astype(np.int64)
        before = (int(sounding.min()) - tonic) % 12
        if before != bass:
            thirds += before in BEFORE_TONIC
            break
    return thirds / 3


def share_met(scores: np.ndarray) -> float:
    """Share of clips that meet every constraint, by their scores [N] under `Constraint`."""
    return float(np.mean(scores == 1.0))


def _shares(notes: NoteBatch, inside: np.ndarray) -> np.ndarray:
    """Mean over each clip's notes of a number [M], float64 [N]; 0 without notes."""
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    return np.bincount(clip, inside, minlength=len(notes)) / np.maximum(notes.counts, 1)


def _of(notes: NoteBatch, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the notes of a clip, in ticks, int64."""
    rows = notes.rows(i)
    start = notes.onset_tick[rows].astype(np.int64)
    return start, start + notes.duration_tick[rows]


def _most_together(start: np.ndarray, end: np.ndarray) -> int:
    """The most notes that sound at once; one that ends where another begins is not heard with it."""
    at = np.concatenate([start, end])
    change = np.concatenate([np.ones(len(start), np.int64), -np.ones(len(end), np.int64)])
    return int(np.cumsum(change[np.lexsort((change, at))]).max(initial=0))
