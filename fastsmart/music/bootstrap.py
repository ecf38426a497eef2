"""Confidence in a number: percentile intervals of a paired bootstrap over openings.

Outputs of one opening are alike, so a resample draws openings, and with each all outputs of it (Davison and Hinkley
1997, section 3.8). Every policy answers the same numbered prompts with the same random numbers, so every metric of
every policy is computed on that same draw: the interval of a difference is that of paired data (Efron and Tibshirani
1993, chapters 8 and 13). Metrics that are means over outputs, or over pairs of outputs, are computed from the weights
of a draw, without copying data. Where all outputs are of one opening, outputs are drawn: the interval is then one for
that opening.

Shape letters: B resamples, N outputs, G openings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
JACKKNIFE_GROUPS = 20
FEW_OPENINGS = 20  # below it intervals tend to be too narrow


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


def basis(outputs: int, openings: int) -> str:
    """Basis of numbers with intervals, in words, such as `64 outputs on 64 held-out openings; ...`."""
    drawn = f"{openings} openings"
    if openings == 1:
        drawn = "outputs, as all are of one opening, and say nothing about others"
    elif openings < FEW_OPENINGS:
        drawn += ", so few that the intervals are too narrow"
    on = f"{outputs} outputs on {openings} held-out opening{'' if openings == 1 else 's'}"
    return f"{on}; {100 * LEVEL:.0f} % bootstrap intervals over {drawn}"


def drawn_units(opening: np.ndarray) -> np.ndarray:
    """Cluster of each output, drawn together, int64 [N] from 0 up: those of one opening; each alone if all are of one.

    opening : [N], equal for outputs of one opening
    """
    unit = np.unique(opening, return_inverse=True)[1]
    return unit if unit.max(initial=0) > 0 else np.arange(len(unit))


def resample_weights(opening: int | np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Count of each output in each resample, float32 [B + 1, N]; row 0 is the data itself, once each.

    G - 1 of G openings are drawn: so the variance of a mean over openings has no bias (McCarthy and Snowden 1985, "The
    bootstrap and finite population sampling"); drawing G it would be too small by a factor of (G - 1) / G.

    opening : [N], equal for outputs of one opening; an int stands for as many outputs, each of an opening of its own
    """
    unit = np.arange(opening) if isinstance(opening, int) else drawn_units(opening)
    units = int(unit.max()) + 1
    drawn = max(units - 1, 1)
    times = np.random.default_rng(seed).multinomial(drawn, np.full(units, 1 / units), resamples)
    return np.concatenate([np.ones((1, len(unit)), np.float32), times[:, unit].astype(np.float32)])


def mean_draws(values: np.ndarray, weights: np.ndarray) -> Draws:
    """The mean of values [N], NaN left out."""
    known = np.isfinite(values)
    total = weights @ np.where(known, values, 0.0)
    with np.errstate(invalid="ignore"):
        means = total / (weights @ known.astype(np.float64))
    return Draws(float(means[0]), means[1:])


def effect_draws(before: np.ndarray, after: np.ndarray, weights: np.ndarray) -> Draws:
    """The change of the mean in standard deviations of before (Glass's delta); of both, [N], NaN is left out.

    The standard deviation is that of each resample: it is an estimate too.
    """
    known = np.isfinite(before)
    values = np.where(known, before, 0.0)
    count = weights @ known.astype(np.float64)
    correction = known.sum() / max(known.sum() - 1, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = weights @ values / count
        shifted = np.where(known, before - mean[0], 0.0)
        variance = (weights @ shifted**2 / count - (weights @ shifted / count) ** 2) * correction
        rest = np.isfinite(after)
        change = weights @ np.where(rest, after, 0.0) / (weights @ rest.astype(np.float64)) - mean
        effect = change / np.sqrt(np.maximum(variance, 0.0))
    return Draws(float(effect[0]), effect[1:])


def pair_draws(
    distance: np.ndarray, pairs: np.ndarray, weights: np.ndarray, opening: np.ndarray | None = None
) -> Draws:
    """The mean distance over chosen pairs of outputs: a U-statistic, in which no output is paired with itself.

    distance : [N, N], symmetric with zeros on the diagonal
    pairs    : bool [N, N], symmetric and false on the diagonal, which pairs count; NaN where there are none
    opening  : of each output, as the weights were drawn by; None: each output has one of its own. An opening drawn
               twice brings its pairs twice, and is not paired with its copy
    """
    unit = np.arange(len(distance)) if opening is None else drawn_units(opening)
    together = unit[:, None] == unit[None, :]

    def summed(values: np.ndarray) -> np.ndarray:
        apart = np.where(together, 0, values).astype(np.float32)
        across = np.einsum("bn,bn->b", weights @ apart, weights, dtype=np.float64)
        return across + weights @ np.where(together, values, 0).sum(axis=1, dtype=np.float64)

    with np.errstate(invalid="ignore"):
        means = summed(distance * pairs) / summed(pairs)
    return Draws(float(means[0]), means[1:])


def kept_by_jackknife(opening: np.ndarray, seed: int) -> list[np.ndarray]:
    """The numbers of the outputs that stay when each group of openings is left out, at most `JACKKNIFE_GROUPS` arrays.

    opening : [N], equal for outputs of one opening
    """
    unit = drawn_units(opening)
    units = int(unit.max()) + 1
    groups = np.array_split(np.random.default_rng(seed).permutation(units), min(JACKKNIFE_GROUPS, units))
    return [np.flatnonzero(~np.isin(unit, group)) for group in groups if len(group) < units]


def jackknife_draws(value: float, without: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Draws:
    """A metric that repeated outputs would distort, with draws from its delete-a-group jackknife.

    The draws are means of resampled pseudo-values (Efron and Tibshirani 1993, section 11.5), centred on the value. With
    one seed the same groups are drawn for every policy, so that differences are paired.

    without : float64 [groups], the metric with each group of openings left out; the groups partition the openings
    """
    groups = len(without)
    pseudo = groups * value - (groups - 1) * without
    drawn = np.random.default_rng(seed).integers(groups, size=(resamples, groups))
    return Draws(value, value + pseudo[drawn].mean(axis=1) - pseudo.mean())
