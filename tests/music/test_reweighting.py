"""The target of the witness solves its quadratic programme."""

import numpy as np
import pytest
from scipy.optimize import minimize

from fastsmart.music.likeness import intersection
from fastsmart.music.reweighting import capped_best, most_diverse, project


def problem(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(12, 0.3), n).astype(np.float32)
    return intersection(rows, rows).astype(np.float64), rng.normal(5.5, 1.0, n)


def test_projection_is_the_nearest_point():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.1, 30)
    found = project(x, 0.1)
    bounds, total = [(0, 0.1)] * 30, {"type": "eq", "fun": lambda q: q.sum() - 1}
    nearest = minimize(lambda q: ((q - x) ** 2).sum(), np.full(30, 1 / 30), bounds=bounds, constraints=[total])
    np.testing.assert_allclose(found, nearest.x, atol=1e-5)


@pytest.mark.parametrize("wanted", [5.0, 6.0, 6.3])
def test_it_is_the_optimum_that_scipy_finds(wanted: float):
    kernel, reward = problem(40)
    ours = most_diverse(kernel, reward, wanted, cap=8.0)
    limits = [{"type": "eq", "fun": lambda q: q.sum() - 1}, {"type": "ineq", "fun": lambda q: q @ reward - wanted}]
    theirs = minimize(
        lambda q: q @ kernel @ q,
        np.full(40, 1 / 40),
        jac=lambda q: 2 * kernel @ q,
        bounds=[(0, 8 / 40)] * 40,
        constraints=limits,
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert theirs.success
    assert ours.sum() == pytest.approx(1.0, abs=1e-9)
    assert ours.min() >= 0
    assert ours.max() <= 8 / 40 + 1e-12
    assert ours @ reward >= wanted - 1e-3
    assert ours @ kernel @ ours <= theirs.fun * 1.002 + 1e-9


def test_without_room_it_is_uniform():
    kernel, reward = problem(40)
    np.testing.assert_allclose(most_diverse(kernel, reward, reward.mean(), cap=1.0), 1 / 40, atol=1e-9)


def test_more_than_the_cap_allows_gives_the_most_there_is():
    kernel, reward = problem(40)
    best = most_diverse(kernel, reward, 100.0, cap=8.0)
    np.testing.assert_array_equal(best, capped_best(reward, 8.0))
    np.testing.assert_allclose(best[np.argsort(-reward)[:5]], 8 / 40)
    assert best @ reward == pytest.approx(np.sort(reward)[-5:].mean())


def test_of_clips_that_are_equally_good_the_most_diverse_are_taken():
    """As of a reward that is a gate: more of the clips pass it than the cap needs."""
    kernel, _ = problem(40)
    passed = np.arange(40) % 2 == 0
    ours = most_diverse(kernel, passed.astype(float), 100.0, cap=8.0)
    assert ours[passed].sum() > 0.999
    among = np.flatnonzero(passed)
    theirs = most_diverse(kernel[np.ix_(among, among)], np.zeros(20), 0.0, cap=4.0)  # no reward to choose by
    assert ours @ kernel @ ours == pytest.approx(theirs @ kernel[np.ix_(among, among)] @ theirs, rel=2e-3)
    first = capped_best(passed.astype(float), 8.0)
    assert ours @ kernel @ ours < 0.98 * (first @ kernel @ first)
