"""Whole pieces cut into clips as long as the policy's, so that real music and completions can be compared.

Shape letters: M notes of a piece, B beats of a piece, W windows of a piece.
"""

from __future__ import annotations

import numpy as np

from fastsmart.notes import DEFAULT_BPM, NoteBatch, ticks_to_seconds


def cut_windows(pieces: NoteBatch, window_s: float = 10.0) -> NoteBatch:
    """Consecutive windows of `window_s` seconds of every piece, each starting on a beat, as one batch of clips.

    The first window of a piece starts on the beat of its first note. A last window that the piece does not fill is
    left out, unless it is the piece's only one; so is a window without an onset. Notes already sounding where a window
    starts are left out, notes that ring past its end are cut there. Every clip carries the tempo and meter in force.
    """
    clips = [clip for i in range(len(pieces)) for clip in _windows(pieces.select([i]), window_s)]
    if not clips:
        return pieces.select([])
    return NoteBatch.concat(clips)


def _windows(piece: NoteBatch, window_s: float) -> list[NoteBatch]:
    """The windows of one piece, each a batch of one clip."""
    if len(piece.onset_tick) == 0:
        return []
    per_beat = piece.ticks_per_beat
    end_tick = piece.onset_tick + piece.duration_tick
    first_beat, last_beat = int(piece.onset_tick.min()) // per_beat, int(end_tick.max()) // per_beat + 2
    beat_tick = np.arange(first_beat, last_beat, dtype=np.int64) * per_beat
    beat_s = ticks_to_seconds(beat_tick, per_beat, piece.tempo_tick, piece.tempo_bpm)

    clips: list[NoteBatch] = []
    start = 0  # index into the beats
    while start < len(beat_s):
        start_s, stop_s = float(beat_s[start]), float(beat_s[start]) + window_s
        if clips and stop_s > float(piece.end_s[0]):
            break
        stop_tick = int(np.interp(stop_s, beat_s, beat_tick))
        inside = (piece.onset_s >= start_s - 1e-9) & (piece.onset_s < stop_s)
        if inside.any():
            clips.append(_clip(piece, np.flatnonzero(inside), int(beat_tick[start]), start_s, stop_tick, stop_s))
        start = int(np.searchsorted(beat_s, stop_s - 1e-9))
    return clips


def _clip(
    piece: NoteBatch, rows: np.ndarray, start_tick: int, start_s: float, stop_tick: int, stop_s: float
) -> NoteBatch:
    onset_s = np.maximum(piece.onset_s[rows] - start_s, 0.0)
    duration_s = np.minimum(piece.duration_s[rows], stop_s - start_s - onset_s)
    onset_tick = piece.onset_tick[rows]
    duration_tick = np.minimum(piece.duration_tick[rows], np.maximum(stop_tick - onset_tick, 1))
    return NoteBatch.single(
        *(onset_s, duration_s, piece.pitch[rows], piece.velocity[rows]),
        (onset_tick - np.int32(start_tick), duration_tick),
        piece.ticks_per_beat,
        tempi=_in_force(piece.tempo_tick, piece.tempo_bpm, start_tick, stop_tick, DEFAULT_BPM),
        meters=_in_force(piece.meter_tick, piece.meter, start_tick, stop_tick, (4, 4)),
    )


def _in_force(
    tick: np.ndarray, value: np.ndarray, start_tick: int, stop_tick: int, default: float | tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Events of a window: the one in force at its start, moved to tick 0, and those inside it."""
    before = np.flatnonzero(tick <= start_tick)
    at_start = value[before[-1]] if len(before) else np.asarray(default, value.dtype)
    later = np.flatnonzero((tick > start_tick) & (tick < stop_tick))
    ticks = np.concatenate([[0], tick[later] - start_tick]).astype(np.int32)
    return ticks, np.concatenate([at_start[None], value[later]]).astype(value.dtype)
