"""The most diverse re-weighting of a base policy's clips at a wanted mean reward.

    minimise q' K q   subject to   sum q = 1,   0 <= q_j <= cap / J,   q . r >= wanted

K is positive semidefinite, so this is a convex programme. What choosing among the base's clips can have at each mean
reward, best-of-n and soft best-of-n included, lies on or under its optimum: the re-weighting frontier. The cap says how
strongly a clip may be favoured: best of n favours its best by at most n.

Shape letters: J clips.
"""

from __future__ import annotations

import numba
import numpy as np

STEPS = 150  # of the accelerated gradient method, for each price of the reward
SEARCH = 10  # halvings of the interval of that price
FIRST_PRICE = 1e-4  # per standard deviation of the reward
SLACK = 1e-3  # standard deviations of the reward given up for a choice among clips of equal reward


def most_diverse(similar: np.ndarray, reward: np.ndarray, wanted: float, cap: float = 8.0) -> np.ndarray:
    """Weights of the J clips, float64 [J]: FISTA on the Lagrangian, the reward's price found by bisection.

    similar : K, [J, J]
    reward  : [J], finite
    wanted  : mean reward to reach at least; above what the cap allows, the weights are those of the most reward, and of
              clips that are equally good the most diverse
    cap     : the largest weight is cap / J, cap >= 1
    """
    count = len(reward)
    best = capped_best(reward, cap)
    most = float(best @ reward)
    if most <= wanted:
        if (best[reward == reward[best > 0].min()] > 0).all():
            return best
        wanted = most - SLACK * float(reward.std())
    # a constant added to K changes q'Kq by a constant, since the weights sum to 1; without its mean, K's largest
    # eigenvalue, which limits the step, is some twenty times smaller
    matrix = (similar - similar.mean()).astype(np.float32)
    curvature = _largest_eigenvalue(matrix)
    scale = float(reward.std()) or 1.0

    def at(price: float, start: np.ndarray) -> np.ndarray:
        return _minimum(matrix, curvature, price / scale * reward, cap / count, start)

    weights = at(0.0, np.full(count, 1 / count))
    low, high = 0.0, FIRST_PRICE
    while float(weights @ reward) < wanted and high < 1e3:
        weights = at(high, weights)
        low, high = high, 4 * high
    if low == 0.0:
        return weights  # the most diverse of all has that reward
    found, low, high = weights, low / 4, low
    for _ in range(SEARCH):
        middle = (low + high) / 2
        weights = at(middle, weights)
        if float(weights @ reward) >= wanted:
            high, found = middle, weights
        else:
            low = middle
    return found


def capped_best(reward: np.ndarray, cap: float) -> np.ndarray:
    """The weights of the most mean reward under the cap: cap / J on each of the best J / cap clips, float64 [J]."""
    limit = cap / len(reward)
    order = np.argsort(-reward, kind="stable")
    weights = np.zeros(len(reward))
    weights[order] = np.clip(1.0 - limit * np.arange(len(reward)), 0.0, limit)
    return weights


def _minimum(matrix: np.ndarray, curvature: float, gain: np.ndarray, limit: float, start: np.ndarray) -> np.ndarray:
    """argmin q'Mq / 2 - gain.q over the capped simplex (FISTA, Beck and Teboulle 2009, restarted)."""
    q, ahead, momentum = start, start, 1.0
    for _ in range(STEPS):
        gradient = (matrix @ ahead.astype(np.float32)).astype(np.float64) - gain
        new = project(ahead - gradient / curvature, limit)
        if (ahead - new) @ (new - q) > 0:
            momentum = 1.0
        after = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / after * (new - q)
        q, momentum = new, after
    return q


def project(x: np.ndarray, limit: float) -> np.ndarray:
    """The nearest point to x with entries 0 .. limit that sum to 1, float64 [J]: clip(x - t), t by bisection."""
    return np.clip(x - _shift(np.ascontiguousarray(x, np.float64), limit), 0.0, limit)


@numba.njit(cache=True, nogil=True)
def _shift(x: np.ndarray, limit: float) -> float:
    """The t of `project`."""
    low, high = x.min() - limit, x.max()
    for _ in range(60):
        middle = (low + high) / 2
        total = 0.0
        for value in x:
            total += min(max(value - middle, 0.0), limit)
        if total > 1.0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _largest_eigenvalue(matrix: np.ndarray, steps: int = 30) -> float:
    """An upper estimate of it, by the power method from a fixed start."""
    x = np.random.default_rng(0).standard_normal(len(matrix)).astype(np.float32)
    for _ in range(steps):
        x = matrix @ (x / np.linalg.norm(x))
    return float(np.linalg.norm(x)) * 1.05
