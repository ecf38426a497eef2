"""Clips and single notes as a browser plays them: FLAC of 48 kHz, one loudness for all clips."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fastsmart.audio import FluidSynthRenderer, RenderSettings, listening_settings
from fastsmart.audio.rendering import LISTENING_RATE_HZ
from fastsmart.notes import MIDI_TICKS_PER_BEAT, NoteBatch

LONGEST_S = 120.0  # of what is played to a listener: a phrase and its answer
HIGHEST_PEAK = 10 ** (-1.0 / 20)
KEPT = 24  # clips whose sound is kept in memory
KEYS = range(21, 109, 4)  # of the piano of the page; those between are these, played a little faster or slower
KEY_S, KEY_VELOCITY = 3.0, 88


class Sound:
    """Renders for listeners with FluidSynth; every clip at -23 LUFS, less where a peak forbids it.

    Safe to use from several threads. Raises UserError when FluidSynth or the soundfont cannot be used.
    """

    def __init__(self, soundfont: str = "") -> None:
        settings = listening_settings(RenderSettings(soundfont), LONGEST_S)
        self._renderer = FluidSynthRenderer(replace(settings, normalize="loudness"))
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def clip(self, name: str, notes: Callable[[], NoteBatch]) -> bytes:
        """FLAC of a clip, stereo, rendered once and kept for a while under its name."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = flac(_without_peaks(self._renderer.render_stereo(notes(), 0)))
            self._kept.move_to_end(name)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[name]

    def has(self, name: str) -> bool:
        """Whether a clip need not be rendered."""
        return name in self._kept

    def key(self, pitch: int) -> bytes:
        """FLAC of one key of the piano, mono, struck and held for three seconds."""
        note = notes_of([(0.0, KEY_S, pitch, KEY_VELOCITY)], 120.0)
        with self._lock:
            return flac(_without_peaks(self._renderer.render_stereo(note, 0)).mean(axis=1))

    def close(self) -> None:
        """Free the synth; nothing can be rendered any more."""
        with self._lock:
            self._renderer.close()


def flac(samples: np.ndarray) -> bytes:
    """Samples [T] or [T, 2] in -1..1 at 48 kHz as a FLAC file of 16 bits."""
    import soundfile  # brings a libsndfile of its own, see `fastsmart.audio.fluidsynth`

    sink = io.BytesIO()
    soundfile.write(sink, samples, LISTENING_RATE_HZ, format="FLAC", subtype="PCM_16")
    return sink.getvalue()


def notes_of(rows: Sequence[tuple[float, float, int, int]], bpm: float) -> NoteBatch:
    """One piece of (onset s, duration s, pitch, velocity), in 4/4 at this tempo."""
    table = np.array(sorted(rows), np.float64).reshape(-1, 4)
    ticks = np.rint(table[:, :2] * (bpm / 60 * MIDI_TICKS_PER_BEAT))
    onset_s, duration_s, pitch, velocity = table.T
    begin = np.zeros(1, np.int32)
    return NoteBatch.single(
        *(onset_s, duration_s, pitch, velocity),
        (ticks[:, 0], np.maximum(ticks[:, 1], 1)),
        MIDI_TICKS_PER_BEAT,
        tempi=(begin, np.array([bpm])),
        meters=(begin, np.array([[4, 4]])),
    )


def _without_peaks(samples: np.ndarray) -> np.ndarray:
    """Samples that no converter clips."""
    peak = float(np.abs(samples).max(initial=0.0))
    return samples * np.float32(HIGHEST_PEAK / peak) if peak > HIGHEST_PEAK else samples
