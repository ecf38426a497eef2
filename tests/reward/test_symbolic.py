"""Rewards read from notes: bounded, worst when nothing is played, and not to be had by playing less."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.reward import REWARDS, Clips, Reward, load_reward
from fastsmart.reward.typicality import TypicalityStats, fit_typicality

BOUNDED = [name for name, (module, _) in REWARDS.items() if module == "symbolic"]


@pytest.fixture(scope="module")
def stats(make_pieces: Callable[..., NoteBatch]) -> TypicalityStats:
    return fit_typicality(make_pieces(20, seed=0), "synthetic")


@pytest.fixture(scope="module")
def load(stats: TypicalityStats) -> Callable[[str], Reward]:
    return lambda name: load_reward(name, **({"statistics": stats} if name in ("presence", "typicality") else {}))


@pytest.mark.parametrize("name", [*BOUNDED, "typicality"])
def test_an_empty_clip_is_never_better_than_another(
    name: str, load: Callable, make_notes: Callable, make_pieces: Callable
) -> None:
    rng = np.random.default_rng(0)
    noise = [[tuple(map(int, rng.integers((0, 0, 0, 1), (400, 60, 128, 128)))) for _ in range(m)] for m in (1, 2, 60)]
    odd = make_notes([], *noise, [(0, 0, 60, 80)], [(0, 1, 0, 1)], [(k, 1, 60, 80) for k in range(300)], [])
    clips = NoteBatch.concat([odd, cut_windows(make_pieces(1, seed=3))])
    values = load(name)(Clips(clips))
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert values[0] == values[7] == values.min()
    assert values[-1] > values[0]
    assert not load(name).needs_audio
    if name in BOUNDED:
        assert values[0] == 0
        assert values.max() <= 1


def test_presence_falls_in_proportion_to_the_notes_taken_away(
    load: Callable, stats: TypicalityStats, make_notes: Callable
) -> None:
    steady = [(k * 4, 4, 60 + k % 12, 80) for k in range(60)]  # ten seconds at 120 a minute, without a gap
    thin = [(t, 8, p, v) for t, _, p, v in steady[::2]]
    full, stopped, sparse, doubled = load("presence")(Clips(make_notes(steady, steady[:30], thin, thin + thin)))
    assert full == pytest.approx(min(60 / stats.median_notes, 1.0))
    assert stopped == pytest.approx(30 / stats.median_notes * 5.0 / stats.median_sounding_s, rel=1e-5)
    assert sparse == pytest.approx(30 / stats.median_notes, rel=1e-5)
    assert doubled == sparse


def test_variety_hears_loops(load: Callable, make_notes: Callable) -> None:
    rng = np.random.default_rng(0)
    scale = [60, 62, 64, 65, 67, 69, 71]
    phrase = [(k * 6, 6, int(rng.choice(scale)), 80) for k in range(50)]
    loop = [(k * 6, 6, scale[k % 7], 80) for k in range(50)]
    pedal = [(k * 6, 6, 60, 80) for k in range(50)]
    values = load("variety")(Clips(make_notes(phrase, phrase[:6], loop, pedal, phrase[:3])))
    assert np.all(np.diff(values[[0, 2, 3]]) < -0.2), values
    assert values[1] < 0.5  # three figures are not much variety, however new they are
    assert values[3] == values[4] == 0


def test_pitch_range_of_the_whole_keyboard_is_one(load: Callable, make_notes: Callable) -> None:
    clips = make_notes([(0, 12, 21, 80), (0, 12, 108, 80)], [(0, 12, 0, 80), (0, 12, 127, 80)], [(0, 12, 60, 80)])
    np.testing.assert_array_equal(load("pitch_range")(Clips(clips)), [1, 1, 0])


def test_notes_moved_off_the_key_cost_scale_consistency(load: Callable, make_pieces: Callable) -> None:
    clips = cut_windows(make_pieces(2, seed=5))
    rng = np.random.default_rng(0)
    off_key = replace(clips, pitch=(clips.pitch + rng.integers(0, 2, len(clips.pitch))).astype(np.uint8))
    before, after = (load("scale_consistency")(Clips(c)) for c in (clips, off_key))
    assert before.min() == 1.0
    assert after.max() < 0.9
