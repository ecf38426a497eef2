"""The value of a prefix, on rewards that are known."""

import numpy as np
import pytest

from fastsmart.credit.value import FEWEST, RIDGE, STAGES, CrossFittedValue, PrefixValue, explained, without

LONGEST = 240


def made(count: int, seed: int):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, LONGEST + 1, count)
    features = random.normal(size=(count, 4)) * [1, 10, 0.1, 1] + [0, 5, 0, 2]
    reward = features[:, 0] + 0.3 * features[:, 1] * (tokens / LONGEST) + 5 * features[:, 2] * features[:, 0]
    return features, tokens, reward


def test_it_learns_values_products_and_what_changes_along_a_clip():
    value = PrefixValue(*made(20_000, 0), LONGEST)
    features, tokens, reward = made(2_000, 1)
    assert explained(value(features, tokens), reward) > 0.9


def test_it_says_nothing_of_noise():
    features, tokens, reward = made(40_000, 0)
    noise = np.random.default_rng(2).normal(size=len(reward))
    value = PrefixValue(features, tokens, noise, LONGEST)
    others, places, _ = made(2_000, 1)
    assert value(others, places).std() < 0.1
    assert explained(value(others, places), np.random.default_rng(3).normal(size=len(others))) < 0.0


def test_a_stage_is_the_ridge_regression_of_numpy():
    """At a stage's own place: least squares on the terms, beside rows that stand for the penalty."""
    features, tokens, reward = made(3_000, 0)
    value = PrefixValue(features, tokens, reward, LONGEST)
    stage = 7
    near = np.abs(tokens / LONGEST * STAGES - stage) <= 1
    unit = np.clip((features[near] - features[near].mean(0)) / (features[near].std(0) + 1e-6), -4, 4)
    pairs = [(i, j) for i in range(4) for j in range(i, 4)]
    terms = np.column_stack([np.ones(near.sum()), unit, *[unit[:, i] * unit[:, j] for i, j in pairs]])
    penalty = np.eye(terms.shape[1])[1:] * np.sqrt(RIDGE * near.sum())
    rows, wanted = np.vstack([terms, penalty]), np.concatenate([reward[near] - reward.mean(), np.zeros(len(penalty))])
    slope = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    place = np.full(near.sum(), stage * LONGEST // STAGES)
    np.testing.assert_allclose(value(features[near], place), reward.mean() + terms @ slope, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [0, 3])
def test_of_too_few_clips_it_knows_the_mean(count):
    features, tokens, reward = made(3, 0)
    value = PrefixValue(features[:count], tokens[:count], reward[:count], LONGEST)
    np.testing.assert_allclose(value(features, tokens), reward[:count].mean() if count else 0.0)


def test_explained_is_r_squared():
    reward = np.array([1.0, 2.0, 3.0])
    assert explained(reward, reward) == 1.0
    assert explained(np.full(3, 2.0), reward) == pytest.approx(0.0)
    assert np.isnan(explained(np.ones(3), np.ones(3)))
    assert np.isnan(explained(np.zeros(0), np.zeros(0)))


def test_a_clip_is_judged_by_clips_of_other_folds_and_by_those_of_none():
    """Rewards that only a fold's own clips foretell are not foretold; of prefixes of no fold everybody learns."""
    features, tokens, _ = made(4_000, 0)
    fold = np.arange(4_000) % 2
    reward = np.where(fold == 0, features[:, 0], -features[:, 0])
    apart = CrossFittedValue(fold, features, tokens, reward, fold, LONGEST)
    judged = apart(np.arange(4_000), features, tokens)
    assert np.corrcoef(judged, reward)[0, 1] < -0.9
    for left_out in (0, 1):
        others = PrefixValue(*(part[fold != left_out] for part in (features, tokens, reward)), LONGEST)
        mine = fold == left_out
        np.testing.assert_allclose(judged[mine], others(features[mine], tokens[mine]))
    shared = CrossFittedValue(fold, features, tokens, features[:, 0], np.full(4_000, -1), LONGEST)
    alone = CrossFittedValue(np.zeros(4_000, int), features, tokens, features[:, 0], np.zeros(4_000, int), LONGEST)
    everything = PrefixValue(features, tokens, features[:, 0], LONGEST)(features, tokens)
    np.testing.assert_allclose(shared(np.arange(4_000), features, tokens), everything)
    np.testing.assert_allclose(alone(np.arange(4_000), features, tokens), everything)


def test_without_features_a_reward_has_nothing_to_do_with_them_and_keeps_its_mean_and_the_rest():
    random = np.random.default_rng(0)
    features, rest = random.normal(size=(400, 2)) * [10, 1] + [60, 0], random.normal(size=400)
    reward = rest + 0.05 * (features[:, 0] - 60) ** 2 + features[:, 1] * (features[:, 0] - 60)
    reward[7] = np.nan
    kept, known = without(reward, features), np.isfinite(reward)
    assert np.isnan(kept[7])
    assert kept[known].mean() == pytest.approx(reward[known].mean())
    unit = (features[known] - features[known].mean(0)) / features[known].std(0)
    for term in (*unit.T, unit[:, 0] ** 2, unit[:, 1] ** 2, unit[:, 0] * unit[:, 1]):
        assert abs(np.corrcoef(term, kept[known])[0, 1]) < 0.02
    assert np.corrcoef(kept[known], rest[known])[0, 1] > 0.97


def test_a_share_of_it_is_taken_out():
    random = np.random.default_rng(1)
    features, reward = random.normal(size=(300, 1)), random.normal(size=300)
    whole, half = without(reward, features), without(reward, features, 0.5)
    np.testing.assert_allclose(half, (reward + whole) / 2)
    np.testing.assert_array_equal(without(reward, features, 0.0), reward)


def test_of_too_few_clips_nothing_is_taken_out():
    reward = np.arange(FEWEST - 1, dtype=float)
    np.testing.assert_array_equal(without(reward, reward[:, None]), reward)
