"""Bootstrap draws against SciPy and against what they claim: that intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastsmart.music.bootstrap import (
    basis,
    effect_draws,
    jackknife_draws,
    kept_by_jackknife,
    mean_draws,
    pair_draws,
    resample_weights,
)


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


# Several outputs of one opening are alike


def alike(random: np.random.Generator, openings: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Openings and values of outputs, half of whose variance is that of the openings (intraclass correlation 0.5)."""
    opening = np.repeat(np.arange(openings), each)
    return opening, random.normal(size=openings)[opening] + random.normal(size=len(opening))


def test_intervals_cover_where_outputs_of_an_opening_are_alike():
    random = np.random.default_rng(4)
    covered = np.zeros((600, 2), bool)  # by openings, by outputs
    for trial in range(len(covered)):
        opening, values = alike(random, 60, 4)
        if trial % 50 == 0:  # the draws do not know the values
            drawn = [resample_weights(unit, trial, 1000) for unit in (opening, len(values))]
        for column, weights in enumerate(drawn):
            e = mean_draws(values, weights).estimate()
            covered[trial, column] = e.low <= 0 <= e.high
    by_openings, by_outputs = covered.mean(axis=0)
    assert 0.92 <= by_openings <= 0.975
    assert by_outputs < 0.85  # what would be claimed if outputs were drawn


def test_the_error_of_a_mean_is_statsmodels_cluster_robust_one():
    api = pytest.importorskip("statsmodels.api")
    random = np.random.default_rng(5)
    opening, values = alike(random, 80, 6)
    some = random.random(len(values)) < 0.6  # openings with more and fewer outputs
    opening, values = opening[some], values[some]
    robust = api.OLS(values, np.ones_like(values)).fit(cov_type="cluster", cov_kwds={"groups": opening}).bse[0]
    draws = mean_draws(values, resample_weights(opening, 1, 4000)).draws
    assert draws.std() == pytest.approx(robust, rel=0.03)


def test_the_outputs_of_an_opening_are_drawn_together():
    opening = np.array([7, 3, 7, 9, 3, 7])
    weights = resample_weights(opening, 0, 300)
    assert (weights[0] == 1).all()
    for one in (3, 7, 9):
        columns = weights[:, opening == one]
        assert (columns == columns[:, :1]).all()
    assert {int(row[[0, 1, 3]].sum()) for row in weights[1:]} == {2}  # two of three openings, with repetition


def test_a_single_opening_leaves_its_outputs_to_be_drawn():
    np.testing.assert_array_equal(resample_weights(np.zeros(30, int), 0, 50), resample_weights(30, 0, 50))
    pairs = ~np.eye(30, dtype=bool)
    distance = np.abs(np.subtract.outer(*2 * [np.random.default_rng(0).normal(size=30)]))
    weights = resample_weights(30, 0, 50)
    np.testing.assert_array_equal(
        pair_draws(distance, pairs, weights, np.zeros(30, int)).draws, pair_draws(distance, pairs, weights).draws
    )


def test_distances_within_openings_are_those_of_copied_data():
    random = np.random.default_rng(6)
    opening, values = alike(random, 9, 3)
    distance = np.abs(values[:, None] - values[None, :])
    same = opening[:, None] == opening[None, :]
    weights = resample_weights(opening, 2, 40)
    within = pair_draws(distance, same & ~np.eye(27, dtype=bool), weights, opening)
    across = pair_draws(distance, ~same, weights, opening)
    for b, times in enumerate(weights[1:]):
        rows = np.concatenate([np.flatnonzero(opening == g) for g in range(9) for _ in range(int(times[3 * g]))])
        copy = np.repeat(np.arange(len(rows) // 3), 3)  # the second copy of an opening is another opening
        copies = copy[:, None] == copy[None, :]
        drawn = distance[np.ix_(rows, rows)]
        assert within.draws[b] == pytest.approx(drawn[copies & ~np.eye(len(rows), dtype=bool)].mean(), rel=1e-5)
        apart = ~same[np.ix_(rows, rows)]
        assert across.draws[b] == (
            pytest.approx(drawn[apart].mean(), rel=1e-5) if apart.any() else pytest.approx(np.nan, nan_ok=True)
        )


def test_the_jackknife_leaves_out_openings():
    opening = np.repeat(np.arange(30), 4)
    kept = kept_by_jackknife(opening, 0)
    assert len(kept) == 20
    gone = [set(range(120)) - set(rows.tolist()) for rows in kept]
    assert sorted(i for rows in gone for i in rows) == list(range(120))
    assert all({opening[i] for i in rows}.isdisjoint(opening[k]) for rows, k in zip(gone, kept, strict=True))
    assert [len(rows) for rows in kept_by_jackknife(np.array([0, 0, 0, 1, 1, 2]), 0)] != []
    assert len(kept_by_jackknife(np.zeros(40, int), 0)) == 20  # one opening: its outputs are left out


def test_what_numbers_rest_on_is_said():
    assert basis(1000, 308) == "1000 outputs on 308 held-out openings; 95 % bootstrap intervals over 308 openings"
    assert basis(64, 3).endswith("over 3 openings, so few that the intervals are too narrow")
    assert "on 1 held-out opening; 95 % bootstrap intervals over outputs, as" in basis(64, 1)


def test_an_effect_is_in_standard_deviations_of_before():
    random = np.random.default_rng(7)
    opening, before = alike(random, 50, 4)
    after = before + 0.8 + 0.3 * random.normal(size=len(before))
    weights = resample_weights(opening, 0, 2000)
    draws = effect_draws(before, after, weights)
    assert draws.value == pytest.approx((after.mean() - before.mean()) / before.std(ddof=1))
    rows = [np.repeat(np.arange(len(before)), times.astype(int)) for times in weights[1:200]]
    scaled = np.sqrt(len(before) / (len(before) - 1))
    expected = [(after[r].mean() - before[r].mean()) / (before[r].std() * scaled) for r in rows]
    np.testing.assert_allclose(draws.draws[:199], expected, rtol=1e-6)
    unknown = np.where(np.arange(len(before)) == 3, np.nan, before)
    assert effect_draws(unknown, after, weights).value == pytest.approx(draws.value, abs=0.02)
    assert np.isnan(effect_draws(np.ones(8), np.ones(8), resample_weights(8, 0, 10)).estimate().low)


def test_the_intervals_of_an_effect_cover():
    random, covered = np.random.default_rng(8), 0
    for trial in range(400):
        if trial % 40 == 0:
            weights = resample_weights(64, trial, 1000)
        shared = random.normal(size=64)
        before, after = (np.sqrt(0.5) * (shared + random.normal(size=64)) for _ in range(2))
        e = effect_draws(before, 0.8 + 0.7 * after, weights).estimate()
        covered += e.low <= 0.8 <= e.high
    assert 0.92 <= covered / 400 <= 0.975  # .90 if the standard deviation were taken for known


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
