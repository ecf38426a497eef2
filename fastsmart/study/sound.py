"""Outputs as compressed audio for a page: 48 kHz stereo MP3, which every browser plays."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from fastsmart.audio import FluidSynthRenderer, RenderSettings, listening_seconds, listening_settings
from fastsmart.audio.rendering import LISTENING_RATE_HZ
from fastsmart.notes import NoteBatch

LAME_LEVEL = {"VARIABLE": 1.0, "CONSTANT": 0.95}  # what the encoder makes of a level of 1, measured
LOUDEST = 10 ** (-0.5 / 20)  # of a sample before encoding, which adds up to 0.2 dB to a peak (measured)
COMPRESSION = {"VARIABLE": 0.3, "CONSTANT": 0.8}  # of soundfile's MP3 scale: near 100 kbit/s in stereo with both


def listen_to(notes: NoteBatch, settings: RenderSettings, max_seconds: float | None = None) -> list[np.ndarray]:
    """Every piece as a person hears it, float32 [T, 2] at 48 kHz, whole or up to `max_seconds`.

    Raises UserError when FluidSynth or the soundfont cannot be used.
    """
    limit_s = listening_seconds(notes) if max_seconds is None else max_seconds
    with FluidSynthRenderer(listening_settings(settings, limit_s)) as renderer:
        return [renderer.render_stereo(notes, i) for i in range(len(notes))]


def mp3(samples: np.ndarray, constant: bool = False) -> bytes:
    """Samples [T, 2] in -1..1 at 48 kHz as MP3 without title or date; `constant` makes equal lengths equal sizes.

    A clip whose peak is above -0.5 dB is brought down to it, so that decoders do not clip.
    """
    import soundfile  # brings a libsndfile of its own, see `fastsmart.audio.fluidsynth`

    peak = float(np.abs(samples).max(initial=0.0))
    if peak > LOUDEST:
        samples = samples * np.float32(LOUDEST / peak)
    sink = io.BytesIO()
    mode = "CONSTANT" if constant else "VARIABLE"
    soundfile.write(
        sink,
        samples / LAME_LEVEL[mode],
        LISTENING_RATE_HZ,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=COMPRESSION[mode],
        bitrate_mode=mode,
    )
    return sink.getvalue()


def data_url(content: bytes, kind: str = "audio/mpeg") -> str:
    """Content inside the page itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def note_rows(notes: NoteBatch, i: int) -> Sequence[list[float]]:
    """[onset s, duration s, pitch, velocity] of every note of a piece, rounded to milliseconds, for a piano roll."""
    rows = notes.rows(i)
    columns = (notes.onset_s[rows].round(3), notes.duration_s[rows].round(3), notes.pitch[rows], notes.velocity[rows])
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
