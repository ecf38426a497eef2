"""The reward `taste`: what a listener likes, learnt from choices between two clips.

Shape letters: N clips, F features, D coordinates (features, squares and products of named ones).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file, write_atomic
from fastsmart.reward.base import Clips, Surroundings, heard, unrendered
from fastsmart.reward.bradley_terry import BOTH_BAD, EQUAL, LEFT, RIGHT, Posterior, fit, information, probabilities
from fastsmart.reward.settings import RewardSettings
from fastsmart.reward.taste_features import LABELS, NOTE_FEATURES, Standard

FORMAT = "fastsmart taste 2"  # counts up whenever a feature, a coordinate or a column means something else
ANSWERS = {"left": LEFT, "right": RIGHT, "equal": EQUAL, "both_bad": BOTH_BAD}
SCALE = 0.5  # of a weight before any choice, logits a standard deviation of its feature
CURVED_SCALE = 0.05  # of a square or a product of features: with 0.15 the first questions are about these
ENOUGH = 20.0  # winnings that leave no doubt: one in twenty listeners who answer at random has them, at most
LOWEST = 8.0  # standard deviations of the base's scores below their mean: the score of an empty clip


class Comparison(Protocol):
    """Fields that `Taste.fit` reads of a choice (see `fastsmart.taste.choices.Choice`)."""

    @property
    def id(self) -> str: ...
    @property
    def left(self) -> str: ...
    @property
    def right(self) -> str: ...
    @property
    def choice(self) -> str: ...


@dataclass(frozen=True)
class Effect:
    """Finding of a taste about one feature.

    name           : of the feature, a key of `LABELS`
    low, high      : what little and much of it is called
    effect         : how much utility goes with a standard deviation more of it among the base's clips, in units of the
                     utility's own standard deviation: -1 .. 1, a correlation
    certainty      : probability that the effect has this sign, 0.5 .. 1
    """

    name: str
    low: str
    high: str
    effect: float
    certainty: float

    @property
    def liked(self) -> str:
        """The end of the scale that is liked."""
        return self.high if self.effect > 0 else self.low


@dataclass(frozen=True)
class Taste:
    """A listener's utility of clips, and how sure it is.

    standard    : of the base's clips; a clip's utility is in logits from the mean of these
    posterior   : of the weights of the D coordinates
    curved      : whether the coordinates hold squares and products beside the features
    choices     : how many the taste has been learnt from
    predictions : for each of these that had a better side, by its id, the side that the taste before it expected, the
                  side that was chosen, and the probability that the taste gave to the side it expected
    """

    standard: Standard
    posterior: Posterior
    curved: bool = False
    choices: int = 0
    predictions: tuple[tuple[str, str, str, float], ...] = ()

    @staticmethod
    def fit(
        choices: Sequence[Comparison],
        vectors: Mapping[str, np.ndarray],
        standard: Standard,
        before: Taste | None = None,
        curved: bool = True,
    ) -> Taste:
        """The taste that the choices speak of, in whatever order they were made.

        choices : that stand (see `fastsmart.taste.standing`), of one listener, or of several for a joint taste
        vectors : `features` [F] of each clip by its id, not standardised
        before  : the taste of the choices before; what it expected of the new ones counts for `agreement`
        curved  : whether squares and products of features count too: "of moderate speed", "high where it is fast"

        Raises UserError naming a clip without features.
        """
        kept = [c for c in choices if c.choice]
        z = {side: _gathered([getattr(c, side) for c in kept], vectors, standard) for side in ("left", "right")}
        answer = np.array([ANSWERS[c.choice] for c in kept], np.int64)
        curves = standard.named if curved else 0
        left, right = (_coordinates(z[side], curves) for side in ("left", "right"))
        posterior = fit(left, right, answer, _scales(len(standard.names), curves))
        return Taste(standard, posterior, curved, len(kept), _expected(kept, z, before))

    @staticmethod
    def unknown(standard: Standard) -> Taste:
        """The taste of a listener who has not chosen yet."""
        return Taste.fit([], {}, standard)

    def mean(self, table: np.ndarray) -> np.ndarray:
        """Expected utility of clips by their `features` [N, F], float64 [N]."""
        return self._utility(table)[0]

    def std(self, table: np.ndarray) -> np.ndarray:
        """Standard deviation of the utility of clips, float64 [N]; 0 for the mean clip of the base."""
        return self._utility(table)[1]

    def cautious(self, table: np.ndarray, caution: float) -> np.ndarray:
        """Mean utility less `caution` times its standard deviation, float64 [N]."""
        mean, std = self._utility(table)
        return mean - caution * std

    def probabilities(self, table: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Probability of the answers left, right, equal and both bad about pairs of clips, float64 [C, 4].

        table       : `features` [N, F]
        left, right : rows of the pairs, int64 [C]
        """
        return probabilities(self.posterior, self._phi(table), left, right)

    def information(self, table: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Nats that an answer about each pair is expected to tell, float64 [C]; arguments as of `probabilities`."""
        return information(self.posterior, self._phi(table), left, right)

    @property
    def agreement(self) -> float:
        """Share of choices with a better side that were predicted before they were seen; NaN before there is one."""
        return self.recent_agreement(len(self.predictions))

    def recent_agreement(self, last: int) -> float:
        """`agreement` over the last so many."""
        rows = self.predictions[-last:] if last else ()
        return float(np.mean([expected == chosen for _, expected, chosen, _ in rows])) if rows else math.nan

    @property
    def winnings(self) -> float:
        """What a stake of 1 has become, bet at even odds on the sides it expected: one half of it by the probabilities
        it gave, the other half by probabilities half as far from 1/2 (Kelly 1956), which also wins by a taste that is
        too sure. By answers at random it comes to `ENOUGH` in one of 20 cases at most, however many there are (Ville
        1939; Shafer 2021)."""
        expected, came = self._foretold()
        stakes = np.array([[0.5], [1.0]]) * expected
        grown = np.log(np.maximum(1 + stakes * came, 1e-300)).sum(axis=1)
        return float(np.exp(np.minimum(grown, 700.0)).mean())  # no float holds e^710

    @property
    def borne_out(self) -> float:
        """How much of what it foretold of choices came true, 0 .. 1: the slope of what was chosen (1 the side it
        expected, -1 the other) on what it expected (twice the probability, less 1), by ridge regression, times such
        part of `ENOUGH` as there is in `winnings`. Of answers at random it is 0 or little, however sure the taste is
        of itself."""
        expected, came = self._foretold()
        slope = float(np.clip(expected @ came / (expected @ expected + 1), 0.0, 1.0))
        return slope * min(1.0, self.winnings / ENOUGH)

    def _foretold(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each prediction twice its probability, less 1; and whether it came true, 1 or -1."""
        expected = np.array([2 * p - 1 for *_, p in self.predictions])
        came = np.array([1.0 if foretold == chosen else -1.0 for _, foretold, chosen, _ in self.predictions])
        return expected, came

    def explained(self) -> list[Effect]:
        """Effect of each feature on what it thinks is liked, the most certain first."""
        z = self.standard.clips
        phi = _coordinates(z, self._curves)
        weights, covariance = self.posterior.weights
        apart = phi - phi.mean(axis=0)
        slope = (z - z.mean(axis=0)).T @ apart / len(z)  # [F, D]: covariance of a feature and the coordinates
        # of the utility, its uncertain part included, so that a taste that knows nothing claims nothing
        unit = math.sqrt(((apart @ weights) ** 2).mean() + ((apart @ covariance) * apart).sum() / len(z))
        unit = np.maximum(z.std(axis=0), 1e-9) * max(unit, 1e-9)
        mean = slope @ weights / unit
        sd = np.sqrt(np.maximum(((slope @ covariance) * slope).sum(axis=1), 1e-18)) / unit
        effects = [
            Effect(name, *LABELS.get(name, ("less", "more")), float(m), 0.5 + 0.5 * math.erf(abs(m) / s / math.sqrt(2)))
            for name, m, s in zip(self.standard.names, mean, sd, strict=True)
        ]
        return sorted(effects, key=lambda e: (-e.certainty, e.name))

    def save(self, path: str | Path) -> None:
        """Write as JSON; raises UserError when the file cannot be written."""
        p = len(self.posterior.mean)
        content = {
            "format": FORMAT,
            "standard": self.standard.to_dict(),
            "mean": self.posterior.mean.tolist(),
            "covariance": self.posterior.covariance[np.tril_indices(p)].tolist(),
            "curved": self.curved,
            "choices": self.choices,
            "predictions": [list(row) for row in self.predictions],
        }
        write_atomic(path, json.dumps(content) + "\n")

    @staticmethod
    def load(path: str | Path) -> Taste:
        """Read what `save` wrote; raises UserError naming the file when it is missing, broken or of another kind."""
        remedy = "learn it anew with fastsmart live --replay choices.jsonl"
        try:
            content = json.loads(read_file(path).decode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the taste {path}: {error.strerror}; {remedy}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); {remedy}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} does not hold a taste ({FORMAT!r}); {remedy}")
        try:
            return _checked(content)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); {remedy}") from error

    @property
    def needs_audio(self) -> bool:
        """Whether its features are heard, not only read."""
        return self.standard.heard

    def _phi(self, table: np.ndarray) -> np.ndarray:
        return _coordinates(self.standard(table), self._curves)

    @property
    def _curves(self) -> int:
        """How many features, the first ones, have squares and products."""
        return self.standard.named if self.curved else 0

    def _utility(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.posterior.utility(self._phi(table))


class TasteReward:
    """A listener's taste: the expected utility of a clip less a multiple of its standard deviation.

    In units of the standard deviation of the base's clips, whose mean is 0. Features count up to four standard
    deviations from the base's mean, so that it is bounded; an empty clip has the least there is, -8.

    Hacked by extremes: a taste learnt among the base's clips knows nothing of stranger ones, and goes on in a straight
    line. `taste_caution` takes away what it is not sure of, which grows with the distance from clips that were
    compared; the KL term to the base, and more choices about the new clips, hold against the rest. It hears features,
    not form or sense.
    """

    name = "taste"

    def __init__(self, taste: str | Path | Taste, caution: float = 1.0) -> None:
        self.taste = taste if isinstance(taste, Taste) else Taste.load(taste)
        self.caution = caution
        base = self.taste.posterior.utility(_coordinates(self.taste.standard.clips, self.taste._curves))
        scores = base[0] - caution * base[1]
        self.centre, self.unit = float(scores.mean()), max(float(scores.std()), 1e-6)

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> TasteReward:
        if not settings.taste:
            raise UserError("reward.terms.taste needs the file of a taste; name it in reward.taste")
        return cls(settings.taste, settings.taste_caution)

    @property
    def needs_audio(self) -> bool:
        return self.taste.needs_audio

    def __call__(self, clips: Clips) -> np.ndarray:
        audio = heard(clips, self.name) if self.needs_audio else None
        scores = self.taste.cautious(self.taste.standard.measure(clips.notes, audio), self.caution)
        values = np.maximum((scores - self.centre) / self.unit, -LOWEST).astype(np.float32)
        values[clips.notes.counts == 0] = -LOWEST
        if audio is not None:
            values[unrendered(audio)] = np.nan
        return values


def _gathered(ids: Sequence[str], vectors: Mapping[str, np.ndarray], standard: Standard) -> np.ndarray:
    """Standardised features of the named clips, float64 [C, F]."""
    if missing := next((name for name in ids if name not in vectors), ""):
        raise UserError(f"a choice is about the clip {missing}, which is not there; put its file back into clips/")
    rows = [np.asarray(vectors[name], np.float64) for name in ids]
    return standard(np.stack(rows)) if rows else np.zeros((0, len(standard.names)))


def _coordinates(z: np.ndarray, curves: int) -> np.ndarray:
    """Features [N, F], then of the first `curves` of them (z² - 1) / √2 of each, products of every two: [N, D]."""
    if not curves:
        return z
    rows, columns = np.triu_indices(curves, 1)
    return np.concatenate([z, (z[:, :curves] ** 2 - 1) / math.sqrt(2), z[:, rows] * z[:, columns]], axis=1)


def _scales(f: int, curves: int) -> np.ndarray:
    """Scale of each weight before any choice, float64 [D]."""
    return np.concatenate([np.full(f, SCALE), np.full(curves * (curves + 1) // 2, CURVED_SCALE)])


def _expected(
    choices: Sequence[Comparison], z: Mapping[str, np.ndarray], before: Taste | None
) -> tuple[tuple[str, str, str, float], ...]:
    """`Taste.predictions`: those known before, and for choices made since what `before` says."""
    if before is None:
        return ()
    known = {row[0]: row for row in before.predictions}
    new = [i for i, c in enumerate(choices) if c.id not in known and c.choice in ("left", "right")]
    phi = np.concatenate([_coordinates(z[side][new], before._curves) for side in ("left", "right")])
    better = (phi[: len(new)] - phi[len(new) :]) @ before.posterior.mean[: phi.shape[1]]
    left = probabilities(before.posterior, phi, *np.arange(2 * len(new)).reshape(2, -1))[:, :2]
    for i, gain, p in zip(new, better, left[:, 0] / left.sum(axis=1), strict=True):
        c = choices[i]
        known[c.id] = (c.id, "left" if gain > 0 else "right" if gain < 0 else "", c.choice, float(max(p, 1 - p)))
    return tuple(known[c.id] for c in choices if c.id in known)


def _checked(content: dict[str, Any]) -> Taste:
    standard = Standard.from_dict(content["standard"])
    curved = bool(content["curved"])
    p = _coordinates(np.zeros((1, len(standard.names))), standard.named if curved else 0).shape[1] + 2
    mean, lower = np.array(content["mean"], np.float64), np.array(content["covariance"], np.float64)
    if mean.shape != (p,) or lower.shape != (p * (p + 1) // 2,):
        raise ValueError(f"{mean.size} and {lower.size} numbers for {p} weights")
    if not np.isfinite(mean).all() or not np.isfinite(lower).all():
        raise ValueError("weights that are no numbers")
    covariance = np.zeros((p, p))
    covariance[np.tril_indices(p)] = lower
    covariance = covariance + np.tril(covariance, -1).T
    if np.linalg.eigvalsh(covariance).min() < -1e-9:
        raise ValueError("a covariance that no distribution has")
    if standard.names[: standard.named] not in (tuple(NOTE_FEATURES), tuple(LABELS)):
        raise ValueError("features that this version of fastsmart does not have")
    predictions = tuple((str(a), str(b), str(c), float(p)) for a, b, c, p in content["predictions"])
    if not all(0 <= p <= 1 for *_, p in predictions):
        raise ValueError("a probability outside 0 .. 1")
    return Taste(standard, Posterior(mean, covariance), curved, int(content["choices"]), predictions)
