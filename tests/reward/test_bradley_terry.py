"""The preference model, against formulas written out, finite differences and sampling."""

import numpy as np
import pytest

from fastsmart.reward.bradley_terry import (
    BAR_MEAN,
    BAR_SD,
    BOTH_BAD,
    EQUAL,
    LEFT,
    RIGHT,
    TIE_MEAN,
    TIE_SD,
    Posterior,
    _design,
    fit,
    fit_normal,
    information,
    log_posterior,
    probabilities,
)


def sure(weights: list[float], tie: float, bar: float) -> Posterior:
    """A posterior without uncertainty."""
    mean = np.array([*weights, tie, bar])
    return Posterior(mean, np.zeros((len(mean), len(mean))))


def choices(count: int, weights: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, count, len(weights)))
    u, v = left @ weights, right @ weights
    logits = np.stack([u, v, -1 + (u + v) / 2, np.full(count, -2.0)], axis=1)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return left, right, np.array([rng.choice(4, p=row) for row in p])


def test_the_answers_are_davidsons_with_an_outside_option() -> None:
    u, v, tie, bar = 1.5, -0.5, -0.7, -2.0
    p = probabilities(sure([1.0], tie, bar), np.array([[u], [v]]), np.array([0]), np.array([1]))[0]
    nu = np.exp(tie)
    parts = np.array([np.exp(u), np.exp(v), nu * np.sqrt(np.exp(u) * np.exp(v)), np.exp(bar)])
    np.testing.assert_allclose(p, parts / parts.sum(), rtol=1e-12)
    low = probabilities(sure([1.0], tie, bar), np.array([[-9.0], [-9.0]]), np.array([0]), np.array([1]))[0]
    assert low[BOTH_BAD] > 0.98  # two clips far below the bar


def test_the_gradient_and_the_curvature_are_the_derivatives() -> None:
    left, right, answer = choices(9, np.array([1.0, -2.0, 0.5]))
    design, theta = _design(left, right), np.array([0.3, -0.2, 0.9, -0.4, -1.1])
    centre, precision = np.array([0, 0, 0, TIE_MEAN, BAR_MEAN]), np.array([1, 2, 3, TIE_SD**-2, BAR_SD**-2])

    def at(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        return log_posterior(design, answer, theta, centre, precision)

    _, gradient, curvature = at(theta)
    steps = 1e-5 * np.eye(5)
    slope = [(at(theta + h)[0] - at(theta - h)[0]) / 2e-5 for h in steps]
    bend = [-(at(theta + h)[1] - at(theta - h)[1]) / 2e-5 for h in steps]
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(curvature, bend, rtol=1e-6, atol=1e-7)


def test_the_mode_is_one_whatever_the_start_and_the_order() -> None:
    left, right, answer = choices(40, np.array([3.0, 0.0, -1.0]))
    there = fit_normal(left, right, answer, np.ones(3))
    turned = np.random.default_rng(1).permutation(40)
    other = fit_normal(left[turned], right[turned], answer[turned], np.ones(3), np.array([-5.0, 5.0, 5.0, 2.0, 1.0]))
    np.testing.assert_allclose(other.mean, there.mean, atol=1e-5)
    np.testing.assert_allclose(other.covariance, there.covariance, atol=1e-5)


def test_without_choices_nothing_is_known_but_the_prior() -> None:
    nothing = fit_normal(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, int), np.array([0.5, 2.0]))
    np.testing.assert_allclose(nothing.mean, [0, 0, TIE_MEAN, BAR_MEAN])
    np.testing.assert_allclose(np.diag(nothing.covariance), [0.25, 4.0, TIE_SD**2, BAR_SD**2])


def test_many_choices_give_back_the_weights_and_cold_features_stay_cold() -> None:
    weights = np.array([2.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    found = fit(*choices(2000, weights), np.full(6, 0.5))
    sd = np.sqrt(np.diag(found.covariance))
    assert (np.abs(found.mean[:6] - weights) < 4 * sd[:6]).all()
    assert sd[:6].max() < 0.15
    few = choices(40, weights, seed=3)
    learnt, plain = fit(*few, np.full(6, 0.5)), fit_normal(*few, np.full(6, 2.0))
    assert np.abs(learnt.mean[2:6]).sum() < np.abs(plain.mean[2:6]).sum()


def test_answers_swap_with_the_sides() -> None:
    left, right, answer = choices(30, np.array([1.0, 2.0]))
    swapped = np.select([answer == LEFT, answer == RIGHT], [RIGHT, LEFT], answer)
    np.testing.assert_allclose(
        fit(left, right, answer, np.ones(2)).mean, fit(right, left, swapped, np.ones(2)).mean, atol=1e-9
    )
    assert EQUAL in answer


def test_information_is_what_sampling_the_posterior_says() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4)) * 0.7
    posterior = Posterior(np.array([1.0, -0.5, -1.0, -2.0]), root @ root.T)
    phi = rng.normal(size=(6, 2))
    first, second = np.array([0, 2, 4]), np.array([1, 3, 5])
    d = posterior.weights
    drawn = rng.multivariate_normal(d[0], d[1], 200_000) @ phi.T
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        u, v = drawn[:, a], drawn[:, b]
        logits = np.stack([u, v, -1.0 + (u + v) / 2, np.full(len(u), -2.0)], axis=1)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)

        def entropy(q: np.ndarray) -> np.ndarray:
            return -(q * np.log(np.maximum(q, 1e-300))).sum(axis=-1)

        expected = entropy(p.mean(axis=0)) - entropy(p).mean()
        assert information(posterior, phi, first, second)[k] == pytest.approx(expected, abs=0.02)
        np.testing.assert_allclose(probabilities(posterior, phi, first, second)[k], p.mean(axis=0), atol=0.015)


def test_an_answer_that_is_known_tells_nothing() -> None:
    told = information(sure([5.0], -1.0, -5.0), np.array([[1.0], [-1.0]]), np.array([0]), np.array([1]))
    assert abs(told[0]) < 1e-9
