"""The witness is the gradient of the squared discrepancy to the target, without bias; its kernel is what it says."""

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from fastsmart.grpo.witness import gated, witness
from fastsmart.music.likeness import intersection

KERNEL = np.array([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]])
TARGET = np.array([0.2, 0.3, 0.5])
LOGITS = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64)


def some_histograms(n: int, bins: int, seed: int = 0) -> np.ndarray:
    counts = np.random.default_rng(seed).poisson(0.5, (n, bins)) + 1e-9
    return (counts / counts.sum(1, keepdims=True)).astype(np.float32)


def test_intersection_is_one_minus_half_the_city_block_distance():
    a, b = some_histograms(30, 834), some_histograms(20, 834, seed=1)
    expected = 1.0 - cdist(a.astype(np.float64), b.astype(np.float64), "cityblock") / 2
    np.testing.assert_allclose(intersection(a, b), expected, atol=2e-6)


def test_the_kernel_is_positive_semidefinite_symmetric_and_one_on_its_diagonal():
    rows = some_histograms(200, 13)
    kernel = intersection(rows, rows).astype(np.float64)
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-7)
    np.testing.assert_allclose(np.diag(kernel), 1.0, atol=1e-5)
    assert np.linalg.eigvalsh(kernel).min() > -1e-4 * 200  # float32


def discrepancy_gradient() -> np.ndarray:
    """Half of minus the gradient of MMD^2(policy, target) with respect to the logits, by autograd."""
    logits = LOGITS.clone().requires_grad_()
    gap = logits.softmax(0) - torch.from_numpy(TARGET)
    (-0.5 * gap @ torch.from_numpy(KERNEL) @ gap).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


def expected_gradient(groups: int, size: int, own: bool) -> np.ndarray:
    """The exact expectation of mean w x grad log p over every batch of `groups` groups of `size` clips.

    Each group's mean is taken off its witnesses, with the factor size / (size - 1) that undoes what this takes away.
    own : let a clip stand for the policy beside itself, as it must not
    """
    share = LOGITS.softmax(0).numpy()
    total = np.zeros(3)
    n = groups * size
    group = np.repeat(np.arange(groups), size)
    counted = np.ones((n, n), bool) if own else group[:, None] != group[None, :]
    for drawn in itertools.product(range(3), repeat=n):
        clips = np.array(drawn)
        chance = share[clips].prod()
        value = witness(KERNEL[clips], TARGET, KERNEL[np.ix_(clips, clips)], counted)
        mean = np.bincount(group, value) / size
        value = (value - mean[group]) * size / (size - 1)
        total += chance * (value[:, None] * (np.eye(3)[clips] - share)).mean(0)
    return total


def test_it_is_the_gradient_of_the_squared_discrepancy():
    np.testing.assert_allclose(expected_gradient(2, 3, own=False), discrepancy_gradient(), atol=1e-12)


def test_with_the_clip_itself_in_the_pool_it_would_not_be():
    gradient = discrepancy_gradient()
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(expected_gradient(2, 3, own=True), gradient, rtol=0.02)


def test_at_the_target_nothing_is_asked_for_on_average():
    rng = np.random.default_rng(0)
    total = np.zeros(3)
    for _ in range(4000):
        clips = rng.choice(3, 16, p=TARGET)
        counted = ~np.eye(16, dtype=bool)
        value = witness(KERNEL[clips], TARGET, KERNEL[np.ix_(clips, clips)], counted)
        total += np.array([value[clips == k].sum() for k in range(3)])
    np.testing.assert_allclose(total / (4000 * 16), 0.0, atol=3e-3)


def test_the_gate_lets_what_is_missing_pay_only_where_it_is_good():
    value, good = np.array([-0.2, -0.1, 0.3, 0.4]), np.array([True, False, True, False])
    np.testing.assert_array_equal(gated(value, good), [-0.2, -0.1, 0.3, 0.0])


def shares_after(gate: bool, steps: int = 300) -> np.ndarray:
    """Shares of (common good, rare good, noise) after witness ascent from a collapsed start.

    Noise is half like the rare good piece, which the target wants more of.
    """
    kernel = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.5, 1.0]])
    target = np.array([0.5, 0.5, 0.0])
    logits = np.array([3.0, -1.0, -1.0])
    rng = np.random.default_rng(0)
    for _ in range(steps):
        share = np.exp(logits - logits.max())
        share /= share.sum()
        clips = rng.choice(3, 64, p=share)
        counted = ~np.eye(64, dtype=bool)
        value = witness(kernel[clips], target, kernel[np.ix_(clips, clips)], counted)
        value = gated(value, clips != 2) if gate else value
        value -= value.mean()
        logits += 0.5 * np.bincount(clips, value, 3) / 64 - 0.5 * value.mean() * share
    share = np.exp(logits - logits.max())
    return share / share.sum()


def test_from_a_collapse_the_gated_witness_raises_the_rare_good_piece_and_not_the_noise():
    start = np.exp([3.0, -1.0, -1.0]) / np.exp([3.0, -1.0, -1.0]).sum()
    after = shares_after(gate=True)
    assert after[1] > 5 * start[1]
    assert after[2] < after[1] / 3
    assert shares_after(gate=False, steps=50)[2] > 1.25 * shares_after(gate=True, steps=50)[2]


def test_paying_for_unlikeness_alone_raises_noise_and_the_witness_does_not():
    """Of a common piece, a rare one like it, and noise unlike everything: what is paid with and without a target."""
    kernel = np.array([[1.0, 0.4, 0.0], [0.4, 1.0, 0.0], [0.0, 0.0, 1.0]])

    def after(target: np.ndarray) -> np.ndarray:
        logits, rng = np.array([2.0, -1.0, -1.0]), np.random.default_rng(1)
        for _ in range(300):
            share = np.exp(logits - logits.max())
            share /= share.sum()
            clips = rng.choice(3, 64, p=share)
            value = witness(kernel[clips], target, kernel[np.ix_(clips, clips)], ~np.eye(64, dtype=bool))
            value = gated(value, clips != 2) if target.any() else value
            value -= value.mean()
            logits += np.bincount(clips, value, 3) / 64
        share = np.exp(logits - logits.max())
        return share / share.sum()

    unlike, towards = after(np.zeros(3)), after(np.array([0.5, 0.5, 0.0]))
    assert unlike[2] > 0.3
    assert towards[2] < 0.1
    assert towards[1] > 0.3
