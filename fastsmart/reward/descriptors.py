"""Audio descriptors by formula: what a sound is like, with no network and nobody's taste but the named paper's.

Frames are those of `fastsmart.reward.spectra`. All rewards here are bounded by
0 and 1, give 0 for silence and NaN for audio that was not rendered.

Shape letters: N clips, T samples, K frames of a clip, B frequency bins, P peaks of a frame.
"""

from __future__ import annotations

import numba
import numpy as np
from scipy import signal

from fastsmart.audio.batch import AudioBatch, DeviceAudio
from fastsmart.audio.loudness import k_weighting
from fastsmart.reward.base import Clips, heard, unrendered
from fastsmart.reward.spectra import CURVE_MAX, PEAK_FLOOR_DB, PEAKS, spectra

LOWEST_HZ, OCTAVES = 125.0, 6.0  # brightness 0 at 125 Hz, 1 at 8 kHz
RANGE_LU = 20.0  # loudness range that counts as all there is: the relative gate of EBU Tech 3342


class Consonance:
    """Sounds that do not beat against each other: exp(-roughness), see `clip_roughness`.

    Range 0..1: 1 for a pure tone. With FluidR3Mono at 16 kHz: single notes from C3 to C6 0.93 to 0.98, ten seconds of
    POP909 0.77 ± 0.04, chromatic clusters 0.3.

    Hacked by playing less: one note at a time, or one loud high note over everything else, is as consonant as can be,
    and a policy trained on consonance alone finds that in 40 steps. It needs `presence` and `variety` beside it.
    """

    name = "consonance"
    needs_audio = True

    def __call__(self, clips: Clips) -> np.ndarray:
        audio = heard(clips, self.name)
        if isinstance(audio, DeviceAudio) and audio.on_device.device.type != "cpu":
            from fastsmart.reward.roughness_on_device import clip_roughness_on_device  # brings torch

            return _score(np.exp(-clip_roughness_on_device(audio)), clips)
        return _score(np.exp(-clip_roughness(audio)), clips)


class Brightness:
    """A bright sound: the spectral centroid in octaves above 125 Hz, as a share of the six octaves up to 8 kHz.

    Range 0..1; POP909 on FluidR3Mono 0.40 ± 0.02. Hacked by playing high and hard; `typicality` sees the
    pitch and the velocity of that.
    """

    name = "brightness"
    needs_audio = True

    def __call__(self, clips: Clips) -> np.ndarray:
        return _score(_brightness(clips, self.name), clips)


class Warmth:
    """A dark sound: 1 - brightness, and yet 0 for silence.

    Range 0..1; POP909 on FluidR3Mono 0.60 ± 0.02. Hacked by playing low and softly; `typicality` sees the pitch and the
    velocity of that.
    """

    name = "warmth"
    needs_audio = True

    def __call__(self, clips: Clips) -> np.ndarray:
        return _score(1.0 - _brightness(clips, self.name), clips)


class LoudnessRange:
    """Dynamics over the phrase: the loudness range of EBU Tech 3342 over 20 LU, at most 1.

    Range 0..1; POP909 on FluidR3Mono 0.12 ± 0.12. A clip shorter than 3 s has no range, so 0. Hacked by one chord left
    to die away, which reaches 1; `presence` falls then.
    """

    name = "loudness_range"
    needs_audio = True

    def __call__(self, clips: Clips) -> np.ndarray:
        return _score(loudness_range_lu(heard(clips, self.name)) / RANGE_LU, clips)


def clip_roughness(audio: AudioBatch) -> np.ndarray:
    """Sensory roughness of every clip, float64 [N]: 0 for a pure tone, unbounded above; NaN for silence.

    The roughness of the 20 strongest spectral peaks of every frame (`roughness`) over the sum of their squared
    amplitudes; frames weigh by that sum, so that quiet tails count as little as they are heard.
    """
    result = np.full(len(audio), np.nan)
    for i, magnitude, hz_per_bin in spectra(audio):
        rough, power = _peak_roughness(magnitude, hz_per_bin)
        result[i] = rough.sum() / power.sum() if power.sum() > 0 else 0.0
    return result


@numba.njit(cache=True, nogil=True)
def roughness(frequency_hz: np.ndarray, amplitude: np.ndarray) -> float:
    """Roughness of simultaneous partials: the sum over pairs of a_i a_j d(f_i, f_j), d between 0 and 1.

    d is the curve that Sethares fitted to the listening tests of Plomp and Levelt (Sethares 1993, "Local consonance
    and the relationship between timbre and scale", J. Acoust. Soc. Am. 94(3); constants of his published program),
    here scaled to a maximum of 1.

    frequency_hz, amplitude : float [P]
    """
    total = 0.0
    for i in range(len(frequency_hz)):
        for j in range(i):
            low, high = min(frequency_hz[i], frequency_hz[j]), max(frequency_hz[i], frequency_hz[j])
            distance = 0.24 / (0.0207 * low + 18.96) * (high - low)
            curve = np.exp(-3.51 * distance) - np.exp(-5.75 * distance)
            total += amplitude[i] * amplitude[j] * curve / CURVE_MAX
    return total


