"""Windowed-sinc resampling, as torchaudio does by default, so that a bank hears what a scorer's own resampling would.

Shape letters: T samples in, U output samples for every D input samples, K taps.
"""

from __future__ import annotations

from functools import cache
from math import ceil, gcd

import numpy as np

ZERO_CROSSINGS = 6  # torchaudio.functional.resample's lowpass_filter_width and rolloff
ROLLOFF = 0.99


def resample(samples: np.ndarray, rate_hz: int, new_rate_hz: int) -> np.ndarray:
    """A signal [T] at another rate, float32 [ceil(T * new / old)], zeros taken before its start and after its end.

    The filter is torchaudio.functional.resample's default: a sinc cut by a Hann window at its sixth zero on each side,
    its cut-off 1 % below the lower Nyquist frequency. Same input, same bits: it is summed tap by tap.
    """
    samples = np.asarray(samples, np.float32)
    if rate_hz == new_rate_hz:
        return samples.copy()
    taps, lead = _filters(rate_hz, new_rate_hz)
    step = gcd(rate_hz, new_rate_hz)
    up, down = new_rate_hz // step, rate_hz // step
    length = -(-len(samples) * up // down)
    rows = -(-length // up)
    padded = np.zeros((rows + 1) * down + taps.shape[1], np.float32)
    padded[lead : lead + len(samples)] = samples[: len(padded) - lead]
    out = np.zeros((up, rows), np.float32)
    for phase in range(up):
        for tap in np.flatnonzero(taps[phase]):
            out[phase] += taps[phase, tap] * padded[tap : tap + rows * down : down]
    return out.T.reshape(-1)[:length]


@cache
def _filters(rate_hz: int, new_rate_hz: int) -> tuple[np.ndarray, int]:
    """The taps of each output phase, float32 [U, K], and how many input samples they begin before their own."""
    step = gcd(rate_hz, new_rate_hz)
    up, down = new_rate_hz // step, rate_hz // step
    cutoff = min(up, down) * ROLLOFF
    lead = ceil(ZERO_CROSSINGS * down / cutoff)
    at = np.arange(-lead, lead + down) / down - np.arange(up)[:, None] / up
    x = np.clip(at * cutoff, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = np.cos(np.pi * x / (2 * ZERO_CROSSINGS)) ** 2
    taps = np.sinc(x) * window * cutoff / down
    return np.where(np.abs(x) < ZERO_CROSSINGS, taps, 0.0).astype(np.float32), lead
