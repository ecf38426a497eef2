"""Notes in seconds as events in samples, at which the synth strikes and releases; the same for every renderer.

Shape letters: M notes, C pedal changes, E events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastsmart.audio.settings import RenderSettings

if TYPE_CHECKING:  # the pool's workers start faster without it
    from fastsmart.notes import NoteBatch

BLOCK = 64  # samples; FluidSynth takes up events at its multiples only
SILENCE = 2.0**-16  # half a step of a 16-bit file: a tail below it is trimmed
PEAK_FLOOR = 1e-6  # of the paper's normalisation
FADE_S = 1.0  # where the pedal is down to the end, notes ring on for longer than any release
PEDAL_UP, PEDAL_DOWN = -1, -2  # where an event has a velocity
NO_PEDAL = (np.zeros(0), np.zeros(0, bool))


class Piece(NamedTuple):
    """The notes of one piece as they travel to a renderer: [M] each as in NoteBatch, its end, its pedal [C]."""

    onset_s: np.ndarray
    duration_s: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    end_s: float
    pedal_s: np.ndarray = NO_PEDAL[0]
    pedal_down: np.ndarray = NO_PEDAL[1]


class Timing(NamedTuple):
    """A piece within its window.

    score       : samples of the clip until the score ends; 0 when no note starts in the window
    length      : the same with the release tail
    heard       : bool [M], notes that start in the window
    start, stop : int64 [number heard], samples of the synth
    """

    score: int
    length: int
    heard: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def piece_arrays(notes: NoteBatch, i: int) -> Piece:
    """Piece i of a batch."""
    rows = notes.rows(i)
    columns = notes.onset_s[rows], notes.duration_s[rows], notes.pitch[rows], notes.velocity[rows]
    pedal = NO_PEDAL
    if notes.pedals:
        changes = notes.pedals.rows(i)
        pedal = notes.pedals.second[changes], notes.pedals.down[changes]
    return Piece(*columns, float(notes.end_s[i]), *pedal)


def timing(piece: Piece, settings: RenderSettings) -> Timing:
    """Find where the notes of a piece start and stop, cut to the window that the settings give."""
    rate = settings.synth_rate
    window_s = min(piece.end_s, settings.max_seconds)
    score, last = round(window_s * settings.sample_rate), round(window_s * rate)
    start, stop = note_samples(piece.onset_s, piece.duration_s, rate, last)
    heard = (start < last) & playable(piece.pitch, piece.velocity)
    if not heard.any():
        score = 0
    length = score
    if score and settings.tail == "release":
        length = min(score + round(settings.release_s * settings.sample_rate), settings.max_samples)
    return Timing(score, length, heard, start[heard], stop[heard])


def note_samples(
    onset_s: np.ndarray, duration_s: np.ndarray, rate: int, last: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Samples at which notes start and stop, int64 [M]; none stops after `last`, an int or int64 [M]."""
    start = np.maximum(np.rint(onset_s * rate).astype(np.int64), 0)
    stop = np.rint((onset_s + duration_s) * rate).astype(np.int64)
    # a note is on for one sample at least: an end at its own start would come before it and be lost
    return start, np.maximum(np.minimum(stop, last), start + 1)


def playable(pitch: np.ndarray, velocity: np.ndarray) -> np.ndarray:
    """Mask of the notes a synth can play, bool [M]: those with a key and a velocity that MIDI has."""
    return (pitch < 128) & (velocity > 0) & (velocity < 128)


def merge_events(
    start: np.ndarray, stop: np.ndarray, pitch: np.ndarray, velocity: np.ndarray, pedal: tuple[np.ndarray, np.ndarray]
) -> tuple[list[int], list[int], list[int]]:
    """All that happens to a synth, in order: block start in samples, velocity (0 = the note ends), key; [E] each.

    At one sample notes end, then the pedal moves, then notes start; otherwise the order is the notes' own. Times are
    rounded up to the block in which FluidSynth takes an event up anyway, so events of one block need one write between
    them. pedal: samples int64 [C] and bool [C]; its velocities are PEDAL_DOWN and PEDAL_UP.
    """
    pedal_at, pedal_down = pedal
    at = np.concatenate([stop, pedal_at, start])
    order = np.argsort(at, kind="stable")
    blocks = -(-at[order] // BLOCK) * BLOCK
    moves = np.where(pedal_down, PEDAL_DOWN, PEDAL_UP)
    velocities = np.concatenate([np.zeros(len(stop), np.int64), moves, velocity])[order]
    keys = np.concatenate([pitch, np.zeros(len(moves), np.int64), pitch])[order]
    return blocks.tolist(), velocities.tolist(), keys.tolist()


def finish(clip: np.ndarray, score: int, settings: RenderSettings) -> int:
    """Bring a mixed clip [T] or [T, 2] to its level and trim the silence after a release, in place; its new length.

    What is silent is decided at the level of the clip, not of the synth: a quiet piece is made louder, with its tail.
    """
    if settings.normalize == "peak":
        clip /= max(float(clip.max()), -float(clip.min())) + PEAK_FLOOR
    elif settings.normalize == "loudness":
        from fastsmart.audio.loudness import to_target  # not above: workers start faster without it

        to_target(clip, settings.sample_rate)
    if settings.tail == "cut":
        return len(clip)
    tail = np.abs(clip[score:])
    loud = np.flatnonzero((tail if tail.ndim == 1 else tail.max(axis=1)) > SILENCE)
    return score + (int(loud[-1]) + 1 if len(loud) else 0)


def fade_out(release: np.ndarray, settings: RenderSettings) -> None:
    """Let the last second of a release, [T, 2], or all of a shorter one fade to nothing, in place."""
    fade = min(round(FADE_S * settings.sample_rate), len(release))
    if fade:
        release[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)[:, None] ** 2


def empty_value(settings: RenderSettings) -> float:
    """Value of the samples of a score without notes."""
    return float("nan") if settings.empty == "nan" else 0.0
