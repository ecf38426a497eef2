"""Features of a clip's notes, in numbers: those that rewards, statistics and the study's tables share.

Where a feature exists in MusPy it is MusPy's, to the last bit of its definition (MusPy 0.5.0, `muspy.metrics`; Dong et
al. 2020, ISMIR), computed from `onset_tick` and `duration_tick` with `ticks_per_beat` as MusPy's resolution.

Shape letters: N clips, M notes of all clips, m notes of one clip, F features.
"""

from __future__ import annotations

import numba
import numpy as np

from fastsmart.notes import NoteBatch

FEATURES = (
    "notes",  # how many
    "distinct_notes",  # without those that repeat a pitch at the same twelfth of a beat
    "figures",  # distinct four-note figures (intervals, and steps in sixteenths)
    "sounding_s",  # seconds in which at least one note sounds
    "pitch_range",  # MusPy: semitones
    "notes_per_beat",  # over the beats up to the last note end
    "notes_per_second",  # over the seconds up to the last note end
    "polyphony",  # MusPy: mean number of pitches while any sounds
    "polyphony_rate",  # MusPy: share of time steps with more than two pitches
    "empty_beat_rate",  # MusPy: share of beats no note touches
    "scale_consistency",  # MusPy: share of notes in the best of the 24 major and minor scales
    "pitch_class_entropy",  # MusPy: bits, at most log2(12)
    "mean_pitch",  # MIDI number
    "pitch_spread",  # standard deviation, semitones
    "mean_velocity",
    "velocity_range",
    "velocity_spread",  # standard deviation
    "mean_duration_beats",
    "duration_spread_beats",  # standard deviation
    "mean_duration_s",
    "repetition",  # share of four-note figures that have been heard before in the clip
)
ZERO_WITHOUT_NOTES = 5  # the first of them; the others are NaN for a clip without notes
GRID_PER_BEAT = 12  # of `distinct_notes` and of the order of near-simultaneous notes: the tokenizer's own resolution
FIGURE_NOTES = 4

_MAJOR = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1], np.int64)
_MINOR = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0], np.int64)


def features(notes: NoteBatch) -> dict[str, np.ndarray]:
    """Every feature of `FEATURES` for every clip, float64 [N] each.

    A clip without notes has 0 notes, distinct notes, figures, sounding seconds and pitch range (as in MusPy), and NaN
    elsewhere. Rates over time are NaN for a clip whose notes all last no time.
    """
    table = np.empty((len(notes), len(FEATURES)), np.float64)
    _fill(
        notes.offsets,
        notes.onset_s,
        notes.duration_s,
        notes.onset_tick,
        notes.duration_tick,
        notes.pitch,
        notes.velocity,
        notes.ticks_per_beat,
        table,
    )
    return dict(zip(FEATURES, table.T.copy(), strict=True))


@numba.njit(cache=True, nogil=True)
def _fill(
    offsets: np.ndarray,
    onset_s: np.ndarray,
    duration_s: np.ndarray,
    onset_tick: np.ndarray,
    duration_tick: np.ndarray,
    pitch: np.ndarray,
    velocity: np.ndarray,
    ticks_per_beat: int,
    table: np.ndarray,
) -> None:
    """Fill table [N, F] in one pass over the batch."""
    for i in range(len(offsets) - 1):
        rows = slice(offsets[i], offsets[i + 1])
        if offsets[i] == offsets[i + 1]:
            table[i, :ZERO_WITHOUT_NOTES], table[i, ZERO_WITHOUT_NOTES:] = 0.0, np.nan
            continue
        start = onset_tick[rows].astype(np.int64)
        end = start + duration_tick[rows]
        start_s, length_s = onset_s[rows], duration_s[rows]
        pitches = pitch[rows].astype(np.int64)
        loudness = velocity[rows].astype(np.float64)
        beats = (end - start) / ticks_per_beat
        m, length, end_s = float(len(start)), end.max(), (start_s + length_s).max()
        order = np.argsort(start)
        distinct, figures, repetition = _figures(start, pitches, ticks_per_beat)
        polyphony, polyphony_rate = _polyphony(start, end, pitches)
        empty_rate = _empty_beat_rate(start[order], end[order], length, ticks_per_beat)
        consistency, entropy = _tonality(pitches)
        table[i, 0], table[i, 1], table[i, 2] = m, distinct, figures
        table[i, 3], table[i, 4] = _union_s(start_s[order], length_s[order]), pitches.max() - pitches.min()
        table[i, 5] = m * ticks_per_beat / length if length > 0 else np.nan
        table[i, 6] = m / end_s if end_s > 0 else np.nan
        table[i, 7], table[i, 8], table[i, 9] = polyphony, polyphony_rate, empty_rate
        table[i, 10], table[i, 11] = consistency, entropy
        table[i, 12], table[i, 13] = pitches.mean(), pitches.std()
        table[i, 14], table[i, 15], table[i, 16] = loudness.mean(), loudness.max() - loudness.min(), loudness.std()
        table[i, 17], table[i, 18], table[i, 19] = beats.mean(), beats.std(), length_s.mean()
        table[i, 20] = repetition


