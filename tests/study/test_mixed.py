"""Mixed models and power: against published results, closed forms and simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels
from statsmodels.stats.power import NormalIndPower

from fastsmart import UserError
from fastsmart.study.mixed import choice_power, linear_mixed, logistic_mixed, rating_power, sign_test


def ratings(seed: int, effect: float, listeners: int = 8, prompts: int = 10, clip: float = 0.3) -> pd.DataFrame:
    """A balanced test: every listener rates both policies on every prompt."""
    random = np.random.default_rng(seed)
    by_listener, by_prompt = random.normal(0, 0.5, listeners), random.normal(0, 0.4, prompts)
    by_clip = random.normal(0, clip, (prompts, 2)) if clip else np.zeros((prompts, 2))
    rows = [
        (
            3 + by_listener[i] + by_prompt[j] + by_clip[j, k] + effect * k + random.normal(0, 0.7),
            "ab"[k],
            i,
            j,
            f"{j}{k}",
        )
        for i in range(listeners)
        for j in range(prompts)
        for k in range(2)
    ]
    return pd.DataFrame(rows, columns=["rating", "policy", "listener", "prompt", "clip"])


def test_published_results_of_lme4_and_statsmodels_on_pastes():
    """Pastes (Davies 1972), shipped with statsmodels: lmer(strength ~ (1|batch) + (1|batch:cask)), as its own tests
    quote lme4: 60.0533, standard error 0.6769, variances 1.657 and 8.434, residual 0.678."""
    data = pd.read_csv(Path(statsmodels.__file__).parent / "regression/tests/results/pastes.csv")
    casks = data["batch"] + data["cask"]
    table = pd.DataFrame({"rating": data["strength"], "policy": "one", "listener": data["batch"], "prompt": casks})
    found = linear_mixed(table, "one")
    assert found.converged
    assert found.intercept.estimate == pytest.approx(60.0533, rel=1e-5)
    assert found.intercept.error == pytest.approx(0.6769, rel=1e-3)
    assert found.spread["listener"] ** 2 == pytest.approx(1.657, rel=2e-3)
    assert found.spread["prompt"] ** 2 == pytest.approx(8.434, rel=2e-3)
    assert found.spread["residual"] ** 2 == pytest.approx(0.678, rel=1e-3)


def test_a_balanced_test_has_its_analysis_of_variance_in_closed_form():
    table = ratings(0, 0.4, clip=0)
    found = linear_mixed(table, "a")
    cells = table.pivot_table(index=["listener", "prompt"], columns="policy", values="rating")
    assert found.effects["b"].estimate == pytest.approx((cells["b"] - cells["a"]).mean())
    # REML of crossed intercepts: the error of the difference is sqrt(2 residual^2 / (L P))
    assert found.effects["b"].error == pytest.approx(np.sqrt(2 * found.spread["residual"] ** 2 / 80), rel=1e-4)


def test_leaving_out_clips_makes_too_sure():
    table = ratings(3, 0.4, clip=0.8)
    plain, careful = linear_mixed(table, "a"), linear_mixed(table, "a", ("listener", "prompt", "clip"))
    assert careful.spread["clip"] == pytest.approx(0.8, rel=0.5)
    assert careful.effects["b"].error > 1.5 * plain.effects["b"].error


@pytest.mark.parametrize("effect", [0.0, 0.4])
def test_power_is_how_often_simulated_tests_find_the_effect(effect: float):
    trials, clip = 80, 0.3
    fits = [
        linear_mixed(ratings(seed, effect, clip=clip), "a", ("listener", "prompt", "clip")) for seed in range(trials)
    ]
    found = np.mean([fit.effects["b"].p < 0.05 for fit in fits])
    said = rating_power(effect, {"residual": 0.7, "clip": clip}, 8, 10)
    # three binomial standard errors, and 4 points for variances that are estimated, which normal theory neglects
    assert abs(found - said) < 3 * np.sqrt(said * (1 - said) / trials) + 0.04


def test_power_without_clips_is_that_of_a_z_test():
    theirs = NormalIndPower().power(0.3 / 0.7, 80, 0.05, ratio=1)
    assert rating_power(0.3, {"residual": 0.7}, 8, 10) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("preference", "listeners"), [(0.5, 10), (0.6, 10), (0.7, 4)])
def test_power_of_the_sign_test_is_how_often_it_finds_the_preference(preference: float, listeners: int):
    random = np.random.default_rng(0)
    wins = random.binomial(listeners * 10, preference, 2000)
    p = {int(w): sign_test(int(w), listeners * 10 - int(w)) for w in np.unique(wins)}
    found = np.mean([p[int(w)] < 0.05 for w in wins])
    assert choice_power(preference, listeners, 10) == pytest.approx(found, abs=0.035)


def test_choices_of_like_listeners_give_the_log_odds():
    won = np.r_[np.ones(120, int), np.zeros(60, int)]
    np.random.default_rng(0).shuffle(won)
    table = pd.DataFrame({"won": won, "listener": np.repeat(range(18), 10), "prompt": np.tile(range(10), 18)})
    found = logistic_mixed(table)
    assert found.intercept.estimate == pytest.approx(np.log(2), abs=0.05)
    assert found.intercept.error == pytest.approx(1 / np.sqrt(180 * 2 / 9), rel=0.15)


def test_listeners_who_differ_make_choices_less_sure():
    rows = [(int(i < 12), i, j) for i in range(18) for j in range(10)]  # twelve always choose the one, six the other
    found = logistic_mixed(pd.DataFrame(rows, columns=["won", "listener", "prompt"]))
    assert found.spread["listener"] > 1
    assert found.intercept.error > 2 / np.sqrt(180 * 2 / 9)


def test_too_little_is_refused_in_one_sentence():
    with pytest.raises(UserError, match="too few"):
        linear_mixed(ratings(0, 0.0).head(3), "a")
    with pytest.raises(UserError, match="all ratings are equal"):
        linear_mixed(ratings(0, 0.0).assign(rating=2.0), "a")
    with pytest.raises(UserError, match="no preference"):
        logistic_mixed(pd.DataFrame({"won": [], "listener": [], "prompt": []}))
