"""What docs/diversity-protocol.md asks, over seeds: python bench/diversity_claim.py EVALUATION ... --out JSON

Each argument is the folder of a `fastsmart evaluate` with policies labelled base, unconstrained or candidate. A seed
may have several: what is not in one is taken from another, and so is the curve of the base's best of n.
Writes the ratios of every seed, their means and bounds, whether the claim holds, and of the side conditions which; and
of the second question how far the candidate lies above that curve.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result
from scipy import stats

from fastsmart.machine.text_table import text_table
from fastsmart.study.evaluation import Evaluation

BASE, UNCONSTRAINED, CANDIDATE = "base", "unconstrained", "candidate"
LEVEL = 0.95  # of a bound to one side
LEAST, LEAST_DISTANCE = 0.90, 0.80  # what has to be retained, of the primary measures and of each distance
PRIMARY = ("rarefied_effective_outputs", "rarefied_effective_embeddings_order_2")
BESIDE = ("rarefied_effective_outputs_order_2", "rarefied_effective_embeddings")
MOST_NOTES = 1.10  # of those of best of four
FAULTS = ("empty outputs", "outputs that could not be scored")  # shares of all outputs
DISTANCES = ("pitch_class", "onset", "move", "register", "dynamics")
GAIN = "reward gain"


def lower_bound(values: Sequence[float]) -> float:
    """One-sided lower bound of the mean by Student's t, at level `LEVEL`; NaN of a single value."""
    if len(values) < 2:
        return float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values) - stats.t.ppf(LEVEL, len(values) - 1) * error)


