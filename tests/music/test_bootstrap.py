"""Bootstrap draws against SciPy and against what they claim: that intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastsmart.music.bootstrap import jackknife_draws, mean_draws, pair_draws, resample_weights


def test_intervals_of_a_mean_are_scipys():
    values = np.random.default_rng(0).exponential(size=200)
    ours = mean_draws(values, resample_weights(200, 1, 4000)).estimate()
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.value == pytest.approx(values.mean())
    assert abs(ours.low - theirs.confidence_interval.low) < 0.06 * width
    assert abs(ours.high - theirs.confidence_interval.high) < 0.06 * width


def test_the_interval_of_a_paired_difference_is_scipys():
    random = np.random.default_rng(0)
    before = random.normal(size=150)
    after = before + 0.1 + 0.2 * random.normal(size=150)
    weights = resample_weights(150, 1, 4000)
    ours = mean_draws(after, weights).minus(mean_draws(before, weights)).estimate()
    interval = stats.bootstrap(
        (after - before,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert abs(ours.low - interval.low) < 0.06 * (interval.high - interval.low)
    assert abs(ours.high - interval.high) < 0.06 * (interval.high - interval.low)


def test_a_mean_over_pairs_never_pairs_an_output_with_itself():
    distance = 1.0 - np.eye(10)
    draws = pair_draws(distance, ~np.eye(10, dtype=bool), resample_weights(10, 0, 200))
    assert draws.value == 1
    # an output drawn twice stands beside its twin, at distance 0, but is not compared with itself
    weights = resample_weights(10, 0, 200)[1:]
    twins = (weights * (weights - 1)).sum(axis=1)
    assert (draws.draws <= 1).all()
    np.testing.assert_allclose(draws.draws, 1.0, err_msg=str(twins.max()))


def test_unknown_values_are_left_out():
    values = np.array([1.0, np.nan, 3.0])
    assert mean_draws(values, resample_weights(3, 0, 10)).value == 2
    assert np.isnan(mean_draws(np.full(3, np.nan), resample_weights(3, 0, 10)).estimate().value)


def test_the_intervals_cover_as_often_as_they_say():
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        values = random.normal(size=60)
        e = mean_draws(values, resample_weights(60, trial, 400)).estimate()
        covered += e.low <= 0 <= e.high
    assert 0.9 <= covered / 200 <= 0.98


def left_out(values: np.ndarray) -> np.ndarray:
    """The mean with each of twenty groups left out."""
    groups = values.reshape(20, -1)
    return np.array([np.delete(groups, g, axis=0).mean() for g in range(20)])


def test_the_jackknife_error_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    draws = jackknife_draws(values.mean(), left_out(values), 0, 20000)
    assert draws.draws.std() == pytest.approx(values.reshape(20, 20).mean(axis=1).std() / np.sqrt(20), rel=0.02)
    assert draws.draws.mean() == pytest.approx(values.mean(), abs=1e-3)


def test_jackknife_differences_are_paired():
    random = np.random.default_rng(1)
    before = random.normal(size=400)
    for after in (before + 0.1 * random.normal(size=400), random.normal(size=400)):  # alike, and nothing in common
        apart = [jackknife_draws(v.mean(), left_out(v), 0, 20000) for v in (before, after)]
        difference = apart[1].minus(apart[0])
        error = (after - before).reshape(20, 20).mean(axis=1).std() / np.sqrt(20)
        assert difference.draws.std() == pytest.approx(error, rel=0.02)
