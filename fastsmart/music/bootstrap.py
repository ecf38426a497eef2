"""How sure a number is: percentile intervals of a paired bootstrap over prompts.

Every policy answers the same numbered prompts with the same random numbers, so one resample draws prompt numbers, and
every metric of every policy is computed on that same draw: the interval of a difference is that of paired data
(Efron and Tibshirani 1993, chapters 8 and 13). Metrics that are means over outputs, or over pairs of outputs, are
computed from the weights of a draw, without copying data.

Shape letters: B resamples, N prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
JACKKNIFE_GROUPS = 20


@dataclass(frozen=True)
class Estimate:
    """A number and its interval of level `LEVEL`; `low` and `high` are NaN where there is no interval."""

    value: float
    low: float
    high: float

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Draws:
    """A metric on the data (`value`) and on each resample (`draws`, float64 [B])."""

    value: float
    draws: np.ndarray

    def estimate(self) -> Estimate:
        """The value with its percentile interval."""
        known = self.draws[np.isfinite(self.draws)]
        if not np.isfinite(self.value) or not len(known):
            return Estimate(self.value, float("nan"), float("nan"))
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(known, [tail, 1 - tail])
        return Estimate(self.value, float(low), float(high))

    def minus(self, other: Draws) -> Draws:
        """The difference of two metrics on the same resamples."""
        return Draws(self.value - other.value, self.draws - other.draws)


def resample_weights(n: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of n prompts is in each resample, float32 [B, N]; row 0 is the data itself, once each."""
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(np.float32)
    return np.concatenate([np.ones((1, n), np.float32), weights])


def mean_draws(values: np.ndarray, weights: np.ndarray) -> Draws:
    """The mean of values [N], NaN left out."""
    known = np.isfinite(values)
    total = weights @ np.where(known, values, 0.0)
    with np.errstate(invalid="ignore"):
        means = total / (weights @ known.astype(np.float64))
    return Draws(float(means[0]), means[1:])


def pair_draws(distance: np.ndarray, pairs: np.ndarray, weights: np.ndarray) -> Draws:
    """The mean distance over chosen pairs of outputs: a U-statistic, in which no output is paired with itself.

    distance : [N, N], symmetric with zeros on the diagonal
    pairs    : bool [N, N], symmetric and false on the diagonal, which pairs count; NaN where there are none
    """
    chosen = pairs.astype(np.float32)
    total = np.einsum("bn,bn->b", weights @ (distance * chosen).astype(np.float32), weights, dtype=np.float64)
    count = np.einsum("bn,bn->b", weights @ chosen, weights, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        means = total / count
    return Draws(float(means[0]), means[1:])


def jackknife_draws(value: float, without: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Draws:
    """A metric that repeated outputs would distort, with draws from its delete-a-group jackknife.

    The draws are means of resampled pseudo-values (Efron and Tibshirani 1993, section 11.5), centred on the value. With
    one seed the same groups are drawn for every policy, so that differences are paired.

    without : float64 [groups], the metric with each group of prompts left out; the groups partition the prompts
    """
    groups = len(without)
    pseudo = groups * value - (groups - 1) * without
    drawn = np.random.default_rng(seed).integers(groups, size=(resamples, groups))
    return Draws(value, value + pseudo[drawn].mean(axis=1) - pseudo.mean())
