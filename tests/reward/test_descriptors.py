"""Audio descriptors against what their papers and standards print, and against signals whose answer is known."""

import numpy as np
import pytest
import torch

from fastsmart.audio.batch import AudioBatch, DeviceAudio
from fastsmart.reward import REWARDS, Clips, load_reward
from fastsmart.reward.descriptors import (
    clip_centroid_hz,
    clip_roughness,
    loudness_range_lu,
    roughness,
    short_term_loudness,
)

RATE = 16_000
AUDIO_REWARDS = [name for name, (module, _) in REWARDS.items() if module == "descriptors"]


def batch(*clips: np.ndarray, rate: int = RATE) -> AudioBatch:
    lengths = np.array([len(c) for c in clips], np.int64)
    samples = np.zeros((len(clips), max(lengths)), np.float32)
    for row, clip in zip(samples, clips, strict=True):
        row[: len(clip)] = clip
    return AudioBatch(samples, lengths, rate)


def tone(partials_hz: np.ndarray, amplitudes: np.ndarray, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    phase = np.linspace(0.3, 5.0, len(partials_hz))[:, None]
    return (np.asarray(amplitudes)[:, None] * np.sin(2 * np.pi * np.asarray(partials_hz)[:, None] * t + phase)).sum(0)


def dyad(ratio: float, base_hz: float = 500.0) -> tuple[np.ndarray, np.ndarray]:
    """Two tones of six partials whose amplitudes fall by 0.88, the timbre of Sethares 1993."""
    k = np.arange(1, 7)
    return np.concatenate([base_hz * k, ratio * base_hz * k]), np.tile(0.88 ** (k - 1), 2)


def test_dissonance_curve_has_its_minima_at_the_just_intervals_as_sethares_prints_it() -> None:
    ratios = np.arange(1.0, 2.05, 0.001)
    curve = np.array([roughness(*dyad(ratio)) for ratio in ratios])
    minima = ratios[1:-1][(curve[1:-1] < curve[:-2]) & (curve[1:-1] <= curve[2:])]
    for interval in (6 / 5, 5 / 4, 4 / 3, 3 / 2, 5 / 3, 2):
        assert np.abs(minima - interval).min() < 0.003, interval
    assert 1.0 < ratios[curve.argmax()] < 1.06  # roughest within a semitone


@pytest.mark.parametrize("low_hz", [100.0, 440.0, 2000.0])
def test_two_sines_are_roughest_at_the_critical_distance_of_plomp_and_levelt(low_hz: float) -> None:
    apart_hz = np.arange(1.0, 400.0)
    curve = [roughness(np.array([low_hz, low_hz + d]), np.ones(2)) for d in apart_hz]
    # Sethares: the maximum lies at s = 0.24 / (0.021 f + 19) times the distance = 0.22, and it is 1 here
    assert apart_hz[np.argmax(curve)] == pytest.approx(0.2203 * (0.0207 * low_hz + 18.96) / 0.24, abs=1.0)
    assert max(curve) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("ratio", [2 ** (n / 12) for n in (1, 2, 4, 6)])
def test_roughness_heard_is_roughness_of_the_partials_played(ratio: float) -> None:
    frequency_hz, amplitude = dyad(ratio)
    heard = clip_roughness(batch(0.05 * tone(frequency_hz, amplitude)))[0]
    assert heard == pytest.approx(roughness(frequency_hz, amplitude) / (amplitude**2).sum(), rel=0.1, abs=0.01)


def test_consonance_orders_intervals_as_ears_do() -> None:
    clips = [0.05 * tone(*dyad(2 ** (semitones / 12), 261.63)) for semitones in (12, 7, 5, 4, 6, 1)]
    clips.insert(0, tone(np.array([440.0]), np.array([0.5])))
    audio = batch(*clips)
    values = load_reward("consonance")(_clips(audio))
    assert values[0] == pytest.approx(1.0, abs=1e-3)
    assert np.all(np.diff(values) < 0), values
    louder = AudioBatch(audio.samples * 3, audio.lengths, audio.sample_rate)
    np.testing.assert_allclose(load_reward("consonance")(_clips(louder)), values, atol=1e-4)


@pytest.mark.parametrize("hz", [125.0, 440.0, 1000.0, 4000.0])
def test_centroid_of_a_sine_is_its_frequency(hz: float) -> None:
    assert clip_centroid_hz(batch(tone(np.array([hz]), np.array([0.5]))))[0] == pytest.approx(hz, rel=0.01)


def test_centroid_of_two_partials_is_their_mean_by_power() -> None:
    audio = batch(tone(np.array([500.0, 2500.0]), np.array([0.4, 0.2])))
    assert clip_centroid_hz(audio)[0] == pytest.approx((500 * 4 + 2500) / 5, rel=0.01)


@pytest.mark.parametrize(("rate", "tolerance"), [(48_000, 0.01), (16_000, 0.1)])
def test_a_full_scale_sine_at_997_hz_is_minus_3_01_lufs(rate: int, tolerance: float) -> None:
    loudness = short_term_loudness(tone(np.array([997.0]), np.array([1.0]), 4.0, rate), rate)
    assert loudness[5:] == pytest.approx(-3.01, abs=tolerance)  # after the filter has settled


@pytest.mark.parametrize(
    ("levels_db", "expected_lu"), [((-20, -30), 10), ((-20, -15), 5), ((-40, -20), 20), ((-50, -35, -20, -35, -50), 15)]
)
def test_loudness_range_passes_the_minimum_requirements_of_ebu_tech_3342(levels_db: tuple, expected_lu: float) -> None:
    sine = tone(np.array([1000.0]), np.array([1.0]), 20.0)
    clip = np.concatenate([sine * 10 ** (level / 20) for level in levels_db])
    assert loudness_range_lu(batch(clip))[0] == pytest.approx(expected_lu, abs=1.0)


@pytest.mark.parametrize("name", AUDIO_REWARDS)
def test_silence_is_worth_nothing_and_unrendered_audio_has_no_worth(name: str) -> None:
    rng = np.random.default_rng(0)
    fading = rng.normal(size=4 * RATE) * np.geomspace(0.3, 0.01, 4 * RATE)
    audio = batch(fading, np.zeros(4 * RATE), np.zeros(0), np.zeros(4 * RATE))
    audio.samples[3] = np.nan
    values = load_reward(name)(_clips(audio))
    assert values.dtype == np.float32
    assert 0 < values[0] <= 1
    np.testing.assert_array_equal(values[1:], [0, 0, np.nan])


@pytest.mark.parametrize("name", AUDIO_REWARDS)
def test_a_clip_scores_the_same_alone_and_in_a_batch(name: str) -> None:
    rng = np.random.default_rng(1)
    clips = [rng.normal(size=n) * rng.uniform(0.01, 0.3) for n in (100, 4096, 50_000, 100_001)]
    together = load_reward(name)(_clips(batch(*clips)))
    alone = [load_reward(name)(_clips(batch(clip)))[0] for clip in clips]
    np.testing.assert_array_equal(together, alone)


def test_brightness_and_warmth_are_two_sides() -> None:
    audio = batch(tone(np.array([300.0]), np.array([0.5])), tone(np.array([3000.0]), np.array([0.5])))
    bright, warm = (load_reward(name)(_clips(audio)) for name in ("brightness", "warmth"))
    assert bright[0] < bright[1]
    np.testing.assert_allclose(bright + warm, 1.0, atol=1e-6)


def _clips(audio: AudioBatch) -> Clips:
    """Audio on its own: these rewards never look at the notes, so any object of that length stands for them."""
    return Clips(notes=range(len(audio)), audio=audio)  # type: ignore[arg-type]


def test_the_top_of_a_plateau_lies_in_it() -> None:
    """Two equal bins and one a rounding below them; then a second partial, far away, so that the plateau's roughness is
    nearly none, whatever its height."""
    from fastsmart.reward.descriptors import _peak_roughness
    from fastsmart.reward.roughness_on_device import _peaks

    height = np.random.default_rng(0).uniform(0.01, 0.5, 5_000).astype(np.float32)
    frames = np.zeros((len(height), 400), np.float32)
    frames[:, 3] = frames[:, 4] = height
    frames[:, 5] = np.nextafter(height, np.float32(0))
    frames[:, 6], frames[:, 200] = height / 4, 0.1
    on_device = [part[0].numpy() for part in _peaks(torch.from_numpy(frames)[None], 7.8)]
    for rough, power in (_peak_roughness(frames, 7.8), on_device):
        np.testing.assert_allclose(power, height**2 + 0.01, rtol=1e-4)
        assert ((rough >= 0) & (rough < 1e-6)).all()


def test_roughness_on_a_device_is_the_cpus() -> None:
    from fastsmart.reward.roughness_on_device import AT_ONCE, clip_roughness_on_device

    rng = np.random.default_rng(0)
    chords = [
        tone(*dyad(ratio, base_hz), seconds=seconds) * 0.1 + 1e-4 * rng.standard_normal(round(seconds * RATE))
        for ratio, base_hz, seconds in zip(
            rng.uniform(1.0, 2.0, AT_ONCE), rng.uniform(80, 600, AT_ONCE), rng.uniform(0.3, 2.5, AT_ONCE), strict=True
        )
    ]
    silence, short, edge = np.zeros(RATE), chords[0][:100], chords[1][: 4096 + 1]
    half_silent = np.concatenate([np.zeros(2 * RATE), chords[2]])
    audio = batch(*chords, silence, np.zeros(0), short, edge, half_silent)
    audio.samples[0] = np.nan  # not rendered
    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = DeviceAudio(torch.from_numpy(audio.samples).to(device), audio.lengths, RATE)
    expected, found = clip_roughness(audio), clip_roughness_on_device(there)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)
    assert len(clip_roughness_on_device(DeviceAudio(torch.zeros(0, RATE), np.zeros(0, np.int64), RATE))) == 0
