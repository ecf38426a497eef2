"""What notes have in common in a style, as shares: intervals, rhythms, chords, registers, degrees of the scale.

Nothing of it depends on velocity, tempo, key or a pianist's timing (`masked`), by which sources differ rather than
styles. Shape letters: N clips, M notes of all clips, G onsets of all clips, B bins of a histogram.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastsmart.music.features import features
from fastsmart.music.histograms import LOWEST_KEY, MAJOR_PROFILE, MINOR_PROFILE, REGISTER_SEMITONES
from fastsmart.notes import NoteBatch

STEPS = 12  # ticks of a beat of masked notes
GRID = 3  # of their onsets and durations: sixteenths, to which triplets are moved too
LONGEST = 48  # duration that is told from longer ones
MASKED_VELOCITY = 64
MASKED_BPM = 120.0
CLIP_STEPS = STEPS * 2**20  # longer than any clip: clips one after the other on one axis of time
GAPS = np.array([3, 6, 9, 12, 18, 24, 36, 48])  # between onsets, in twelfths of a beat
MIDDLE_C = 60
SURE_DIGITS = 9  # of what a product of matrices gives: the last ones hang on how many clips there are
FEATURES = 360  # of `style_counts`
# semitones from the root: triads, sevenths, a suspension, a single note and a bare fifth
CHORDS = ((0, 4, 7), (0, 3, 7), (0, 3, 6), (0, 4, 8), (0, 4, 7, 10), (0, 3, 7, 10), (0, 5, 7), (0,), (0, 7))
LAGS = (STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS)  # after which an accompaniment may come again
PAIR_GAPS = np.array([0, 3, 6, 9, 12, 18, 24])  # between the two notes of a pair, in twelfths of a beat


def masked(notes: NoteBatch) -> NoteBatch:
    """The notes in sixteenths of a beat, with one velocity and one tempo; a beat is a quarter note, of 12 ticks.

    What is played up to a thirty-second of a beat early or late is then as it is written, and triplets are one, two and
    one sixteenths. Notes are sorted by onset and pitch within a clip; of equal ones the longest stays.
    """
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    onset, length = _on_grid(notes.onset_tick, notes), _on_grid(notes.duration_tick, notes)
    length = np.clip(length, GRID, LONGEST)
    order = np.lexsort((-length, notes.pitch, onset, clip))
    key = (clip[order] * CLIP_STEPS + onset[order]) * 128 + notes.pitch[order]
    order = order[np.concatenate([[True], np.diff(key) > 0])[: len(order)]]
    clip, onset, length = clip[order], onset[order], length[order]
    offsets = np.searchsorted(clip, np.arange(len(notes) + 1)).astype(np.int64)
    second = 60.0 / MASKED_BPM / STEPS
    end = np.zeros(len(notes))
    np.maximum.at(end, clip, (onset + length) * second)
    none, no_offsets = np.zeros(0, np.int32), np.zeros(len(notes) + 1, np.int64)
    return replace(
        notes,
        onset_s=onset * second,
        duration_s=length * second,
        pitch=notes.pitch[order],
        velocity=np.full(len(order), MASKED_VELOCITY, np.uint8),
        offsets=offsets,
        end_s=end,
        onset_tick=onset.astype(np.int32),
        duration_tick=length.astype(np.int32),
        ticks_per_beat=STEPS,
        tempo_tick=none,
        tempo_bpm=np.zeros(0),
        tempo_offsets=no_offsets,
        meter_tick=none,
        meter=np.zeros((0, 2), np.int32),
        meter_offsets=no_offsets,
        pedals=None,
    )


def style_counts(notes: NoteBatch) -> np.ndarray:
    """Square roots of shares, and a few means, of masked notes, float64 [N, F]; zeros for a clip without notes."""
    n, clip = len(notes), np.repeat(np.arange(len(notes)), notes.counts)
    if not len(clip):
        return np.zeros((n, FEATURES))
    pitch, onset, length = (x.astype(np.int64) for x in (notes.pitch, notes.onset_tick, notes.duration_tick))
    time = clip * CLIP_STEPS + onset
    starts = np.flatnonzero(np.concatenate([[True], np.diff(time) > 0])[: len(time)])
    ends = np.append(starts[1:], len(time))
    at, size = time[starts], ends - starts
    bass, top, of = pitch[starts], pitch[ends - 1], clip[starts]
    group = np.repeat(np.arange(len(starts)), size)
    same = np.diff(of) == 0
    gap = np.searchsorted(GAPS, np.diff(at)[same], side="right") - 1
    top_move, bass_move, later = np.diff(top)[same], np.diff(bass)[same], of[1:][same]
    chained = (np.diff(later) == 0) & (np.diff(np.flatnonzero(same)) == 1)
    inner = np.flatnonzero(np.diff(group) == 0)
    upper = np.flatnonzero(pitch > bass[group])
    ends_at = np.sort(time + length)
    sounding = np.searchsorted(time, at, side="right") - np.searchsorted(ends_at, at, side="right")
    high = (pitch >= MIDDLE_C).astype(np.int64)

    def paired(kinds: np.ndarray, classes: int) -> np.ndarray:
        return _shares(kinds[:-1][chained] * classes + kinds[1:][chained], later[1:][chained], n, classes**2)

    key, shares_of_degrees = degrees(pitch, length, clip, n)
    blocks = [
        _shares(np.clip(top_move, -12, 12) + 12, later, n, 25),
        _shares(np.clip(bass_move, -12, 12) + 12, later, n, 25),
        _shares(np.minimum(np.diff(pitch)[inner], 24) - 1, clip[inner], n, 24),
        _shares((pitch - bass[group])[upper] % 12, clip[upper], n, 12),
        _shares(np.minimum(size, 6) - 1, of, n, 6),
        _shares((onset % STEPS + STEPS * high) // GRID, clip, n, 2 * STEPS // GRID),
        _shares(gap, later, n, len(GAPS)),
        _shares(length // GRID - 1, clip, n, LONGEST // GRID),
        _shares(np.clip((pitch - LOWEST_KEY) // REGISTER_SEMITONES, 0, 14), clip, n, 15),
        _shares(np.minimum(sounding, 9), of, n, 10),
        _shares(3 * (np.sign(top_move) + 1) + np.sign(bass_move) + 1, later, n, 9),
        paired(_steps_and_leaps(top_move), 7),
        paired(_steps_and_leaps(bass_move), 7),
        paired(np.searchsorted([6, 9, 12, 24], GAPS[gap], side="right"), 5),
        _shares(np.minimum(top - bass, 59) // 5, of, n, 12),
        shares_of_degrees,
        _repeated(time, pitch, clip, n),
        *_by_beat(time, pitch, length, n, key % 12),
    ]
    return np.concatenate(blocks, 1)


def pair_counts(notes: NoteBatch) -> np.ndarray:
    """What `style_counts` leaves out, of masked notes, float64 [N, F]: which intervals any two notes within two beats
    make, by the time between them, and MusPy's features."""
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    pitch = notes.pitch.astype(np.int64)
    time = clip * CLIP_STEPS + notes.onset_tick
    blocks = np.zeros((len(notes), len(PAIR_GAPS) * 24))
    reach = int(np.max(np.searchsorted(time, time + PAIR_GAPS[-1], side="right") - np.arange(len(time)), initial=1))
    for ahead in range(1, reach):
        gap = time[ahead:] - time[:-ahead]
        near = np.flatnonzero(gap <= PAIR_GAPS[-1])
        kind = np.searchsorted(PAIR_GAPS, gap[near], side="right") - 1
        interval = np.clip(pitch[ahead:][near] - pitch[:-ahead][near], -24, 23)
        folded = interval % 12 + 12 * (interval < 0)
        np.add.at(blocks, (clip[near], kind * 24 + folded), 1.0)
    blocks = np.sqrt(blocks / np.maximum(blocks.sum(1, keepdims=True), 1.0))
    table = features(notes)
    names = [name for name in table if "velocity" not in name and name not in ("notes", "distinct_notes", "figures")]
    return np.concatenate([blocks, np.nan_to_num(np.stack([table[name] for name in names], 1))], 1)


