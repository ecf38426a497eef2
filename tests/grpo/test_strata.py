"""Stratified advantages take no side between keys and registers, and keep modes that a group baseline loses."""

import numpy as np
import pytest
import torch

from fastsmart.grpo.advantages import group_advantages
from fastsmart.grpo.strata import stratified_advantages, stratum_design


def labelled(n: int = 64, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return rng.normal(5.5, 1.0, n), [rng.integers(12, size=n), rng.integers(3, size=n)]


def test_residuals_sum_to_zero_in_every_key_and_every_register():
    reward, labels = labelled()
    advantage = stratified_advantages(reward, labels, between=0.0, unit=1.0)
    for label in labels:
        sums = np.bincount(label, advantage)
        np.testing.assert_allclose(sums, 0.0, atol=1e-9)


def test_they_are_the_residuals_of_a_regression_by_another_hand():
    import statsmodels.api as sm

    reward, labels = labelled(seed=1)
    dummies = np.concatenate([np.eye(12)[labels[0]][:, 1:], np.eye(3)[labels[1]][:, 1:]], axis=1)
    fit = sm.OLS(reward, sm.add_constant(dummies)).fit()
    expected = fit.resid * len(reward) / fit.df_resid
    np.testing.assert_allclose(stratified_advantages(reward, labels, 0.0, 2.0), expected / 2.0, atol=1e-9)


def test_one_stratum_is_a_plain_baseline():
    reward, _ = labelled()
    n = len(reward)
    np.testing.assert_allclose(
        stratified_advantages(reward, [], 0.0, 1.0), (reward - reward.mean()) * n / (n - 1), atol=1e-12
    )


def test_all_of_the_part_between_strata_gives_the_centred_reward_back_but_for_degrees_of_freedom():
    reward, labels = labelled()
    within = stratified_advantages(reward, labels, 0.0, 1.0)
    both = stratified_advantages(reward, labels, 1.0, 1.0)
    rank = np.linalg.matrix_rank(stratum_design(labels))
    shrunk = within * (len(reward) - rank) / len(reward)
    np.testing.assert_allclose(shrunk + (both - within), reward - reward.mean(), atol=1e-9)


def test_what_could_not_be_scored_counts_for_nothing():
    reward, labels = labelled()
    some = reward.copy()
    some[::7] = np.nan
    advantage = stratified_advantages(some, labels, 0.25, 1.0)
    kept = np.isfinite(some)
    assert (advantage[~kept] == 0.0).all()
    np.testing.assert_array_equal(
        advantage[kept], stratified_advantages(reward[kept], [label[kept] for label in labels], 0.25, 1.0)
    )
    assert (stratified_advantages(np.full(4, np.nan), [], 0.0, 1.0) == 0.0).all()


def test_a_clip_alone_in_its_stratum_has_nothing_to_learn_from():
    reward, label = np.array([1.0, 2.0, 9.0]), np.array([0, 0, 1])
    np.testing.assert_allclose(stratified_advantages(reward, [label], 0.0, 1.0)[2], 0.0, atol=1e-12)


def test_the_order_of_the_clips_does_not_matter():
    reward, labels = labelled()
    order = np.random.default_rng(3).permutation(len(reward))
    moved = stratified_advantages(reward[order], [label[order] for label in labels], 0.25, 1.3)
    np.testing.assert_allclose(moved, stratified_advantages(reward, labels, 0.25, 1.3)[order], atol=1e-12)


def effective_modes(
    baseline: str, better: float, seed: int, modes: int = 4, batch: int = 64, steps: int = 400
) -> float:
    """Effective number of modes after policy gradient on a softmax over modes, each of a good and a bad piece.

    The reward is 1 for the good piece of any mode (`better` more for mode 0), plus noise; the optimum has all good
    pieces, and nothing says in which modes.
    """
    rng = np.random.default_rng(seed)
    logits = torch.zeros(2 * modes, dtype=torch.float64)
    for _ in range(steps):
        share = logits.softmax(0)
        drawn = rng.choice(2 * modes, batch, p=share.numpy())
        mode, good = drawn // 2, drawn % 2
        reward = good * (1 + better * (mode == 0)) + rng.normal(0, 0.3, batch)
        if baseline == "strata":
            advantage = stratified_advantages(reward, [mode], 0.0, 0.5)
        else:
            advantage = group_advantages(torch.from_numpy(reward), torch.zeros(batch, dtype=torch.long), "none").numpy()
            advantage = advantage / 0.5
        step = np.bincount(drawn, advantage, 2 * modes) - advantage.sum() * share.numpy()
        logits += torch.from_numpy(step) / batch
    shares = logits.softmax(0).view(modes, 2).sum(1)
    return float(torch.exp(-(shares * shares.log()).sum()))


@pytest.mark.parametrize("better", [0.0, 0.05])
def test_modes_of_equal_quality_survive_within_strata_and_not_against_a_group_baseline(better: float):
    kept = np.mean([effective_modes("strata", better, seed) for seed in range(10)])
    lost = np.mean([effective_modes("group", better, seed) for seed in range(10)])
    assert kept > 3.9
    assert lost < 2.5
