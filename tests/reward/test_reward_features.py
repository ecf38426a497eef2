"""Features that MusPy does not have, and what must hold for all; MusPy's own are in tests/peers/test_muspy.py."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fastsmart.music.features import FEATURES, features
from fastsmart.notes import NoteBatch


def test_features_of_a_clip_worked_out_by_hand(make_notes: Callable[..., NoteBatch]) -> None:
    # at 120 beats a minute a tick of 1/12 beat is 1/24 s; C E together, a gap of half a beat, then G on beat 1.5
    notes = make_notes([(0, 12, 60, 80), (0, 12, 64, 100), (18, 6, 67, 60), (18, 6, 67, 60)])
    expected = {
        "notes": 4,
        "distinct_notes": 3,
        "figures": 1,
        "sounding_s": 0.75,
        "notes_per_beat": 2.0,
        "notes_per_second": 4.0,
        "mean_pitch": 64.5,
        "pitch_spread": np.std([60, 64, 67, 67]),
        "mean_velocity": 75.0,
        "velocity_range": 40.0,
        "velocity_spread": np.std([80, 100, 60, 60]),
        "mean_duration_beats": 0.75,
        "duration_spread_beats": 0.25,
        "mean_duration_s": 0.375,
        "repetition": 0.0,
    }
    actual = features(notes)
    assert {name: actual[name][0] for name in expected} == pytest.approx(expected)
    assert tuple(actual) == FEATURES


def test_repetition_counts_figures_heard_before(make_notes: Callable[..., NoteBatch]) -> None:
    repeated = [(k * 6, 6, 60, 80) for k in range(23)]  # 20 figures, one of them new
    loop = [(k * 6, 6, (60, 64, 67, 64)[k % 4], 80) for k in range(23)]  # four different starting points
    transposed = [(k * 6, 6, 40 + k, 80) for k in range(23)]  # the same step up all the time
    actual = features(make_notes(repeated, loop, transposed))
    np.testing.assert_array_equal(actual["figures"], [1, 4, 1])
    np.testing.assert_allclose(actual["repetition"], [0.95, 0.8, 0.95])


def test_features_do_not_depend_on_the_order_of_notes_or_the_resolution(make_pieces: Callable[..., NoteBatch]) -> None:
    notes = make_pieces(3, seed=0)
    expected = features(notes)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(np.arange(notes.offsets[i], notes.offsets[i + 1])) for i in range(3)])
    per_note = ("onset_s", "duration_s", "pitch", "velocity", "onset_tick", "duration_tick")
    shuffled = replace(notes, **{name: getattr(notes, name)[order] for name in per_note})
    finer = replace(
        notes, onset_tick=notes.onset_tick * 40, duration_tick=notes.duration_tick * 40, ticks_per_beat=12 * 40
    )
    for name, values in expected.items():
        np.testing.assert_allclose(features(shuffled)[name], values, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(features(finer)[name], values, rtol=1e-12, err_msg=name)


def test_features_of_a_clip_are_the_same_alone_and_in_a_batch(make_pieces: Callable[..., NoteBatch]) -> None:
    notes = make_pieces(4, seed=1)
    together = features(notes)
    for i in range(4):
        for name, values in features(notes.select([i])).items():
            assert values[0] == together[name][i], name


def test_figures_do_not_hear_a_humans_timing(make_pieces: Callable[..., NoteBatch]) -> None:
    notes = make_pieces(2, seed=2)
    rng = np.random.default_rng(0)
    loose = replace(
        notes,
        onset_tick=np.maximum(notes.onset_tick * 40 + rng.integers(-15, 16, len(notes.pitch)), 0).astype(np.int32),
        duration_tick=notes.duration_tick * 40,
        ticks_per_beat=12 * 40,
    )
    for name in ("figures", "distinct_notes", "repetition"):
        np.testing.assert_array_equal(features(loose)[name], features(notes)[name])
