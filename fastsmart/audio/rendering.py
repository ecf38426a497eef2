"""Notes in, audio out, in one call: a batch for rewards, a file for a person."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastsmart.audio.batch import AudioBatch, write_wav
from fastsmart.audio.fluidsynth import FluidSynthRenderer
from fastsmart.audio.listening_file import write_listening_file
from fastsmart.audio.pool import RenderPool
from fastsmart.audio.settings import RenderSettings
from fastsmart.errors import UserError
from fastsmart.limits import require_kind
from fastsmart.notes import NoteBatch

LISTENING_RATE_HZ = 48000
LONGEST_S = 3600.0  # of a file; also the limit of `audio.max_seconds`


def render(
    notes: NoteBatch,
    soundfont: str | Path = "",
    backend: str = "bank",
    sample_rate: int = 16000,
    max_seconds: float = 10.0,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> AudioBatch:
    """Render all N pieces, mono, as an AudioBatch of N clips; one piece gives the same samples wherever it is rendered.

    workers  : processes, 0 = one a core. Even a single clip is rendered in a process of its own, because what this
               one has imported can change the last bits (see `fastsmart.audio.fluidsynth`).
    progress : called with the number of clips done
    options  : the other fields of `RenderSettings`

    Raises UserError when a setting, FluidSynth or the soundfont cannot be used; TypeError naming an argument that is
    none of these or of another kind.
    """
    require_kind(notes, NoteBatch, "notes", "a NoteBatch, as decode and read_midi give")
    if unknown := sorted(options.keys() - {field.name for field in fields(RenderSettings)}):
        raise TypeError(f"render takes no {unknown[0]}; its options are the fields of RenderSettings")
    settings = RenderSettings(
        str(soundfont), backend, sample_rate=sample_rate, max_seconds=max_seconds, workers=workers, **options
    )
    with RenderPool(settings, len(notes)) as pool:
        return pool.render(notes, progress)


def listening_seconds(notes: NoteBatch) -> float:
    """`max_seconds` for rendering these pieces whole, up to an hour."""
    return min(max(1.0, float(notes.end_s.max(initial=0.0))), LONGEST_S)


def is_cut(notes: NoteBatch, i: int) -> bool:
    """Whether piece i goes on beyond the hour that a file for listening may last."""
    return float(notes.end_s[i]) > LONGEST_S


def listening_settings(settings: RenderSettings, seconds: float) -> RenderSettings:
    """`settings` for files of up to `seconds` that a person listens to, played by the reference renderer.

    48 kHz, the last notes fade out, peak-normalised. Reverb and chorus stay as they are set, off by default: a listener
    should judge the sound that the reward judged, and a room hides what fine-tuning changes first, how notes end and
    how densely they lie.
    """
    return replace(
        settings,
        backend="fluidsynth",
        sample_rate=LISTENING_RATE_HZ,
        max_seconds=seconds,
        tail="release",
        normalize="peak",
        empty="silence",
    )


def render_file(
    notes: NoteBatch,
    i: int,
    path: str | Path,
    settings: RenderSettings | None = None,
    renderer: FluidSynthRenderer | None = None,
) -> None:
    """Write all of piece i for listening: 48 kHz stereo, 16 bit, WAV or FLAC by the name's ending.

    For many files pass one `renderer` made with `listening_settings`, so that the soundfont is loaded once.

    A piece is cut at 60 minutes, see `is_cut`. Raises UserError when no note is left of it, the file cannot be written,
    or FluidSynth or the soundfont cannot be used.
    """
    onsets = notes.onset_s[notes.rows(i)]
    if len(onsets) and onsets.min() >= LONGEST_S:
        raise UserError(
            f"cannot write {path}: the first note is at {onsets.min() / 60:.0f} minutes, and files end at 60"
        )
    if renderer is None:
        whole = listening_settings(settings or RenderSettings(), listening_seconds(notes))
        with FluidSynthRenderer(whole) as own:
            write_listening_file(path, own, notes, i)
    elif renderer.settings == listening_settings(renderer.settings, renderer.settings.max_seconds):
        write_listening_file(path, renderer, notes, i)
    else:
        write_wav(path, renderer.render_stereo(notes, i), renderer.settings.sample_rate)


@dataclass(frozen=True)
class RenderedFile:
    """A MIDI file that was rendered for listening, or why it could not be.

    cut : the piece goes on beyond the 60 minutes of the file
    """

    source: Path
    target: Path
    error: UserError | None
    cut: bool


def render_files(
    jobs: Sequence[tuple[Path, Path]], settings: RenderSettings, read: Callable[[Path], NoteBatch]
) -> Iterator[RenderedFile]:
    """Render many (MIDI file, target) for listening, `worker_count` at once; yields them in order, done.

    read : gives the one piece of a file; the UserError it or the writing raises is that file's

    Raises UserError when FluidSynth or the soundfont cannot be used.
    """
    whole = listening_settings(settings, LONGEST_S)
    own = threading.local()  # FluidSynth runs without Python's lock, so threads will do, each with a synth

    with ExitStack() as renderers, ThreadPoolExecutor(min(settings.worker_count, max(len(jobs), 1))) as threads:
        FluidSynthRenderer(whole).close()  # what is wrong with the soundfont is no file's fault

        def one(job: tuple[Path, Path]) -> RenderedFile:
            source, target = job
            try:
                notes = read(source)
                if not hasattr(own, "renderer"):
                    own.renderer = renderers.enter_context(FluidSynthRenderer(whole))
                render_file(notes, 0, target, renderer=own.renderer)
            except UserError as error:
                return RenderedFile(source, target, error, False)
            return RenderedFile(source, target, None, is_cut(notes, 0))

        yield from threads.map(one, jobs)
