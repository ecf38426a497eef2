"""Utilities from choices between two: Bradley and Terry's model with ties and "both bad", in its Bayesian form.

A clip with coordinates φ has the utility u = w · φ. Between clips l and r a listener answers

    left      with probability proportional to  exp(u_l)
    right                                       exp(u_r)
    equal                                       exp(t + (u_l + u_r) / 2)     Davidson 1970, J. Am. Stat. Assoc. 65
    both bad                                    exp(b)                       the outside option of a multinomial logit:
                                                                             McFadden 1974, in Frontiers in Econometrics

so that two clips are "both bad" where both lie below the bar b, and an answer says something about how good clips are,
not only which is better. Without ties and the bar it is Bradley and Terry (1952, Biometrika 39).

Most features leave most listeners cold, and a few matter much: the prior of a weight is Student's t, as a normal one
whose deviation is learnt with it (automatic relevance determination: Tipping 2001, J. Mach. Learn. Res. 1; Bishop and
Tipping 2000, UAI). Given the deviations the posterior is taken as normal around its mode (Laplace); its logarithm is
concave, so there is one mode, whatever the order of the choices.

Shape letters: C choices, D coordinates, P = D + 2 parameters (w, t, b), Q quadrature points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

LEFT, RIGHT, EQUAL, BOTH_BAD = range(4)
TIE_MEAN, TIE_SD = -1.0, 1.0  # prior of t: every seventh pair of equally good clips is called equal
BAR_MEAN, BAR_SD = -4.0, 3.0  # prior of b, in logits from the mean clip of the base: some clips are bad, not most
FREEDOM = 0.3  # degrees of freedom of the prior of a weight; of 0.3, 1 and 3 what learnt fastest (docs/taste.md)
ROUNDS = 8  # of weights and their deviations in turn
NEWTON_STEPS = 100
CONVERGED = 1e-10
SMALLEST_STEP = 1e-6
APART_POINTS, APART_WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
LEVEL_POINTS, LEVEL_WEIGHTS = np.polynomial.hermite_e.hermegauss(3)  # the level matters to "both bad" alone
QUADRATURE = np.outer(APART_WEIGHTS, LEVEL_WEIGHTS) / (APART_WEIGHTS.sum() * LEVEL_WEIGHTS.sum())


@dataclass(frozen=True)
class Posterior:
    """Normal posterior of the parameters of one listener.

    mean       : float64 [P]: D weights, then t and b
    covariance : float64 [P, P]
    """

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D] of the weights."""
        d = len(self.mean) - 2
        return self.mean[:d], self.covariance[:d, :d]

    def utility(self, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the utility of clips, float64 [N] each, from coordinates [N, D]."""
        mean, variance = np.empty(len(phi)), np.empty(len(phi))
        _fill_utility(np.ascontiguousarray(phi), *map(np.ascontiguousarray, self.weights), mean, variance)
        return mean, np.sqrt(np.maximum(variance, 0.0))


def fit(left: np.ndarray, right: np.ndarray, answer: np.ndarray, scale: np.ndarray) -> Posterior:
    """The posterior after C answers, under Student's t priors of the weights.

    left, right : coordinates of the two clips, float64 [C, D]
    answer      : int64 [C], LEFT, RIGHT, EQUAL or BOTH_BAD
    scale       : of each weight's prior, logits a unit of its coordinate, float64 [D]; their centre is 0
    """
    prior_sd = scale
    posterior = fit_normal(left, right, answer, prior_sd)
    for _ in range(ROUNDS - 1):
        mean, covariance = posterior.weights
        square = mean**2 + np.diag(covariance)
        prior_sd = np.sqrt((FREEDOM * scale**2 + square) / (FREEDOM + 1))
        posterior = fit_normal(left, right, answer, prior_sd, posterior.mean)
    return posterior


def fit_normal(
    left: np.ndarray, right: np.ndarray, answer: np.ndarray, prior_sd: np.ndarray, start: np.ndarray | None = None
) -> Posterior:
    """The posterior under normal priors of deviations `prior_sd` [D], by Newton's method from `start` [P].

    The other arguments as of `fit`; without a `start` from the mean of the prior.
    """
    centre = np.concatenate([np.zeros(left.shape[1]), [TIE_MEAN, BAR_MEAN]])
    precision = 1.0 / np.concatenate([prior_sd, [TIE_SD, BAR_SD]]) ** 2
    design = _design(left, right)  # [4, C, P]
    theta = centre if start is None else start
    value, gradient, curvature = log_posterior(design, answer, theta, centre, precision)
    for _ in range(NEWTON_STEPS):
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < CONVERGED:
            break
        size = 1.0
        while True:
            tried = log_posterior(design, answer, theta + size * step, centre, precision)
            if tried[0] >= value or size < SMALLEST_STEP:
                break
            size /= 2
        theta = theta + size * step
        value, gradient, curvature = tried
    covariance = np.linalg.inv(curvature)
    return Posterior(theta, (covariance + covariance.T) / 2)


def probabilities(posterior: Posterior, phi: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Probability of each of the four answers about pairs of clips, averaged over the posterior, float64 [C, 4].

    phi         : coordinates of N clips, float64 [N, D]
    left, right : rows of the pairs, int64 [C]
    """
    return _predictive(posterior, phi, left, right)[0]


def information(posterior: Posterior, phi: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Nats that an answer about each pair is expected to tell about the weights, float64 [C]; arguments as above.

    The mutual information of answer and utilities: the entropy of the averaged answer less the average entropy (Houlsby
    et al. 2011, arXiv 1112.5745), by Gauss-Hermite quadrature over the difference and the mean of the two utilities; t
    and b are taken at their means.
    """
    averaged, entropy = _predictive(posterior, phi, left, right)
    return _entropy(averaged) - entropy


@numba.njit(cache=True, nogil=True)
def _fill_utility(
    phi: np.ndarray, weights: np.ndarray, covariance: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> None:
    """Mean and variance of each clip's utility, the same to the last bit whichever clips are beside it."""
    for n in range(len(phi)):
        row = phi[n]
        mean[n], variance[n] = 0.0, 0.0
        for d in range(len(row)):
            mean[n] += row[d] * weights[d]
            along = 0.0
            for e in range(len(row)):
                along += covariance[d, e] * row[e]
            variance[n] += row[d] * along


def _predictive(
    posterior: Posterior, phi: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Averaged probabilities [C, 4], and the average of the answer's entropy [C]."""
    weights, covariance = posterior.weights
    utility, joint = phi @ weights, phi @ covariance @ phi.T
    own = np.diag(joint)
    var_apart = np.maximum(own[left] + own[right] - 2 * joint[left, right], 1e-12)
    shared = (own[left] - own[right]) / 2  # covariance of the difference and the level, the mean of the two
    var_level = np.maximum((own[left] + own[right] + 2 * joint[left, right]) / 4 - shared**2 / var_apart, 0.0)
    apart = np.sqrt(var_apart)[:, None, None] * APART_POINTS[None, :, None]
    level = ((utility[left] + utility[right]) / 2)[:, None, None] + (shared / var_apart)[:, None, None] * apart
    level = level + np.sqrt(var_level)[:, None, None] * LEVEL_POINTS[None, None, :]  # [C, Q, Q]
    apart = (utility[left] - utility[right])[:, None, None] + apart
    tie, bar = posterior.mean[-2:]
    p = _softmax(np.stack([level + apart / 2, level - apart / 2, level + tie, np.full(level.shape, bar)], axis=-1))
    return np.einsum("cqra,qr->ca", p, QUADRATURE), np.einsum("cqr,qr->c", _entropy(p), QUADRATURE)


def _design(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Derivative of each answer's logit by the parameters, float64 [4, C, P]."""
    c, d = left.shape
    design = np.zeros((4, c, d + 2))
    design[LEFT, :, :d], design[RIGHT, :, :d] = left, right
    design[EQUAL, :, :d], design[EQUAL, :, d] = (left + right) / 2, 1.0
    design[BOTH_BAD, :, d + 1] = 1.0
    return design


def log_posterior(
    design: np.ndarray, answer: np.ndarray, theta: np.ndarray, centre: np.ndarray, precision: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Logarithm of likelihood times prior up to a constant, its gradient [P], and minus its Hessian [P, P]."""
    p = _softmax((design @ theta).T)  # [C, 4]
    rows = np.arange(len(answer))
    off = theta - centre
    value = np.log(np.maximum(p[rows, answer], 1e-300)).sum() - (precision * off**2).sum() / 2
    weighted = p.T[:, :, None] * design
    expected = weighted.sum(axis=0)
    gradient = (design[answer, rows] - expected).sum(axis=0) - precision * off
    size = len(theta)
    curvature = weighted.reshape(-1, size).T @ design.reshape(-1, size) - expected.T @ expected + np.diag(precision)
    return float(value), gradient, curvature


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
