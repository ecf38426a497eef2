"""Weights of clips: those of best of n by counting, those of the most diverse mean reward by their constraints."""

import itertools

import numpy as np
import pytest

from fastsmart.music.histograms import BINS
from fastsmart.music.likeness import likeness
from fastsmart.tilt.weights import best_of_n, most_diverse_gain


def rows_of(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Histograms of n clips, each of few bins, so that some are alike and others are not."""
    random = np.random.default_rng(seed)
    return {name: random.dirichlet(np.full(bins + 1, 0.05), n).astype(np.float32) for name, bins in BINS.items()}


@pytest.mark.parametrize("reward", [[1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
def test_best_of_n_is_what_counting_all_draws_gives(reward):
    reward, n = np.array(reward), 3
    counted = np.zeros(4)
    for draw in itertools.product(range(4), repeat=n):
        best = max(reward[list(draw)])
        among = np.flatnonzero(reward == best)
        counted[among] += 1 / len(among) / 4**n
    np.testing.assert_allclose(best_of_n(reward, np.zeros(4, int), n), counted, rtol=1e-12)


def test_prompts_weigh_the_same_and_what_could_not_be_scored_weighs_nothing():
    reward = np.array([1.0, 2.0, np.nan, 10.0, 30.0, 20.0, np.nan, np.nan])
    pool = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    weights = best_of_n(reward, pool, 2)
    assert weights[pool == 0].sum() == pytest.approx(0.5)
    assert weights[pool == 1].sum() == pytest.approx(0.5)
    assert weights[~np.isfinite(reward)].tolist() == [0.0] * 3
    assert weights[[3, 5, 4]] == pytest.approx(np.array([1, 3, 5]) / 18)
    assert not best_of_n(np.full(3, np.nan), np.zeros(3, int), 2).any()


def test_the_most_diverse_weights_reach_their_reward_and_no_weights_of_best_of_n_are_as_diverse():
    reward, rows = np.random.default_rng(1).normal(5.5, 1.0, 64), rows_of(64)
    reward[7] = np.nan
    weights = most_diverse_gain(reward, rows, 0.5, 8.0)
    known = np.isfinite(reward)
    assert weights.sum() == pytest.approx(1)
    assert weights[7] == 0
    assert weights.max() <= 8 / known.sum() + 1e-9
    assert weights[known] @ reward[known] >= reward[known].mean() + 0.5 * reward[known].std() - 1e-9
    similar = likeness(rows, rows)
    # of all n the first whose choice has as much reward
    chosen = next(
        w for n in range(2, 9) if (w := best_of_n(reward, np.zeros(64, int), n))[known] @ reward[known]
        >= weights[known] @ reward[known] - 0.02
    )  # fmt: skip
    assert weights @ similar @ weights < chosen @ similar @ chosen


def test_clips_that_may_not_weigh_count_for_the_reward_that_is_wanted():
    """Of clips of few notes, which a taste may like best, none is learnt; what is must not undo what they show."""
    reward, rows = np.random.default_rng(2).normal(0.0, 1.0, 64), rows_of(64)
    able = np.argsort(np.argsort(reward)) < 48  # the best 16 may not
    weights = most_diverse_gain(reward, rows, 0.1, 3.0, able)
    assert weights.sum() == pytest.approx(1)
    assert not weights[~able].any()
    wanted = reward.mean() + 0.1 * reward.std()
    assert weights @ reward >= wanted - 1e-9
    assert wanted > reward[able].mean() + 0.5 * reward[able].std()
    assert not most_diverse_gain(reward, rows, 0.1, 3.0, np.zeros(64, bool)).any()


def test_without_a_score_there_are_no_weights():
    assert not most_diverse_gain(np.full(4, np.nan), rows_of(4), 1.0, 2.0).any()
