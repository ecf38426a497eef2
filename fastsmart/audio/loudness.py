"""Integrated loudness as ITU-R BS.1770-4 defines it, for `audio.normalize = "loudness"`. T samples, C channels."""

from __future__ import annotations

from math import pi, tan

import numpy as np
from scipy.signal import lfilter

TARGET_LUFS = -23.0  # EBU R 128
BLOCK_S, HOP_S = 0.4, 0.1
ABSOLUTE_GATE_LUFS, RELATIVE_GATE_LU = -70.0, -10.0


def loudness_lufs(samples: np.ndarray, rate_hz: int) -> float:
    """Integrated loudness of a clip, float [T] or [T, C] (left and right); -inf where all of it is below the gate.

    A clip shorter than a block of 0.4 s is one block.
    """
    weighted = samples.astype(np.float64).reshape(len(samples), -1)
    for b, a in k_weighting(rate_hz):
        weighted = lfilter(b, a, weighted, axis=0)
    total = np.concatenate([[0.0], np.cumsum((weighted**2).sum(axis=1))])
    size = min(round(BLOCK_S * rate_hz), len(samples))
    start = np.arange(0, len(samples) - size + 1, max(round(HOP_S * rate_hz), 1))
    energy = (total[start + size] - total[start]) / size
    energy = energy[_lufs(energy) > ABSOLUTE_GATE_LUFS]
    if len(energy) == 0:
        return -np.inf
    energy = energy[_lufs(energy) > _lufs(energy.mean()) + RELATIVE_GATE_LU]
    return float(_lufs(energy.mean()))


def to_target(clip: np.ndarray, rate_hz: int) -> None:
    """Scale a clip, in place, to -23 LUFS; silence stays."""
    now = loudness_lufs(clip, rate_hz)
    if np.isfinite(now):
        clip *= np.float32(10 ** ((TARGET_LUFS - now) / 20))


def _lufs(mean_square: np.ndarray) -> np.ndarray:
    return -0.691 + 10 * np.log10(np.maximum(mean_square, 1e-30))


def k_weighting(rate_hz: int) -> list[tuple[list[float], list[float]]]:
    """The two filters of ITU-R BS.1770-5, Annex 1, for any rate: numerator and denominator of each.

    The standard prints coefficients for 48 kHz only. These are the bilinear transforms of the analogue filters those
    are the transforms of: a shelf of +4 dB above 1,682 Hz and a high-pass at 38 Hz.
    """
    gain_db, q, hz = 3.999843853973347, 0.7071752369554196, 1681.974450955533
    k, top = tan(pi * hz / rate_hz), 10 ** (gain_db / 20)
    middle = top**0.4996667741545416
    shelf = [top + middle * k / q + k * k, 2 * (k * k - top), top - middle * k / q + k * k]
    shelf_pole = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    q, hz = 0.5003270373238773, 38.13547087602444
    k = tan(pi * hz / rate_hz)
    pass_pole = [1 + k / q + k * k, 2 * (k * k - 1), 1 - k / q + k * k]
    # the standard leaves the high-pass's numerator as it is when it divides by the first pole
    return [(shelf, shelf_pole), ([pass_pole[0], -2 * pass_pole[0], pass_pole[0]], pass_pole)]