def clip_centroid_hz(audio: AudioBatch) -> np.ndarray:
    """Spectral centroid of every clip in Hz, float64 [N]; NaN for silence.

    The centroid of a frame is the mean frequency of its power spectrum (Peeters 2004, "A large set of audio features
    for sound description", IRCAM, 6.1.1; power, because by magnitude two thousand bins of a soundfont's noise outweigh
    the notes); frames are averaged in octaves, by energy.
    """
    result = np.full(len(audio), np.nan)
    for i, magnitude, hz_per_bin in spectra(audio):
        power = magnitude**2
        total = power.sum(axis=1)
        centroid_hz = power @ np.arange(power.shape[1], dtype=np.float32) * hz_per_bin / total
        result[i] = np.exp2(np.average(np.log2(centroid_hz), weights=total))
    return result


def loudness_range_lu(audio: AudioBatch) -> np.ndarray:
    """Loudness range of every clip in LU, float64 [N]: the spread between its 10th and 95th percentile of loudness.

    EBU Tech 3342 (2016): short-term loudness every 0.1 s, without what is under -70 LUFS, and then without what is more
    than 20 LU under the mean power of the rest. 0 for silence and for clips shorter than 3 s.
    """
    result = np.zeros(len(audio))
    for i in range(len(audio)):
        power = 10 ** (short_term_loudness(audio.clip(i), audio.sample_rate) / 10)
        power = power[power >= 10**-7.0]
        if len(power):
            power = power[power >= power.mean() / 100]
            low, high = np.percentile(10 * np.log10(power), [10, 95])
            result[i] = high - low
    return result


def short_term_loudness(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Loudness of the 3 s from every 0.1 s of a mono signal on, LUFS, float64 [K]; -inf for silence.

    ITU-R BS.1770-5: mean square of the K-weighted signal. No number when the signal is shorter than 3 s.
    """
    window, hop = 3 * sample_rate, round(0.1 * sample_rate)
    if len(samples) < window:
        return np.empty(0)
    sections = np.array([np.divide([*b, *a], a[0]) for b, a in k_weighting(sample_rate)])
    weighted = signal.sosfilt(sections, samples.astype(np.float64))
    energy = np.concatenate([[0.0], np.cumsum(weighted**2)])
    power = (energy[window:] - energy[:-window])[::hop] / window
    with np.errstate(divide="ignore"):
        return -0.691 + 10 * np.log10(np.maximum(power, 0.0))


def _brightness(clips: Clips, name: str) -> np.ndarray:
    return np.clip(np.log2(clip_centroid_hz(heard(clips, name)) / LOWEST_HZ) / OCTAVES, 0.0, 1.0)


def _score(values: np.ndarray, clips: Clips) -> np.ndarray:
    """float32 [N], at most 1; 0 for silence (NaN in `values`), NaN for clips that were not rendered."""
    score = np.minimum(np.nan_to_num(values, nan=0.0), 1.0).astype(np.float32)
    score[unrendered(heard(clips, ""))] = np.nan
    return score


@numba.njit(cache=True, nogil=True)
def _peak_roughness(magnitude: np.ndarray, hz_per_bin: float) -> tuple[np.ndarray, np.ndarray]:
    """Roughness and sum of squared amplitudes of the strongest peaks of every frame; magnitude float32 [K, B]."""
    rough, power = np.zeros(len(magnitude)), np.zeros(len(magnitude))
    frequency_hz, amplitude = np.empty(PEAKS), np.empty(PEAKS)
    for k in range(len(magnitude)):
        frame = magnitude[k]
        floor = max(frame.max() * 10 ** (-PEAK_FLOOR_DB / 20), 1e-9)
        peaks = 0
        for b in range(1, len(frame) - 1):
            if frame[b] <= floor or frame[b] < frame[b - 1] or frame[b] <= frame[b + 1]:
                continue
            # the top of the parabola through three log magnitudes, all of them float64 by the small number: it is at
            # most half a bin away, where one rounded otherwise than its neighbours throws that of a plateau far off
            left, mid, right = np.log(frame[b - 1] + 1e-12), np.log(frame[b] + 1e-12), np.log(frame[b + 1] + 1e-12)
            offset = 0.5 * (left - right) / (left - 2 * mid + right)
            height = np.exp(mid - 0.25 * (left - right) * offset)
            slot = peaks
            if peaks == PEAKS:
                slot = int(np.argmin(amplitude))
                if amplitude[slot] >= height:
                    continue
            else:
                peaks += 1
            frequency_hz[slot], amplitude[slot] = (b + offset) * hz_per_bin, height
        rough[k] = roughness(frequency_hz[:peaks], amplitude[:peaks])
        power[k] = (amplitude[:peaks] ** 2).sum()
    return rough, power
