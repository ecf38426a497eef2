"""Spectra of clips, frame by frame: 0.256 s (4,096 samples at 16 kHz), half overlapping, under a Blackman window.

Shape letters: N clips, K frames of a clip, B frequency bins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import fft, signal

from fastsmart.audio.batch import AudioBatch
from fastsmart.reward.base import unrendered

FRAME_S = 0.256
SILENCE_RMS = 1e-4  # -80 dBFS; frames under it are not heard
PEAKS = 20  # of a frame, whose roughness counts
PEAK_FLOOR_DB = 55.0  # under the strongest peak of the frame; the side lobes of a Blackman window are 58 dB under it
CURVE_MAX = 0.179756  # of exp(-3.51 x) - exp(-5.75 x)


def frame_size(sample_rate: int) -> int:
    """Samples of a frame, a power of two."""
    return 1 << round(np.log2(FRAME_S * sample_rate))


def spectra(audio: AudioBatch) -> Iterator[tuple[int, np.ndarray, float]]:
    """Clip, magnitudes of its frames that are heard (float32 [K, B], full scale = 1), Hz per bin; silence left out."""
    size = frame_size(audio.sample_rate)
    hz_per_bin = audio.sample_rate / size
    window = signal.windows.blackman(size, sym=False).astype(np.float32)
    for i in map(int, np.flatnonzero(~unrendered(audio))):
        samples = audio.clip(i)
        frames = 1 + max(-(-(len(samples) - size) // (size // 2)), 0)
        padded = np.zeros((frames + 1) * (size // 2), np.float32)
        padded[: len(samples)] = samples
        frame = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 2]
        frame = frame[np.einsum("kt,kt->k", frame, frame) > SILENCE_RMS**2 * size]
        if len(frame):
            yield i, np.abs(fft.rfft(frame * window, axis=1)) * np.float32(2 / window.sum()), hz_per_bin
