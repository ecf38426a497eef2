"""The value of a prefix: the reward that a clip will have, as its notes so far tell.

Shape letters: P prefixes, F features, Q their constants, values and products.
"""

from __future__ import annotations

import numpy as np

STAGES = 24  # of a completion; each has a regression of its own, on prefixes of its stage and both neighbours
RIDGE = 0.15  # times the number of prefixes: weight of the squared coefficients of standardised features
CLIPPED_AT = 4.0  # standard deviations
FEWEST = 20  # prefixes of a stage that are worth a regression


class PrefixValue:
    """Ridge regression of the reward on features and their products, one at each stage of a completion.

    features : float64 [P, F]
    tokens   : int64 [P], of the completion so far
    reward   : float64 [P], of the whole clip, finite
    longest  : tokens of a completion at most

    With fewer than `FEWEST` prefixes at every stage its values are the mean reward.
    """

    def __init__(self, features: np.ndarray, tokens: np.ndarray, reward: np.ndarray, longest: int) -> None:
        self.longest, self.mean = longest, float(reward.mean()) if len(reward) else 0.0
        self._stages: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        place = tokens / longest * STAGES
        for stage in range(STAGES + 1):
            chosen = np.abs(place - stage) <= 1
            if chosen.sum() < FEWEST:
                continue
            centre, spread = features[chosen].mean(0), features[chosen].std(0) + 1e-6
            terms = _terms(features[chosen], centre, spread)
            square = terms.T @ terms
            square[np.diag_indices(len(square))] += RIDGE * len(terms)
            square[0, 0] -= RIDGE * len(terms)  # the constant is free
            self._stages[stage] = centre, spread, np.linalg.solve(square, terms.T @ (reward[chosen] - self.mean))

    def __call__(self, features: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Values of prefixes, float64 [P], between those of the two stages that each lies between."""
        values = np.full(len(features), self.mean)
        if not self._stages:
            return values
        known = np.array(sorted(self._stages))
        place = tokens / self.longest * STAGES
        lower = np.floor(place).astype(int)
        for stage in np.unique(np.concatenate([lower, lower + 1])):
            weight = np.where(lower == stage, 1 - (place - lower), np.where(lower + 1 == stage, place - lower, 0.0))
            chosen = weight > 0
            if chosen.any():
                centre, spread, slope = self._stages[int(known[np.abs(known - stage).argmin()])]
                values[chosen] += weight[chosen] * (_terms(features[chosen], centre, spread) @ slope)
        return values


class CrossFittedValue:
    """Values of prefixes of N clips, each by a regression on clips of other prompts.

    fold     : int [N], of the clips
    features, tokens, reward : of prefixes to fit to, [P, F], [P] and [P], as of `PrefixValue`
    fitted   : int [P], fold of each of them, -1 for none; a clip is judged by prefixes that are not of its own fold, or
               by all where all are of that
    """

    def __init__(
        self, fold: np.ndarray, features: np.ndarray, tokens: np.ndarray, reward: np.ndarray, fitted: np.ndarray,
        longest: int,
    ) -> None:  # fmt: skip
        self.fold = fold
        self._values: dict[int, PrefixValue] = {}
        for left_out in np.unique(fold):
            fits = fitted != left_out
            if not fits.any():
                fits[:] = True
            self._values[int(left_out)] = PrefixValue(features[fits], tokens[fits], reward[fits], longest)

    def __call__(self, clip: np.ndarray, features: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Values float64 [P] of prefixes of these clips [P]."""
        values = np.zeros(len(clip))
        for fold, value in self._values.items():
            judged = self.fold[clip] == fold
            values[judged] = value(features[judged], tokens[judged])
        return values


def without(reward: np.ndarray, features: np.ndarray, share: float = 1.0) -> np.ndarray:
    """The rewards [N] less a share of what features [N, F] foretell of them; with all of it, the residuals of least
    squares on the standardised features and their products, about the mean of the rewards. Rewards that are not finite
    stay so."""
    known = np.isfinite(reward)
    if known.sum() < FEWEST or not np.ptp(reward[known]):  # of a constant only rounding would be left
        return reward
    terms = _terms(features[known], features[known].mean(0), features[known].std(0) + 1e-6)
    foretold = terms @ np.linalg.lstsq(terms, reward[known], rcond=None)[0]
    kept = reward.copy()
    kept[known] += share * (reward[known].mean() - foretold)
    return kept


def explained(values: np.ndarray, reward: np.ndarray) -> float:
    """Share of the variance of the reward that values explain (R²), NaN where the reward has none."""
    variance = float(reward.var()) if len(reward) else 0.0
    return 1.0 - float(((reward - values) ** 2).mean()) / variance if variance else float("nan")


def _terms(features: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """One, the standardised features, and their products, [P, Q]."""
    unit = np.clip((features - centre) / spread, -CLIPPED_AT, CLIPPED_AT)
    first, second = np.triu_indices(unit.shape[1])
    return np.column_stack([np.ones(len(unit)), unit, unit[:, first] * unit[:, second]])