@numba.njit(cache=True, nogil=True)
def _polyphony(start: np.ndarray, end: np.ndarray, pitch: np.ndarray) -> tuple[float, float]:
    """MusPy's polyphony and polyphony rate of a clip, by a sweep over the starts and ends of what each pitch plays."""
    order = np.argsort((pitch << 32) + start)
    m = len(order)
    on, off = np.empty(m, np.int64), np.empty(m, np.int64)
    spans, last_pitch = 0, np.int64(-1)
    for k in order:
        if end[k] <= start[k]:
            continue  # a note of no length covers no time step
        if pitch[k] == last_pitch and start[k] <= off[spans - 1]:
            off[spans - 1] = max(off[spans - 1], end[k])
            continue
        on[spans], off[spans], last_pitch = start[k], end[k], pitch[k]
        spans += 1
    on, off = np.sort(on[:spans]), np.sort(off[:spans])
    pitch_steps = sounding_steps = dense_steps = np.int64(0)
    now, active, a, b = np.int64(0), 0, 0, 0
    while b < spans:
        at = min(on[a], off[b]) if a < spans else off[b]
        pitch_steps += active * (at - now)
        sounding_steps += at - now if active > 0 else 0
        dense_steps += at - now if active > 2 else 0
        now = at
        while a < spans and on[a] == at:
            active, a = active + 1, a + 1
        while b < spans and off[b] == at:
            active, b = active - 1, b + 1
    length = end.max()
    polyphony = pitch_steps / sounding_steps if sounding_steps > 0 else np.nan
    return polyphony, dense_steps / length if length > 0 else np.nan


@numba.njit(cache=True, nogil=True)
def _empty_beat_rate(start: np.ndarray, end: np.ndarray, length: int, ticks_per_beat: int) -> float:
    """MusPy's empty-beat rate; notes in order of onset. The beat on which a note ends counts as touched."""
    if length < 1:
        return np.nan
    touched, reached = np.int64(0), np.int64(-1)
    for k in range(len(start)):
        first, last = start[k] // ticks_per_beat, end[k] // ticks_per_beat
        touched += max(last - max(first, reached + 1) + 1, 0)
        reached = max(reached, last)
    return 1 - touched / (length // ticks_per_beat + 1)


@numba.njit(cache=True, nogil=True)
def _tonality(pitch: np.ndarray) -> tuple[float, float]:
    """MusPy's scale consistency and pitch-class entropy (bits) of a clip."""
    histogram = np.zeros(12, np.int64)
    for p in pitch:
        histogram[p % 12] += 1
    best = np.int64(0)
    for root in range(12):
        major = minor = np.int64(0)
        for step in range(12):
            count = histogram[(root + step) % 12]
            major += count * _MAJOR[step]
            minor += count * _MINOR[step]
        best = max(best, major, minor)
    entropy = 0.0
    for count in histogram:
        if count > 0:
            share = count / len(pitch)
            entropy -= share * np.log2(share)
    return best / len(pitch), entropy


@numba.njit(cache=True, nogil=True)
def _figures(start: np.ndarray, pitch: np.ndarray, ticks_per_beat: int) -> tuple[int, int, float]:
    """Distinct notes, distinct four-note figures, and the share of figures heard before.

    Notes are taken from left to right, then from low to high; a figure is three successive (interval, step) pairs, the
    step rounded to sixteenths, so that neither a human's timing nor the MIDI file's resolution makes every figure new.
    """
    m = len(start)
    key = np.sort((((start * GRID_PER_BEAT + ticks_per_beat // 2) // ticks_per_beat) << 8) + pitch)
    distinct_notes = 1
    for k in range(1, m):
        distinct_notes += key[k] != key[k - 1]
    total = m - FIGURE_NOTES + 1
    if total < 1:
        return distinct_notes, 0, 0.0
    move = np.empty(m - 1, np.int64)
    for k in range(m - 1):
        sixteenths = (((key[k + 1] >> 8) - (key[k] >> 8)) * 4 + GRID_PER_BEAT // 2) // GRID_PER_BEAT
        interval = (key[k + 1] & 255) - (key[k] & 255)
        move[k] = (min(sixteenths, 255) << 9) + interval + 256
    figure = np.empty(total, np.int64)
    for k in range(total):
        figure[k] = (((move[k] << 20) + move[k + 1]) << 20) + move[k + 2]
    figure.sort()
    distinct = 1
    for k in range(1, total):
        distinct += figure[k] != figure[k - 1]
    return distinct_notes, distinct, 1 - distinct / total


@numba.njit(cache=True, nogil=True)
def _union_s(start_s: np.ndarray, length_s: np.ndarray) -> float:
    """Seconds covered by at least one note; notes in order of onset."""
    covered, reached = 0.0, 0.0
    for k in range(len(start_s)):
        end_s = start_s[k] + length_s[k]
        covered += max(end_s - max(start_s[k], reached), 0.0)
        reached = max(reached, end_s)
    return covered
