"""A note bank for a machine without FluidSynth and without a soundfont: 88 keys of decaying partials, one layer each.

    export FASTSMART_CACHE=FOLDER FASTSMART_SOUNDFONT=FOLDER/synthetic-piano.sf2
    python bench/synthetic_piano.py FOLDER

It is no piano, and what is heard from it says nothing of one; it costs a mixdown what a piano costs.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np

from fastsmart.audio.bank import NoteBank
from fastsmart.audio.events import BLOCK
from fastsmart.audio.mixdown import HELD_BLOCKS, INAUDIBLE, LEAD
from fastsmart.audio.settings import SYNTH_HZ, RenderSettings

FONT = "synthetic-piano.sf2"
KEYS = range(21, 109)
PARTIALS = 6
RELEASE_S = 0.3  # from full level to 60 dB below it
LEVEL = 0.05  # of the loudest note


def write_piano(folder: Path, settings: RenderSettings) -> RenderSettings:
    """Store every note in the bank of a stub of a soundfont in `folder`; the settings that render from it.

    The bank is where banks are: FASTSMART_CACHE names the place.
    """
    font = folder / FONT
    font.write_bytes(b"RIFF\4\0\0\0sfbk")
    settings = replace(settings, soundfont=str(font))
    velocities = list(range(1, 128))
    decay = np.full(len(HELD_BLOCKS), np.log(1000.0) / RELEASE_S * BLOCK / SYNTH_HZ, np.float32)
    with NoteBank(settings) as bank:
        for key in KEYS:
            if bank.stored(np.array([key]), np.array([127])):
                continue
            samples = _note(key, settings.sample_rate, bank.seconds, bank.tables.phases)
            line = {
                "key": key,
                "velocities": velocities,
                "gain": [LEVEL * (v / 127) ** 2 / np.iinfo(np.int16).max for v in velocities],
                "faster": [0.0] * len(velocities),
                "decay": decay.tolist(),
                "length": samples.shape[1],
                "snr_db": 100.0,
            }
            if not bank._store(line, samples):
                raise OSError(f"there is no room for a note bank in {bank.path}")
    return settings


def _note(key: int, rate_hz: int, longest_s: float, phases: int) -> np.ndarray:
    """One held note, int16 [P, T]: phase p begins p blocks of the synth after the first, and all LEAD samples early."""
    pitch_hz = 440.0 * 2.0 ** ((key - 69) / 12)
    nepers_per_s = 0.7 * 2.0 ** ((key - 21) / 24)
    samples = int(min(longest_s, INAUDIBLE / nepers_per_s) * rate_hz)
    late_s = np.arange(phases)[:, None] * BLOCK / SYNTH_HZ
    t = (np.arange(samples) - LEAD) / rate_hz - late_s
    wave = np.zeros_like(t)
    for partial in range(1, PARTIALS + 1):
        if partial * pitch_hz < 0.45 * rate_hz:
            wave += np.sin(2 * np.pi * partial * pitch_hz * t) * np.exp(-nepers_per_s * partial**0.5 * t) / partial
    wave *= np.clip(t / 0.002, 0.0, 1.0)  # no click
    return np.rint(wave / np.abs(wave).max() * np.iinfo(np.int16).max).astype(np.int16)


if __name__ == "__main__":
    write_piano(Path(sys.argv[1]), RenderSettings())