def gain_test(tuned: Sequence[float], unconstrained: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Share of the gain of unconstrained tuning, and how surely it is above `LEAST`, by a Welch test to one side.

    tuned, unconstrained, base : mean rewards, one a seed, two at least

    `above` is tuned - LEAST unconstrained - (1 - LEAST) base in the means, `lower_bound` its bound at level `LEVEL`,
    with the degrees of freedom of Welch and Satterthwaite.
    """
    weights = (1.0, -LEAST, -(1 - LEAST))
    groups = [np.asarray(group, np.float64) for group in (tuned, unconstrained, base)]
    c, u, b = (float(group.mean()) for group in groups)
    parts = [w**2 * group.var(ddof=1) / len(group) for w, group in zip(weights, groups, strict=True)]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    above = c - LEAST * u - (1 - LEAST) * b
    bound = above - stats.t.ppf(LEVEL, freedom) * sum(parts) ** 0.5
    return {
        "share": (c - b) / (u - b),
        "above": above,
        "lower_bound": float(bound),
        "degrees_of_freedom": float(freedom),
    }


def retained(values: Mapping[str, Mapping[str, float]], label: str, unconstrained: float) -> dict[str, float]:
    """What a policy retains: of the reward gain of unconstrained tuning, of the base's diversity, distances and notes.

    values        : by metric, the value of every label
    unconstrained : mean reward of unconstrained tuning over its seeds
    """
    reward = values["reward"]
    gain = (reward[label] - reward[BASE]) / (unconstrained - reward[BASE])
    others = [name for name in values if name != "reward" and name not in FAULTS]
    return {GAIN: gain} | {name: values[name][label] / values[name][BASE] for name in others}


def verdict(seeds: Sequence[Mapping[str, float]], gain: Mapping[str, float]) -> dict[str, Any]:
    """Means, bounds and whether the claim holds, of what a policy retains with every seed and of its `gain_test`."""
    mean = {name: float(np.mean([s[name] for s in seeds])) for name in seeds[0]}
    bound = {name: lower_bound([s[name] for s in seeds]) for name in seeds[0]}
    primary = gain["lower_bound"] > 0 and all(bound[name] > LEAST for name in PRIMARY)
    return {"mean": mean, "lower_bound": bound, "gain": dict(gain), "primary_hold": primary}


def above_curve(
    values: Mapping[str, Mapping[str, float]], label: str, curve: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """How much more diverse a policy is than choosing among the base's outputs at its reward, in shares of the base's.

    curve : points of the base's best of n, from 1 on, as of an evaluation's record

    The points are joined by straight lines in reward. Beyond the last one its diversity stands: the curve would go on
    falling, so the policy is not favoured.
    """
    rewards = [point["reward"]["value"] for point in curve]
    found = {}
    for name in PRIMARY:
        points = [point["diversity"][name]["value"] for point in curve]
        chosen = float(np.interp(values["reward"][label], rewards, points))
        found[name] = (values[name][label] - chosen) / points[0]
    return found


def second_question(seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means, bounds and whether a policy lies above the curve in both measures, of its `above_curve` of every seed."""
    mean = {name: float(np.mean([s[name] for s in seeds])) for name in PRIMARY}
    bound = {name: lower_bound([s[name] for s in seeds]) for name in PRIMARY}
    return {"mean": mean, "lower_bound": bound, "above": all(bound[name] > 0 for name in PRIMARY)}


def side_conditions(
    seeds: Sequence[Mapping[str, Mapping[str, float]]], label: str, best_of_four: float | None
) -> dict[str, bool | None]:
    """Which side conditions a policy meets in the mean over seeds; None where it cannot be told.

    seeds        : by metric, the value of every label, of each seed
    best_of_four : notes a clip of the base's best of four
    """

    def mean(name: str, of: str) -> float:
        return float(np.mean([values[name][of] for values in seeds]))

    kept = [mean(f"rarefied_{name}_distance_across", label) / mean(f"rarefied_{name}_distance_across", BASE)
            for name in DISTANCES]  # fmt: skip
    return {
        "distances": min(kept) >= LEAST_DISTANCE,
        "notes, not fewer than the base": mean("notes", label) >= mean("notes", BASE),
        "notes, at most a tenth more than best of four": (
            None if best_of_four is None else mean("notes", label) <= MOST_NOTES * best_of_four
        ),
        **{f"no more {name}": mean(name, label) <= mean(name, BASE) for name in FAULTS},
    }


def values_of(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """The metrics that the protocol names, by label."""
    wanted = {"reward": "reward", "notes": "feature"} | dict.fromkeys((*PRIMARY, *BESIDE), "diversity")
    wanted |= dict.fromkeys(FAULTS, "share")
    wanted |= {f"rarefied_{name}_distance_across": "diversity" for name in DISTANCES}
    found = {name: evaluation.metric(group, name).values for name, group in wanted.items()}
    return {name: {label: e.value for label, e in values.items()} for name, values in found.items()}


@dataclass
class Seed:
    """What the evaluations of one seed have.

    values        : by metric, the value of every label, of the evaluation that has the candidate: what it is held
                    against has played in the same one
    unconstrained : mean rewards of unconstrained tuning
    curve         : the base as the best of 1, then points of its best of n
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    unconstrained: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def take(self, evaluation: Evaluation) -> None:
        values = values_of(evaluation)
        if CANDIDATE in values["reward"]:
            self.values = values
        if UNCONSTRAINED in values["reward"]:
            self.unconstrained.append(values["reward"][UNCONSTRAINED])
        if points := evaluation.record["best_of"]:
            base = {"n": 1, "reward": {"value": values["reward"][BASE]}, "notes": {"value": values["notes"][BASE]}}
            base["diversity"] = {name: {"value": values[name][BASE]} for name in PRIMARY}
            self.curve = [base, *points]


def by_seed(evaluations: Sequence[Evaluation]) -> dict[int, Seed]:
    """Of each `train.seed`, in order."""
    seeds: dict[int, Seed] = {}
    for evaluation in sorted(evaluations, key=lambda e: e.config.train.seed):
        seeds.setdefault(evaluation.config.train.seed, Seed()).take(evaluation)
    return seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", nargs="+")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    opened = [Evaluation.open(Path(folder)) for folder in options.evaluation]
    seeds = by_seed(opened)
    tuned = {seed: of for seed, of in seeds.items() if of.values}
    curves = {seed: of for seed, of in tuned.items() if of.curve}
    rewards = {
        CANDIDATE: [of.values["reward"][CANDIDATE] for of in tuned.values()],
        UNCONSTRAINED: [reward for of in seeds.values() for reward in of.unconstrained],
        BASE: [of.values["reward"][BASE] for of in tuned.values()],
    }
    if min(map(len, rewards.values())) < 2:
        parser.error("fewer than two seeds have a candidate, or unconstrained tuning; a bound needs two of each")
    gain, free = gain_test(*rewards.values()), float(np.mean(rewards[UNCONSTRAINED]))
    ratios = {seed: retained(of.values, CANDIDATE, free) for seed, of in tuned.items()}
    found = verdict(list(ratios.values()), gain)
    above = {seed: above_curve(of.values, CANDIDATE, of.curve) for seed, of in curves.items()}
    notes = [point["notes"]["value"] for of in curves.values() for point in of.curve if point["n"] == 4]
    side = side_conditions([of.values for of in tuned.values()], CANDIDATE, float(np.mean(notes)) if notes else None)
    rows = [["", *map(str, ratios), "mean", "lower bound"]]
    for name, mean in found["mean"].items():
        rows.append(
            [name, *(f"{r[name]:.3f}" for r in ratios.values()), f"{mean:.3f}", f"{found['lower_bound'][name]:.3f}"]
        )
    print(text_table(rows))
    print(f"Gain {gain['share']:.3f}; the claim holds: {found['primary_hold']}; side conditions: {side}")
    second = second_question(list(above.values())) if len(above) > 1 else None
    if second:
        print(f"Above the curve of best of n, {', '.join(map(str, above))}: {second}")
    write_result(
        options.out,
        {
            "seeds": {seed: vars(of) for seed, of in seeds.items()},
            "rewards": rewards,
            "retained": {"seeds": ratios, **found},
            "side_conditions": side,
            "above_curve": {"seeds": above, "all": second},
            "notes_of_best_of_four": notes,
        },
    )


if __name__ == "__main__":
    main()
