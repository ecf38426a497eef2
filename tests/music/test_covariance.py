"""Fréchet distance, Fisher ratio and shrinkage against scipy, scikit-learn where it is, and formulas."""

import numpy as np
import pytest
import scipy.linalg

from fastsmart.music.covariance import Gaussian, fisher_ratio, frechet_distance


def vectors(seed: int, n: int, d: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """As frechet-music-distance has it: the trace of the square root of the product of the covariances."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(np.real(root))
    return float(((a.mean - b.mean) ** 2).sum() + spread)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (8, 300), (5, 7)])  # more clips than numbers, fewer, both fewer
def test_the_distance_is_that_of_scipy(n: int, m: int) -> None:
    a, b = Gaussian.fit(vectors(0, n)), Gaussian.fit(vectors(1, m))
    assert frechet_distance(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_the_distance_exists_for_covariances_without_an_inverse() -> None:
    flat = Gaussian(np.zeros(3), np.diag([1.0, 0.0, 0.0]))
    other = Gaussian(np.array([0.0, 2.0, 0.0]), np.diag([4.0, 0.0, 1.0]))
    assert frechet_distance(flat, other) == pytest.approx(4.0 + (2.0 - 1.0) ** 2 + 1.0)


def test_covariances_are_shrunk_as_scikit_learn_does() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    for n in (6, 40, 500):
        x = vectors(2, n)
        fitted = covariance.LedoitWolf().fit(x)
        found = Gaussian.fit(x)
        np.testing.assert_allclose(found.mean, fitted.location_, atol=1e-12)
        np.testing.assert_allclose(found.covariance, fitted.covariance_, rtol=1e-9, atol=1e-12)


def test_a_shrunk_covariance_keeps_its_trace_and_gains_its_least_value() -> None:
    x = vectors(3, 6)
    plain = np.cov(x.T, bias=True)
    shrunk = Gaussian.fit(x).covariance
    assert np.trace(shrunk) == pytest.approx(np.trace(plain))
    assert np.linalg.eigvalsh(plain)[0] < 1e-9 < 1e-3 < np.linalg.eigvalsh(shrunk)[0]


@pytest.mark.parametrize("clips", [4, 200])
def test_the_fisher_ratio_is_that_of_the_variances_however_many_clips_there_are(clips: int) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400 if clips == 4 else 40):
        means = rng.normal(size=(6, 8)) * 0.5
        style = np.repeat(np.arange(6), clips)
        found.append(fisher_ratio(means[style] + rng.normal(size=(len(style), 8)), style))
    assert np.mean(found) == pytest.approx(0.25, abs=0.02)


def test_styles_that_are_one_have_a_ratio_of_zero_on_the_mean() -> None:
    rng = np.random.default_rng(0)
    style = np.array([0] * 3 + [1] * 9 + [2] * 5)
    found = [fisher_ratio(rng.normal(size=(17, 20)), style) for _ in range(300)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(300) + 1e-3
    assert np.isnan(fisher_ratio(rng.normal(size=(5, 3)), np.zeros(5)))
