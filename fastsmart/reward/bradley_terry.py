"""Utilities from choices between two: Bradley and Terry's model with ties and "both bad", in its Bayesian form.

A clip with coordinates φ has the utility u = w · φ. Between clips l and r a listener answers

    left      with probability proportional to  exp(u_l)
    right                                       exp(u_r)
    equal                                       exp(t + (u_l + u_r) / 2)     Davidson 1970, J. Am. Stat. Assoc. 65
    both bad                                    exp(b)                       the outside option of a multinomial logit:
                                                                             McFadden 1974, in Frontiers in Econometrics

so that two clips are "both bad" where both lie below the bar b, and an answer says something about how good clips are,
not only which is better. Without ties and the bar it is Bradley and Terry (1952, Biometrika 39). The prior of w, t and
b is normal; the posterior is taken as normal around its mode (Laplace), whose logarithm is concave, so that there is
one mode whatever the order of the choices.

Shape letters: C choices, D coordinates, P = D + 2 parameters (w, t, b), Q quadrature points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEFT, RIGHT, EQUAL, BOTH_BAD = range(4)
TIE_MEAN, TIE_SD = -1.0, 1.0  # prior of t: every seventh pair of equally good clips is called equal
BAR_MEAN, BAR_SD = -2.0, 2.0  # prior of b, in logits from the mean clip of the base
NEWTON_STEPS = 100
CONVERGED = 1e-10
POINTS, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass(frozen=True)
class Posterior:
    """Normal posterior of the parameters of one listener.

    mean       : float64 [P]: D weights, then t and b
    covariance : float64 [P, P]
    evidence   : logarithm of the marginal likelihood of the choices (Laplace)
    """

    mean: np.ndarray
    covariance: np.ndarray
    evidence: float

    def utility(self, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the utility of clips, float64 [N] each, from coordinates [N, D]."""
        d = phi.shape[1]
        variance = np.einsum("nd,de,ne->n", phi, self.covariance[:d, :d], phi)
        return phi @ self.mean[:d], np.sqrt(np.maximum(variance, 0.0))


def fit(left: np.ndarray, right: np.ndarray, answer: np.ndarray, prior_sd: np.ndarray) -> Posterior:
    """The posterior after C answers, by Newton's method from the mean of the prior.

    left, right : coordinates of the two clips, float64 [C, D]
    answer      : int64 [C], LEFT, RIGHT, EQUAL or BOTH_BAD
    prior_sd    : standard deviation of each weight before any choice, float64 [D]; their mean is 0
    """
    centre = np.concatenate([np.zeros(left.shape[1]), [TIE_MEAN, BAR_MEAN]])
    precision = 1.0 / np.concatenate([prior_sd, [TIE_SD, BAR_SD]]) ** 2
    design = _design(left, right)  # [4, C, P]
    theta = centre.copy()
    value, gradient, curvature = _log_posterior(design, answer, theta, centre, precision)
    for _ in range(NEWTON_STEPS):
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < CONVERGED:
            break
        size = 1.0
        while True:
            tried = _log_posterior(design, answer, theta + size * step, centre, precision)
            if tried[0] >= value or size < 1e-6:
                break
            size /= 2
        theta = theta + size * step
        value, gradient, curvature = tried
    covariance = np.linalg.inv(curvature)
    log_volume = np.linalg.slogdet(curvature)[1] - np.log(precision).sum()
    return Posterior(theta, (covariance + covariance.T) / 2, float(value - log_volume / 2))


def probabilities(posterior: Posterior, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Probability of each of the four answers, averaged over the posterior, float64 [C, 4]."""
    return _predictive(posterior, left, right)[0]


def information(posterior: Posterior, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """What an answer about each pair is expected to tell about the weights, in nats, float64 [C].

    The mutual information of answer and utilities: the entropy of the averaged answer less the average entropy (Houlsby
    et al. 2011, arXiv 1112.5745), by Gauss-Hermite quadrature over difference and sum of the two utilities; t and b are
    taken at their means.
    """
    averaged, entropy = _predictive(posterior, left, right)
    return _entropy(averaged) - entropy


def _predictive(posterior: Posterior, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averaged probabilities [C, 4], and the average of the answer's entropy [C]."""
    d = left.shape[1]
    mean, covariance = posterior.mean[:d], posterior.covariance[:d, :d]
    apart, middle = left - right, (left + right) / 2
    spread_apart = apart @ covariance
    var_apart = np.maximum((spread_apart * apart).sum(axis=1), 1e-12)
    shared = (spread_apart * middle).sum(axis=1)
    var_middle = np.maximum(((middle @ covariance) * middle).sum(axis=1) - shared**2 / var_apart, 0.0)
    # difference δ, and given δ the middle: [C, Q, Q]
    delta = np.sqrt(var_apart)[:, None, None] * POINTS[None, :, None]
    centre = (middle @ mean)[:, None, None] + (shared / var_apart)[:, None, None] * delta
    level = centre + np.sqrt(var_middle)[:, None, None] * POINTS[None, None, :]
    delta = np.broadcast_to((apart @ mean)[:, None, None] + delta, level.shape)
    tie, bar = posterior.mean[d], posterior.mean[d + 1]
    logits = np.stack([level + delta / 2, level - delta / 2, level + tie, np.full(level.shape, bar)], axis=-1)
    p = _softmax(logits)
    weight = WEIGHTS[:, None] * WEIGHTS[None, :]
    return np.einsum("cqra,qr->ca", p, weight), np.einsum("cqr,qr->c", _entropy(p), weight)


def _design(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Derivative of each answer's logit by the parameters, float64 [4, C, P]."""
    c, d = left.shape
    design = np.zeros((4, c, d + 2))
    design[LEFT, :, :d], design[RIGHT, :, :d] = left, right
    design[EQUAL, :, :d], design[EQUAL, :, d] = (left + right) / 2, 1.0
    design[BOTH_BAD, :, d + 1] = 1.0
    return design


def _log_posterior(
    design: np.ndarray, answer: np.ndarray, theta: np.ndarray, centre: np.ndarray, precision: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Logarithm of likelihood times prior up to a constant, its gradient [P], and minus its Hessian [P, P]."""
    p = _softmax((design @ theta).T)  # [C, 4]
    rows = np.arange(len(answer))
    off = theta - centre
    value = np.log(np.maximum(p[rows, answer], 1e-300)).sum() - (precision * off**2).sum() / 2
    expected = np.einsum("ca,acp->cp", p, design)
    gradient = (design[answer, rows] - expected).sum(axis=0) - precision * off
    curvature = np.diag(precision) - expected.T @ expected
    for a in range(4):
        curvature += (design[a] * p[:, a, None]).T @ design[a]
    return float(value), gradient, curvature


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
