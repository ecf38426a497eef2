"""Loudness agrees with the standard's own tables and with another implementation."""

import numpy as np
import pyloudnorm
import pytest
from scipy import signal

from fastsmart.audio.loudness import k_weighting, loudness_lufs, to_target


def test_the_filters_are_the_standards_at_48_khz() -> None:
    (shelf, shelf_pole), (_, pass_pole) = k_weighting(48000)
    np.testing.assert_allclose(
        np.array(shelf) / shelf_pole[0], [1.53512485958697, -2.69169618940638, 1.19839281085285], atol=1e-12
    )
    np.testing.assert_allclose(
        np.array(shelf_pole) / shelf_pole[0], [1, -1.69065929318241, 0.73248077421585], atol=1e-12
    )
    np.testing.assert_allclose(np.array(pass_pole) / pass_pole[0], [1, -1.99004745483398, 0.99007225036621], atol=1e-12)


def test_the_filters_at_16_khz_hear_as_those_at_48_khz() -> None:
    at_hz = np.array([50, 100, 300, 997, 2000, 4000])
    low, high = (
        np.prod([np.abs(signal.freqz(b, a, at_hz, fs=rate)[1]) for b, a in k_weighting(rate)], axis=0)
        for rate in (16_000, 48_000)
    )
    np.testing.assert_allclose(20 * np.log10(low), 20 * np.log10(high), atol=0.15)


@pytest.mark.parametrize("rate_hz", [16000, 48000])
@pytest.mark.parametrize("shape", [(48000,), (48000, 2)])
def test_it_agrees_with_pyloudnorm(rate_hz: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    level = np.repeat([1.0, 0.01, 0.3, 0.0], 12000).reshape(-1, *[1] * (len(shape) - 1))
    clip = (0.1 * level * rng.standard_normal(shape)).astype(np.float32)
    theirs = pyloudnorm.Meter(rate_hz, filter_class="DeMan").integrated_loudness(clip.astype(np.float64))
    assert loudness_lufs(clip, rate_hz) == pytest.approx(theirs, abs=0.01)
    to_target(clip, rate_hz)
    assert loudness_lufs(clip, rate_hz) == pytest.approx(-23.0, abs=1e-3)


def test_silence_and_short_clips() -> None:
    silence = np.zeros(16000, np.float32)
    to_target(silence, 16000)
    assert not silence.any()
    assert np.isfinite(loudness_lufs(np.full(100, 0.5, np.float32), 16000))
