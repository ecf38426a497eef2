"""Simulated listeners with a hidden utility, to test what is learnt of them.

Shape letters: N clips, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fastsmart.reward.taste_features import Standard
from fastsmart.taste.choices import ANSWERS

SHARPNESS = 4.0  # logits a standard deviation of the utility: nine in ten decisive answers are for the better clip
TIE = -1.0  # every seventh pair of equally good clips is called equal
BAR = -1.5  # standard deviations of the utility: two clips far below it are called bad
Columns = Callable[[str], np.ndarray]

# name -> utility of clips, up to its scale, from the standardised features by name
HIDDEN: Mapping[str, Callable[[Columns], np.ndarray]] = {
    "slow, sparse, low": lambda of: -of("pace") - of("density") - of("register"),
    "fast, loud, dense": lambda of: of("pace") + of("loudness") + of("density"),
    "fast where high": lambda of: of("register") * of("pace") + 0.5 * of("loudness"),  # which no linear model has
    "at random": lambda of: np.zeros_like(of("pace")),
}


@dataclass(frozen=True)
class Listener:
    """A listener who answers by a hidden utility, with noise.

    standard  : of the base's clips
    hidden    : a key of `HIDDEN`
    sharpness : standard deviation of the utility over the base's clips, logits; the larger, the less noise
    """

    standard: Standard
    hidden: str
    sharpness: float = SHARPNESS

    def utility(self, table: np.ndarray) -> np.ndarray:
        """Hidden utility of clips from `features` [N, F], logits from the mean of the base's, float64 [N]."""
        base, own = self._raw(self.standard.clips), self._raw(self.standard(table))
        spread = base.std()
        return self.sharpness * (own - base.mean()) / spread if spread > 0 else np.zeros(len(own))

    def probabilities(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Probability of the answers of `ANSWERS` about pairs of clips with these utilities [N], float64 [N, 4]."""
        bar = BAR * self.sharpness if self._raw(self.standard.clips).std() > 0 else -np.inf
        logits = np.stack([left, right, TIE + (left + right) / 2, np.full(len(left), bar)], axis=1)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def answer(self, left: np.ndarray, right: np.ndarray, random: np.random.Generator) -> str:
        """An answer about two clips by their features [F]."""
        u = self.utility(np.stack([left, right]))
        return ANSWERS[random.choice(len(ANSWERS), p=self.probabilities(u[:1], u[1:])[0])]

    def _raw(self, z: np.ndarray) -> np.ndarray:
        return HIDDEN[self.hidden](lambda name: z[:, self.standard.names.index(name)])
