"""`AudioBatch`: what a renderer hands to the rewards. Shape letters: N clips, T samples of the longest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_file

if TYPE_CHECKING:  # the pool's workers start faster without it
    from torch import Tensor

FULL_SCALE = 32768  # of 16 bits, as readers divide by it
CHUNK = 2**18  # samples that are converted at once: an hour of them would fill the memory
PROBE_BYTES = 2**16  # more than libsndfile writes at once, so that they find the disk as full as it did


@dataclass(frozen=True)
class AudioBatch:
    """Mono clips of different lengths, zero after each clip's end.

    samples     : float32 [N, T]; all NaN in a row that could not be rendered
    lengths     : int64 [N], samples of each clip
    sample_rate : Hz
    """

    samples: np.ndarray
    lengths: np.ndarray
    sample_rate: int

    def __len__(self) -> int:
        return len(self.lengths)

    def clip(self, i: int) -> np.ndarray:
        """Clip i without its padding, float32 [lengths[i]]."""
        return self.samples[i, : self.lengths[i]]

    def to_wav(self, i: int, path: str | Path) -> None:
        """Write clip i as 16-bit WAV; raises UserError when the file cannot be written."""
        write_wav(path, self.clip(i), self.sample_rate)


class DeviceAudio(AudioBatch):
    """Clips on a device, for a reward that listens there; `samples` is the copy that others get when they ask.

    on_device : float32 [N, T] as `samples`
    """

    def __init__(self, on_device: Tensor, lengths: np.ndarray, sample_rate: int) -> None:
        vars(self).update(on_device=on_device, lengths=lengths, sample_rate=sample_rate)
        self.on_device: Tensor

    @cached_property
    def samples(self) -> np.ndarray:
        return self.on_device.cpu().numpy()


def write_wav(path: str | Path, samples: np.ndarray, sample_rate: int) -> None:
    """Write float samples, [T] or [T, 2] in -1..1, as 16-bit WAV (FLAC when the name ends in .flac).

    The file appears under its name once it is whole. Raises UserError when it cannot be written.
    """
    parts = (samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK))
    write_parts(path, parts, sample_rate, 1 if samples.ndim == 1 else samples.shape[1])


def write_parts(path: str | Path, parts: Iterable[np.ndarray], sample_rate: int, channels: int) -> None:
    """Write samples that come part after part, [some] or [some, channels] each, as `write_wav` does."""
    import soundfile  # not above: it brings a libsndfile of its own, see `fastsmart.audio.fluidsynth`

    kind = "FLAC" if Path(path).suffix.lower() == ".flac" else "WAV"
    with atomic_file(path) as part:
        try:
            with soundfile.SoundFile(os.fsencode(part), "w", sample_rate, channels, "PCM_16", format=kind) as file:
                for samples in parts:
                    # rounded here: libsndfile cuts off, which makes the least negative value half a step too loud
                    steps = np.rint(samples * FULL_SCALE)
                    file.write(np.clip(steps, -FULL_SCALE, FULL_SCALE - 1).astype(np.int16))
        except soundfile.LibsndfileError as error:
            _raise_cause(part)
            raise UserError(f"cannot write {path}: {error}") from error


def _raise_cause(part: Path) -> None:
    """Raise the OSError behind libsndfile's "System error", such as a full disk, if it comes again."""
    with part.open("ab") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
