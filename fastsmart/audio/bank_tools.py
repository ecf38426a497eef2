"""Jobs on a whole bank: storing every note beforehand, and measuring how far it is from FluidSynth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastsmart.audio.pool import RenderPool
from fastsmart.audio.settings import RenderSettings
from fastsmart.notes import NoteBatch

PIANO_KEYS = np.arange(21, 109)
VELOCITIES = np.linspace(0, 127, 33, dtype=np.intc)[1:]  # the 32 of the tokenizer
NOTE_S = 0.01


def build_bank(settings: RenderSettings, progress: Callable[[int, int], None] | None = None) -> None:
    """Store every note of a piano at the velocities the tokenizer has, in the pool's processes.

    progress : called with the keys done and their number

    Raises UserError as the pool does.
    """
    keys, each = len(PIANO_KEYS), len(VELOCITIES)
    m = keys * each
    onset_s = np.tile(np.arange(each) * NOTE_S, keys)
    notes = replace(
        NoteBatch.empty(keys),
        onset_s=onset_s,
        duration_s=np.full(m, NOTE_S),
        pitch=np.repeat(PIANO_KEYS, each).astype(np.uint8),
        velocity=np.tile(VELOCITIES, keys).astype(np.uint8),
        offsets=np.arange(keys + 1) * each,
        end_s=np.full(keys, each * NOTE_S),
        onset_tick=np.zeros(m, np.int32),
        duration_tick=np.ones(m, np.int32),
    )
    with RenderPool(settings, keys) as pool:
        pool.render(notes, lambda done: progress(done, keys) if progress else None)


def fidelity(settings: RenderSettings, notes: NoteBatch) -> list[float]:
    """Signal-to-noise ratio in dB of each of N pieces from the bank, FluidSynth's own rendering being the signal.

    Raises UserError as the pool does.
    """
    clips = []
    for backend in ("fluidsynth", "bank"):
        with RenderPool(replace(settings, backend=backend, normalize="none"), len(notes)) as pool:
            clips.append(pool.render(notes))
    reference, other = clips
    return [snr_db(reference.clip(i), other.clip(i)) for i in range(len(notes))]


def snr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal-to-noise ratio in dB of one clip [T] against a reference; infinite where they are equal."""
    signal = reference.astype(np.float64)
    noise = float(((signal - other) ** 2).sum())
    return float(10 * np.log10(float((signal**2).sum()) / noise)) if noise else float("inf")