def degrees(pitch: np.ndarray, length: np.ndarray, clip: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The key of each clip, int64 [N], major from 0 and minor from 12 up; and float64 [N, 14]: the shares of the
    degrees of its scale, whether it is minor, and how well it fits.

    The key is that of Krumhansl's profiles to which the lengths of the pitch classes correlate most.
    """
    table = np.zeros((n, 12))
    np.add.at(table, (clip, pitch % 12), length.astype(np.float64))
    profiles = np.array([np.roll(p, tonic) for p in (MAJOR_PROFILE, MINOR_PROFILE) for tonic in range(12)])
    profiles = profiles - profiles.mean(1, keepdims=True)
    profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
    centred = table - table.mean(1, keepdims=True)
    fit = centred @ profiles.T / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    fit = fit.round(SURE_DIGITS)
    key = fit.argmax(1)
    turned = np.take_along_axis(table, (np.arange(12) + key[:, None]) % 12, 1)
    shares = np.sqrt(turned / np.maximum(turned.sum(1, keepdims=True), 1e-9))
    minor = (key >= 12)[:, None] & (table.sum(1, keepdims=True) > 0)
    return key, np.concatenate([shares, minor, fit.max(1)[:, None]], 1)


def _by_beat(time: np.ndarray, pitch: np.ndarray, length: np.ndarray, n: int, tonic: np.ndarray) -> list[np.ndarray]:
    """Of the beats on which notes begin: how many notes and onsets, what chords, and how their roots move.

    The chord is that of `CHORDS` to which the lengths of the beat's pitch classes are nearest by cosine.
    """
    beat, number = np.unique(time // STEPS, return_inverse=True)
    of = beat // (CLIP_STEPS // STEPS)
    notes = np.bincount(number)
    onsets = np.bincount(number[np.unique(time, return_index=True)[1]])
    table = np.zeros((len(beat), 12))
    np.add.at(table, (number, pitch % 12), np.minimum(length, STEPS).astype(np.float64))
    shapes = np.zeros((len(CHORDS) * 12, 12))
    for i, chord in enumerate(CHORDS):
        for root in range(12):
            shapes[i * 12 + root, (np.array(chord) + root) % 12] = len(chord) ** -0.5
    fit = table @ shapes.T / np.linalg.norm(table, axis=1, keepdims=True)
    chord, root = np.divmod(fit.round(SURE_DIGITS).argmax(1), 12)
    next_beat = (np.diff(of) == 0) & (np.diff(beat) == 1)
    motion = (np.diff(root) % 12)[next_beat]
    return [
        _shares(np.minimum(notes, 12) - 1, of, n, 12),
        _shares(np.minimum(onsets, 4) - 1, of, n, 4),
        _shares(chord, of, n, len(CHORDS)),
        _shares((root - tonic[of]) % 12, of, n, 12),
        _shares(motion, of[1:][next_beat], n, 12),
    ]


def _on_grid(ticks: np.ndarray, notes: NoteBatch) -> np.ndarray:
    """Ticks as twelfths of a quarter note, rounded to sixteenths, int64."""
    per_step = notes.ticks_per_beat * GRID
    return (2 * STEPS * ticks.astype(np.int64) + per_step) // (2 * per_step) * GRID


def _shares(bins: np.ndarray, clip: np.ndarray, n: int, size: int) -> np.ndarray:
    """Square roots of the shares of bins in each clip, float64 [N, B]."""
    table = np.bincount(clip * size + bins, minlength=n * size).reshape(n, size)
    return np.sqrt(table / np.maximum(table.sum(1, keepdims=True), 1))


def _steps_and_leaps(move: np.ndarray) -> np.ndarray:
    """Seven kinds of move: none, a step, a leap or more than a fifth, up or down."""
    return np.sign(move) * np.searchsorted([1, 3, 8], np.abs(move), side="right") + 3


def _repeated(time: np.ndarray, pitch: np.ndarray, clip: np.ndarray, n: int) -> np.ndarray:
    """Shares of the notes that come again one, two, three and four beats later, float64 [N, 4]."""
    key, total = time * 128 + pitch, np.maximum(np.bincount(clip, minlength=n), 1)
    again = [np.bincount(clip, np.isin(key + lag * 128, key), minlength=n) / total for lag in LAGS]
    return np.stack(again, 1)
