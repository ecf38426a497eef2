"""Reward against diversity of everything that evaluations hold, and what of both is retained.

A policy trained for reward is worth having where it lies beyond what choosing among the untrained policy's outputs
reaches. So all of it stands side by side: policies, blends of their weights, best of n, and the re-weighting frontier
(`fastsmart.study.choosing`). Two shares make points comparable: of the reward gain of one policy, the full one, how
much a point has (base 0, full 1); and of the base's diversity, how much is left. Points are never joined: between two
of them nothing has been measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.text_table import text_table
from fastsmart.music.bootstrap import Estimate
from fastsmart.music.rarefied import COMPARED
from fastsmart.study.choosing import MEAN_DISTANCE
from fastsmart.study.evaluation import Evaluation, Metric, estimate

Kind = Literal["base", "policy", "blend", "best of n", "re-weighting"]
MEASURES = ("rarefied_effective_outputs", "rarefied_effective_embeddings_order_2")
REFERENCE = (0.0, 0.5)  # shares of reward gain and of diversity below which a point adds nothing to the hypervolume
KEPT = 0.9  # of the one share, where the most of the other is looked for
UNKNOWN = float("nan")
_GROUPS: dict[str, Kind] = {
    "policies": "policy",
    "blends": "blend",
    "best of n": "best of n",
    "re-weighting": "re-weighting",
}
_DISTANCES = tuple(f"rarefied_{name}_distance_across" for name in COMPARED)


@dataclass(frozen=True)
class Point:
    """A point of the frontier.

    diversity : by measure; a re-weighting has a value of the measure it was made for only
    """

    label: str
    kind: Kind
    reward: Estimate
    diversity: dict[str, Estimate]


class Retained(NamedTuple):
    """Shares of the full policy's reward gain and of the base's diversity; NaN where unknown."""

    reward: float
    diversity: float


@dataclass(frozen=True)
class Frontier:
    """Points of one or several evaluations; the first is the base.

    measures : names of diversity metrics
    full     : the point whose reward gain is 1
    openings : distinct prompts behind every point
    """

    points: list[Point]
    measures: tuple[str, ...]
    full: Point
    openings: int

    @staticmethod
    def of(evaluations: Sequence[Evaluation], measures: Sequence[str] = MEASURES, full: str = "") -> Frontier:
        """All points of these evaluations.

        full : label of the policy with the full reward gain; "" = the one with the most reward

        Raises UserError where the evaluations asked different questions, one lacks a measure, or has the base alone.
        """
        first = evaluations[0]
        for other in evaluations[1:]:
            _require_one_question(first, other)
        found = _points(first, measures)
        for evaluation in evaluations[1:]:
            known = {repr(point) for point in found}  # best of n and re-weighting may be the same in all
            for point in _points(evaluation, measures)[1:]:
                if repr(point) not in known:
                    twice = point.kind != "re-weighting" and point.label in {p.label for p in found}
                    found.append(replace(point, label=f"{evaluation.path.name}: {point.label}") if twice else point)
        return Frontier(found, tuple(measures), _full(found, full), first.record["distinct_prompts"])

    @property
    def base(self) -> Point:
        """The point that all others are compared with."""
        return self.points[0]

    def retained(self, point: Point, measure: str) -> Retained:
        """Shares that a point has of the full policy's gain, NaN where that is none, and of the base's diversity."""
        base = self.base
        whole = self.full.reward.value - base.reward.value
        gain = (point.reward.value - base.reward.value) / whole if whole > 0 else UNKNOWN
        return Retained(gain, point.diversity[measure].value / base.diversity[measure].value)

    def of_kind(self, *kinds: Kind) -> list[Point]:
        """The points of these kinds."""
        return [point for point in self.points if point.kind in kinds]

    def text(self) -> str:
        """Every point, the hypervolume of each kind of point, and the two readings, for a terminal."""
        head = ["", "reward", "of the gain"]
        for measure in self.measures:
            head += [words(measure), "of the base"]
        rows = [head]
        for point in self.points:
            row = [point.label, _interval(point.reward), _share(self.retained(point, self.measures[0]).reward)]
            for measure in self.measures:
                row += [_interval(point.diversity[measure]), _share(self.retained(point, measure).diversity)]
            rows.append(row)
        lines = [text_table(rows)]
        lines += ["", f"full gain: {self.full.label}; all on {self.openings} held-out openings"]
        for measure in self.measures:
            lines += ["", f"{words(measure)}:", *self._readings(measure)]
        both = [p.label for p in self.of_kind("policy", "blend") if self._keeps(p)]
        lines += ["", f"at least {KEPT:.0%} of the gain and of every diversity above: {', '.join(both) or 'none'}"]
        return "\n".join(lines)

    def _keeps(self, point: Point) -> bool:
        """Whether it has enough of everything."""
        return all(share >= KEPT for measure in self.measures for share in self.retained(point, measure))

    def _readings(self, measure: str) -> list[str]:
        """Hypervolume and most retained, a line for each kind of point."""
        lines = []
        for title, kind in _GROUPS.items():
            known = [p for p in self.of_kind(kind) if np.isfinite(p.diversity[measure].value)]
            if not known:
                continue
            shares = [self.retained(point, measure) for point in known]
            parts = [f"hypervolume {hypervolume(shares):.3f}"]
            for axis, other in ((0, 1), (1, 0)):
                kept = most_retained(shares, axis, KEPT)
                what = f"{Retained._fields[axis]} at {Retained._fields[other]} ≥ {KEPT:.0%}"
                said = f"{shares[kept][axis]:.0%} ({known[kept].label})" if kept is not None else "none"
                parts.append(f"most {what}: {said}")
            lines.append(f"  {title}: {'; '.join(parts)}")
        return [*lines, f"  hypervolume beyond {REFERENCE[0]:.0%} of the gain and {REFERENCE[1]:.0%} of the diversity"]


def hypervolume(shares: Iterable[tuple[float, float]], reference: tuple[float, float] = REFERENCE) -> float:
    """The area that points dominate beyond a reference point (Zitzler and Thiele 1999, "Multiobjective evolutionary
    algorithms"), more of both being better; points not beyond it, or NaN, add nothing."""
    area, height = 0.0, reference[1]
    beyond = [(x, y) for x, y in shares if x > reference[0] and y > reference[1]]
    for x, y in sorted(beyond, reverse=True):
        area += (x - reference[0]) * max(y - height, 0.0)
        height = max(height, y)
    return area


def most_retained(shares: Sequence[tuple[float, float]], axis: int, least: float) -> int | None:
    """The number of the point with the most of one share among those with at least so much of the other; None where
    there is none."""
    enough = [i for i, point in enumerate(shares) if point[1 - axis] >= least]
    return max(enough, key=lambda i: shares[i][axis], default=None)


def _points(evaluation: Evaluation, measures: Sequence[str]) -> list[Point]:
    """The points of one evaluation, the base first."""
    reward = evaluation.metric("reward", "reward")
    tables = {measure: _values(evaluation, measure) for measure in measures}
    points = []
    for k, policy in enumerate(evaluation.policies):
        kind: Kind = "base" if k == 0 else "policy" if policy.alpha is None else "blend"
        diversity = {measure: table[policy.label] for measure, table in tables.items()}
        points.append(Point(policy.label, kind, reward.values[policy.label], diversity))
    for measure in measures:
        if not np.isfinite(points[0].diversity[measure].value):
            raise UserError(f"{evaluation.path} has no {measure}, which needs what it was not given; choose another")
    for best in evaluation.record["best_of"]:
        diversity = {measure: _of_best(best["diversity"], measure) for measure in measures}
        points.append(Point(f"best of {best['n']}", "best of n", estimate(best["reward"]), diversity))
    for measure in measures:
        for weighted in evaluation.record.get("reweighting", {}).get(measure, []):
            diversity = {m: _alone(weighted["value"] if m == measure else UNKNOWN) for m in measures}
            points.append(Point("re-weighting", "re-weighting", _alone(weighted["reward"]), diversity))
    return points


def _values(evaluation: Evaluation, measure: str) -> dict[str, Estimate]:
    """The measure by label; the mean distance, which is no metric of its own, without an interval."""
    try:
        if measure != MEAN_DISTANCE:
            return evaluation.metric("diversity", measure).values
        parts = [evaluation.metric("diversity", name).values for name in _DISTANCES]
    except KeyError as error:
        known = [m.name for m in evaluation.metrics if m.group == "diversity"]
        raise UserError(f"{evaluation.path} has no measure {measure}; choose of {', '.join(known)}") from error
    return {label: _alone(float(np.mean([part[label].value for part in parts]))) for label in parts[0]}


def _of_best(diversity: dict[str, dict[str, float | None]], measure: str) -> Estimate:
    if measure == MEAN_DISTANCE:
        return _alone(float(np.mean([estimate(diversity[name]).value for name in _DISTANCES])))
    return estimate(diversity[measure]) if measure in diversity else _alone(UNKNOWN)


def _alone(value: float) -> Estimate:
    return Estimate(value, UNKNOWN, UNKNOWN)


def words(measure: str) -> str:
    """The name of a measure for people, such as `effective outputs`."""
    return measure.removeprefix("rarefied_").replace("_", " ")


def known_measures(evaluation: Evaluation) -> tuple[str, ...]:
    """Measures of `MEASURES` that an evaluation has; in an older one that is effective outputs, whole ones."""
    known = {m.name for m in evaluation.metrics if m.group == "diversity" and np.isfinite(_of_first(m))}
    return tuple(name for name in MEASURES if name in known) or ("effective_outputs",)


def _of_first(metric: Metric) -> float:
    return next(iter(metric.values.values())).value


def _share(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "–"


def _interval(e: Estimate) -> str:
    if not np.isfinite(e.value):
        return "–"
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" if np.isfinite(e.low) else f"{e.value:.3f}"


def _full(points: Sequence[Point], label: str) -> Point:
    """The point whose gain is 1: the one of that label, else the policy, or best of n, with the most reward."""
    if label:
        named = [point for point in points if point.label == label and point.kind != "re-weighting"]
        if not named:
            raise UserError(f"--full {label} is no point here; choose of {', '.join(p.label for p in points[1:])}")
        return named[0]
    trained = [point for point in points if point.kind in ("policy", "blend")]
    rest = trained or [point for point in points if point.kind == "best of n"]
    if not rest:
        raise UserError("there is the base policy only; evaluate a tuned one beside it, or with --best-of")
    return max(rest, key=lambda point: point.reward.value)


def _require_one_question(first: Evaluation, other: Evaluation) -> None:
    """Raises UserError naming what two evaluations differ in, where their points cannot stand in one picture."""

    def asked(evaluation: Evaluation) -> dict[str, object]:
        config, record = evaluation.config, evaluation.record
        return {
            "[prompts]": config.prompts,
            "[sampling]": config.sampling,
            "[reward]": config.reward,
            "the length of clips": config.audio.max_seconds,
            "train.seed": config.train.seed,
            "the soundfont": [font["sha256"] for font in record["soundfonts"].values()][:1],
            "the number of prompts": record["prompts"],
            "what is compared": record["compared"],
            "the first policy": evaluation.policies[0].sha256,
        }

    mine, theirs = asked(first), asked(other)
    for name, value in mine.items():
        if value != theirs[name]:
            raise UserError(
                f"{first.path} and {other.path} differ in {name}, so their points cannot stand in one picture; "
                "evaluate both with the same settings"
            )
