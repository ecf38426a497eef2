"""A piece of any length as a file for a listener, in bounded memory. Shape letter: T samples of the clip.

An hour of stereo is 1.4 GB of samples, and its level is known at its end only. So it is played once, part after part,
into a spool, which lies in memory for some minutes and on the disk beyond, and is levelled from there into the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO

import numpy as np

from fastsmart.audio.batch import CHUNK, write_parts
from fastsmart.audio.events import PEAK_FLOOR, fade_out, finish
from fastsmart.audio.fluidsynth import FluidSynthRenderer
from fastsmart.audio.settings import RenderSettings
from fastsmart.machine.files import os_errors_as_user_errors
from fastsmart.notes import NoteBatch

KEPT_BYTES = 2**27  # of a piece in memory: six minutes
FRAME_BYTES = 8  # two float32


def write_listening_file(path: str | Path, renderer: FluidSynthRenderer, notes: NoteBatch, i: int) -> None:
    """Write piece i as `renderer.render_stereo` gives it, to the last bit, with a renderer made for listening.

    renderer : with settings of `fastsmart.audio.rendering.listening_settings`

    Raises UserError when the file or, of a long piece, the spool in its folder cannot be written.
    """
    settings = renderer.settings
    with os_errors_as_user_errors(Path(path)), SpooledTemporaryFile(KEPT_BYTES, dir=str(Path(path).parent)) as spool:
        score, length = renderer.play(notes, i, lambda part: spool.write(part.T.tobytes()))
        if length:
            clip = _levelled(spool, score, length, settings)
        else:
            clip = iter([np.zeros((settings.empty_samples, 2), np.float32)])
        write_parts(path, clip, settings.sample_rate, 2)


def _levelled(spool: IO[bytes], score: int, length: int, settings: RenderSettings) -> Iterator[np.ndarray]:
    """What was played, part after part, as `finish` levels it and trims its release, faded out where that is cut."""
    spool.seek(0)
    level = PEAK_FLOOR + max(max(float(part.max()), -float(part.min())) for part in _parts(spool, length))
    spool.seek(0)
    for part in _parts(spool, score):
        yield part / level
    release = np.concatenate([np.zeros((0, 2), np.float32), *(part / level for part in _parts(spool, length - score))])
    kept = finish(release, 0, replace(settings, normalize="none"))
    if kept == len(release):
        fade_out(release, settings)
    yield release[:kept]


def _parts(spool: IO[bytes], count: int) -> Iterator[np.ndarray]:
    """The next `count` samples of a spool, float32 [at most CHUNK, 2] each."""
    while count > 0:
        part = np.frombuffer(spool.read(min(count, CHUNK) * FRAME_BYTES), np.float32).reshape(-1, 2)
        count -= len(part)
        yield part
