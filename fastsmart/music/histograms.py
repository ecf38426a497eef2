"""Histograms of the notes of clips, and the distance between two of them.

Five histograms say what a clip is made of: `pitch_class` (12 bins), `onset` (the sixteenth of the bar a note begins on,
32), `move` (interval and step to the next note, 833), `register` (15 of six semitones, the piano's 88 keys) and
`dynamics` (8 of sixteen velocities).

Shape letters: N clips, M notes of all clips, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastsmart.notes import NoteBatch

BAR_SIXTEENTHS = 32  # bins of the onset histogram; a longer bar goes on in the last
LONGEST_STEP = 16  # sixteenths, of a move; a longer one counts as this
WIDEST = 24  # semitones, of a move; a wider one counts as this
LOWEST_KEY = 21  # MIDI number of the piano's lowest key
REGISTER_SEMITONES = 6
VELOCITY_STEP = 16
BINS = {
    "pitch_class": 12,
    "onset": BAR_SIXTEENTHS,
    "move": (LONGEST_STEP + 1) * (2 * WIDEST + 1),
    "register": 15,
    "dynamics": 128 // VELOCITY_STEP,
}
# How well a tone fits a key, by its distance from the tonic (Krumhansl and Kessler 1982, Psychological Review 89,
# table of probe-tone ratings)
MAJOR_PROFILE = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR_PROFILE = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)
PROFILE_UNIT = 10**6  # profiles as whole millionths: rounding then cannot favour another tonic in another key


def note_bins(notes: NoteBatch) -> dict[str, np.ndarray]:
    """The bin of every note by histogram, int64 [M] each, clip by clip from left to right, then from low to high.

    The bin of a note's move is that of the move to the next note; the last note of a clip has none, -1.
    """
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    order = np.lexsort((notes.pitch, notes.onset_tick, clip))
    pitch, velocity = notes.pitch[order].astype(np.int64), notes.velocity[order].astype(np.int64)
    return {
        "pitch_class": pitch % 12,
        "onset": _onset_bins(notes, clip)[order],
        "move": _move_bins(notes, clip, order),
        "register": np.clip((pitch - LOWEST_KEY) // REGISTER_SEMITONES, 0, BINS["register"] - 1),
        "dynamics": velocity // VELOCITY_STEP,
    }


def histograms(notes: NoteBatch) -> dict[str, np.ndarray]:
    """The five histograms of whole clips as shares, float64 [N, B + 1]; the last bin is 1 for a clip without any.

    Onsets are in the bar of the piece's first time signature, 4/4 where it has none. A move is an interval, two octaves
    at most, and a step in sixteenths, a bar of 4/4 at most: the same in every key and at every tempo.
    """
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    found = {}
    for name, bins in note_bins(notes).items():
        there = bins >= 0
        found[name] = shares(clip[there], bins[there], BINS[name], len(notes))
    return found


def shares(clip: np.ndarray, value: np.ndarray, bins: int, clips: int) -> np.ndarray:
    """Share of each value in each clip, float64 [clips, bins + 1]; a clip without values has 1 in the last bin.

    clip, value : int64, of each thing that is counted
    """
    counts = np.bincount(clip * (bins + 1) + value, minlength=clips * (bins + 1)).astype(np.float64)
    table = counts.reshape(clips, bins + 1)
    table[table.sum(axis=1) == 0, bins] = 1.0
    return table / table.sum(axis=1, keepdims=True)


def total_variation(rows: np.ndarray) -> np.ndarray:
    """Half the L1 distance of every two rows, float64 [N, N]: the share of notes that would have to move."""
    return np.stack([np.abs(rows - row).sum(axis=1) / 2 for row in rows])


def spread(played: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean distance over all pairs of N clips by histogram of `histograms`; that of a single clip is 0."""
    return {
        f"{name}_distance": float(total_variation(rows).sum() / max(len(rows) * (len(rows) - 1), 1))
        for name, rows in played.items()
    }


def aligned_to_tonic(counts: np.ndarray) -> np.ndarray:
    """Pitch-class counts with the tonic in bin 0, int64 [..., 12]: what is left of them when the key does not matter.

    counts : whole numbers [..., 12]

    The tonic is that of the major or minor key whose profile correlates most (Krumhansl and Schmuckler; Krumhansl 1990,
    "Cognitive Foundations of Musical Pitch", chapter 4). A row and its transpositions become the same row, except where
    two tonics fit equally well (of rows of 32 random notes 1 in 40,000).
    """
    turned = np.asarray(counts, np.int64)[..., (np.arange(12)[:, None] + np.arange(12)) % 12]  # [..., tonic, 12]
    profiles = np.array([MAJOR_PROFILE, MINOR_PROFILE])
    profiles = profiles - profiles.mean(axis=1, keepdims=True)
    profiles /= np.sqrt((profiles**2).sum(axis=1, keepdims=True))
    fit = (turned @ np.rint(PROFILE_UNIT * profiles).astype(np.int64).T).max(axis=-1)  # correlation up to a constant
    return np.take_along_axis(turned, fit.argmax(axis=-1)[..., None, None], axis=-2)[..., 0, :]


def _onset_bins(notes: NoteBatch, clip: np.ndarray) -> np.ndarray:
    bar = np.full(len(notes), 4 * notes.ticks_per_beat)
    has = np.diff(notes.meter_offsets) > 0
    numerator, denominator = notes.meter[notes.meter_offsets[:-1][has]].T
    bar[has] = np.maximum(4 * notes.ticks_per_beat * numerator // denominator, 1)
    sixteenth = notes.onset_tick % bar[clip] * 4 // notes.ticks_per_beat
    return np.minimum(sixteenth, BAR_SIXTEENTHS - 1).astype(np.int64)


def _move_bins(notes: NoteBatch, clip: np.ndarray, order: np.ndarray) -> np.ndarray:
    sixteenths = (notes.onset_tick[order].astype(np.int64) * 8 // notes.ticks_per_beat + 1) // 2
    step = np.minimum(np.diff(sixteenths), LONGEST_STEP)
    interval = np.clip(np.diff(notes.pitch[order].astype(np.int64)), -WIDEST, WIDEST)
    bins = np.full(len(clip), -1)
    inside = np.flatnonzero(np.diff(clip) == 0)
    bins[inside] = (step * (2 * WIDEST + 1) + interval + WIDEST)[inside]
    return bins
