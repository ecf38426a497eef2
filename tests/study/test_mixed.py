"""The test of a difference and its power: against published results, closed forms, statsmodels and simulation."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as formulas
from listening_level import LISTENERS, TRUTHS, Case, measure, simulated
from scipy import stats
from statsmodels.stats.power import TTestPower

from fastsmart import UserError
from fastsmart.study.mixed import choice_power, crossed_mean, crossed_power, rating_power, sign_test

# Diameters of 24 plates (rows) x 6 samples of penicillin, in mm: Davies and Goldsmith 1972, section 6.6
PENICILLIN = """
272326232321 272326232321 252125242420 262325232320 252226222320 242225232219 242023212219 262226242421
242124222220 242124232219 262326242421 252226242420 262426242522 262326232320 262325242422 252225232320
252124232320 252224232319 242123212119 262326242421 252124222218 252225222220 242124222419 242124222118
"""
# standard errors of a share of 2,000 tests near .05 are .005, of 300 are .013; of a power, at most .011
MANY, FEW = 2000, 300


def penicillin() -> np.ndarray:
    return np.array([[int(row[i : i + 2]) for i in range(0, 12, 2)] for row in PENICILLIN.split()], float)


def differences(seed: int, effect: float, listener: float, clips: float, shape=(8, 10), residual=1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (
        effect
        + listener * random.normal(size=(shape[0], 1))
        + clips * random.normal(size=(1, shape[1]))
        + residual * random.normal(size=shape)
    )


def with_gaps(table: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    return np.where(np.random.default_rng(seed).random(table.shape) < share, np.nan, table)


def satterthwaite(table: np.ndarray) -> tuple[float, float]:
    """Error of the mean and its degrees of freedom, from the mean squares of a table without gaps."""
    rows, columns = table.shape
    row, column = table.mean(1), table.mean(0)
    left = table - row[:, None] - column + table.mean()
    squares = np.array(
        [columns * row.var(ddof=1), rows * column.var(ddof=1), (left**2).sum() / (rows - 1) / (columns - 1)]
    )
    signs, freedom = np.array([1, 1, -1]), np.array([rows - 1, columns - 1, (rows - 1) * (columns - 1)])
    total = (signs * squares).sum()
    return np.sqrt(total / table.size), total**2 / (squares**2 / freedom).sum()


def by_statsmodels(table: np.ndarray):
    """The mean with crossed random rows and columns, by statsmodels' REML: error, and the three standard deviations."""
    i, j = np.nonzero(np.isfinite(table))
    frame = pd.DataFrame({"d": table[i, j], "i": i, "j": j, "everyone": 1})
    model = formulas.mixedlm(
        "d ~ 1", frame, groups="everyone", re_formula="0", vc_formula={"i": "0 + C(i)", "j": "0 + C(j)"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0 is a result like any other
        fit = model.fit(
            reml=True, method="powell"
        )  # lbfgs, the default, stops short of the maximum near a variance of 0
    return float(fit.fe_params.iloc[0]), float(fit.bse_fe.iloc[0]), np.sqrt([*fit.vcomp, fit.scale])


def test_published_results_of_lme4_on_penicillin():
    """lmer(diameter ~ 1 + (1 | plate) + (1 | sample)), in Bates, "lme4: Mixed-effects modeling with R", 2010, section
    2.1: mean 22.9722, error 0.8086, standard deviations 0.84671, 1.93156 and residual 0.54992."""
    found = crossed_mean(penicillin())
    assert found.estimate == pytest.approx(22.9722, abs=5e-5)
    assert found.error == pytest.approx(0.8086, abs=5e-5)
    assert found.spread == pytest.approx({"listener": 0.84671, "clips": 1.93156, "residual": 0.54992}, abs=1e-5)
    error, freedom = satterthwaite(penicillin())
    assert found.error == pytest.approx(error)
    assert found.high - found.estimate == pytest.approx(stats.t.ppf(0.975, freedom) * error, rel=0.02)


@pytest.mark.parametrize(("listener", "clips"), [(0.6, 0.5), (0.0, 0.5), (0.6, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("seed", [1, 2])
def test_statsmodels_finds_the_same_error_and_variances(listener: float, clips: float, seed: int):
    table = differences(seed, 0.3, listener, clips)
    found, (estimate, error, spread) = crossed_mean(table), by_statsmodels(table)
    assert found.estimate == pytest.approx(estimate, abs=1e-6)
    assert found.error == pytest.approx(error, rel=2e-3)
    assert list(found.spread.values()) == pytest.approx(spread, abs=0.02)  # sqrt(1e-4) of a variance at 0


@pytest.mark.parametrize("seed", range(4))
def test_statsmodels_finds_nearly_the_same_where_answers_are_missing(seed: int):
    """Henderson's method III and REML are two estimators: equal on average, not on every table."""
    table = with_gaps(differences(seed, 0.3, 0.6, 0.5, (20, 15)), 0.36, seed)
    found, (estimate, error, spread) = crossed_mean(table), by_statsmodels(table)
    assert found.pairs == np.isfinite(table).sum()
    assert found.estimate == pytest.approx(estimate, abs=0.05 * error)
    assert found.error == pytest.approx(error, rel=0.1)
    assert list(found.spread.values()) == pytest.approx(spread, abs=0.1)


def test_the_model_of_ratings_with_slopes_and_clips_is_that_of_their_differences():
    """statsmodels on single ratings: listeners, prompts, both together, by-listener slopes and clips all random."""
    random, shape = np.random.default_rng(5), (8, 6, 2)
    ratings = random.normal(size=shape) + 0.8 * random.normal(size=(8, 1, 2)) + 0.8 * random.normal(size=(1, 6, 2))
    ratings += random.normal(size=(8, 1, 1)) + random.normal(size=(1, 6, 1)) + 0.5 * np.arange(2)
    i, j, k = (index.ravel() for index in np.indices(shape))
    frame = pd.DataFrame({"y": ratings.ravel(), "i": i, "j": j, "k": k, "everyone": 1})
    parts = {name: f"0 + {':'.join(f'C({c})' for c in name)}" for name in ("i", "j", "ij", "ik", "jk")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = formulas.mixedlm("y ~ k", frame, groups="everyone", re_formula="0", vc_formula=parts).fit(method="powell")
    found = crossed_mean(ratings[..., 1] - ratings[..., 0])
    assert found.estimate == pytest.approx(fit.fe_params["k"], abs=1e-6)
    assert found.error == pytest.approx(fit.bse_fe["k"], rel=5e-3)


@pytest.mark.parametrize("seed", range(3))
def test_p_and_interval_are_satterthwaites_where_no_variance_is_near_nought(seed: int):
    table = differences(seed, 0.8, 1.0, 1.0, (12, 12))
    found, (error, freedom) = crossed_mean(table), satterthwaite(table)
    assert found.p == pytest.approx(2 * stats.t.sf(found.estimate / error, freedom), rel=0.15, abs=1e-4)
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, freedom) * error, rel=0.03)


def test_one_listener_more_or_less_sure_of_taste_is_a_test_over_listeners():
    """Where only listeners differ and each is steady, p is that of Student's t over listeners' means."""
    table = differences(0, 0.5, 1.0, 0.0, (12, 200), residual=0.1)
    assert crossed_mean(table).p == pytest.approx(stats.ttest_1samp(table.mean(1), 0).pvalue, rel=0.1)


def test_interval_and_p_agree_and_turn_with_the_sign():
    for seed in range(20):
        table = with_gaps(differences(seed, 0.4, 0.3, 0.3), 0.2, seed)
        found, turned = crossed_mean(table), crossed_mean(-table)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
        assert (turned.estimate, turned.p, turned.low) == pytest.approx((-found.estimate, found.p, -found.high))


def test_listeners_who_judged_nothing_change_nothing():
    table = differences(0, 0.4, 0.3, 0.3)
    padded = np.full((10, 12), np.nan)
    padded[1:9, 1:11] = table
    assert crossed_mean(padded) == crossed_mean(table)


def test_one_who_heard_much_does_not_outvote_those_who_stopped_early():
    """With strong tastes every listener counts alike, however much each has heard."""
    table = np.full((6, 40), np.nan)
    table[0] = 1.0
    table[1:, :4] = -1.0
    table += 0.05 * np.random.default_rng(0).normal(size=table.shape)
    assert crossed_mean(table).estimate == pytest.approx(-4 / 6, abs=0.05)


def test_answers_that_do_not_vary_are_as_good_as_their_signs():
    always = crossed_mean(np.ones((5, 9)))
    assert (always.estimate, always.error, always.p) == pytest.approx((1.0, 0.0, sign_test(5, 0)))


# False positives and power, by simulation


def test_a_test_that_forgets_tastes_or_clips_is_far_too_sure():
    """The simulation can tell: the sign test over all choices finds preferences where only tastes and clips differ."""
    row = measure(Case("ab", "both differ", 20, "all", 0.5), FEW, 0)
    assert row["found_by_sign_test_over_all_choices"] > 0.2
    assert 0.015 < row["found"] < 0.09


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize(("listeners", "answers"), [(8, "80 %"), (20, "all")])
def test_level_in_a_few_hundred_tests(truth: str, listeners: int, answers: str):
    assert 0.012 < measure(Case("rating", truth, listeners, answers, 0.0), FEW, 0)["found"] < 0.09


@pytest.mark.slow
@pytest.mark.parametrize("design", ["rating", "ab"])
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("listeners", LISTENERS)
@pytest.mark.parametrize("answers", ["all", "80 %"])
def test_level_in_two_thousand_tests(design: str, truth: str, listeners: int, answers: str):
    effect = 0.0 if design == "rating" else 0.5
    assert 0.03 < measure(Case(design, truth, listeners, answers, effect), MANY, 0)["found"] < 0.065


@pytest.mark.parametrize(("design", "effect"), [("rating", 0.4), ("ab", 0.65)])
def test_power_in_a_few_hundred_tests(design: str, effect: float):
    row = measure(Case(design, "both differ", 20, "all", effect), FEW, 1)
    assert row["found"] == pytest.approx(row["predicted"], abs=0.03 + 2 * 0.029)
    assert 0.2 < row["predicted"] < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("listeners", LISTENERS)
@pytest.mark.parametrize(("design", "effect"), [("rating", 0.3), ("ab", 0.6)])
def test_power_in_two_thousand_tests(design: str, effect: float, truth: str, listeners: int):
    row = measure(Case(design, truth, listeners, "all", effect), MANY, 0)
    assert row["found"] == pytest.approx(row["predicted"], abs=0.03)


def test_simulated_listeners_have_the_tastes_asked_for():
    tests = [simulated(Case("rating", "tastes differ", 60, "all", 0.3), np.random.default_rng(k)) for k in range(40)]
    assert np.mean(tests) == pytest.approx(0.3, abs=0.05)
    # a taste of sd .4 for each of two policies, and what is left of 15 differences
    assert np.mean([t.mean(1).var(ddof=1) for t in tests]) == pytest.approx(2 * 0.4**2 + 2 * 0.8**2 / 15, rel=0.1)


def test_power_where_only_listeners_differ_is_that_of_students_t():
    for effect, listeners in ((0.5, 10), (0.3, 40), (1.0, 6)):
        theirs = TTestPower().power(effect, listeners, 0.05)
        ours = crossed_power(effect, {"listener": 1.0, "clips": 0.0, "residual": 0.01}, listeners, 20)
        assert ours == pytest.approx(theirs, abs=0.02)


def test_power_of_no_effect_is_the_level_and_grows_with_all_that_helps():
    spread = {"taste": 0.4, "clip": 0.4, "residual": 0.8}
    assert rating_power(0.0, spread, 20, 15) == pytest.approx(0.05, abs=0.006)
    assert choice_power(0.5, {"taste": 1.0, "clip": 0.5}, 20, 15) == pytest.approx(0.05, abs=0.006)
    powers = [rating_power(0.4, spread, n, 15) for n in (5, 10, 20, 40)]
    assert powers == sorted(powers)
    assert rating_power(0.4, spread, 20, 30) > rating_power(0.4, spread, 20, 15)
    assert rating_power(0.4, spread | {"taste": 0.0}, 20, 15) > rating_power(0.4, spread, 20, 15)
    # listeners without end do not help beyond the clips they all hear
    assert rating_power(0.4, spread, 1000, 15) < 0.85


def test_too_little_is_refused_in_one_sentence():
    for table in (np.full((3, 3), np.nan), np.ones((1, 5)), np.ones((5, 1)), np.diag([1.0, 2.0, 3.0]) + np.nan):
        with pytest.raises(UserError, match="too few"):
            crossed_mean(table)
    chain = np.array([[1.0, np.nan], [2.0, 3.0]])
    with pytest.raises(UserError, match="too few"):
        crossed_mean(chain)
    with pytest.raises(UserError, match="all answers are equal"):
        crossed_mean(np.zeros((4, 5)))
    with pytest.raises(UserError, match="too few"):
        rating_power(0.4, {"taste": 0.4, "clip": 0.4, "residual": 0.8}, 1, 15)
