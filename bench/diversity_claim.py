"""What docs/diversity-protocol.md asks, over seeds: python bench/diversity_claim.py EVALUATION ... --out JSON

Each argument is the folder of a `fastsmart evaluate` of one seed with the policies base, unconstrained and candidate;
--unconstrained names more of unconstrained tuning alone, --best-of one that has the base's best of four. Writes the
ratios of every seed, their means and bounds, whether the claim holds, and of the side conditions which.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
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


def retained(values: Mapping[str, Mapping[str, float]], label: str) -> dict[str, float]:
    """What a policy retains: of the reward gain of unconstrained tuning, of the base's diversity, distances and notes.

    values : by metric, the value of every label
    """
    reward = values["reward"]
    gain = (reward[label] - reward[BASE]) / (reward[UNCONSTRAINED] - reward[BASE])
    others = [name for name in values if name != "reward" and name not in FAULTS]
    return {GAIN: gain} | {name: values[name][label] / values[name][BASE] for name in others}


def verdict(seeds: Sequence[Mapping[str, float]], gain: Mapping[str, float]) -> dict[str, Any]:
    """Means, bounds and whether the claim holds, of what a policy retains with every seed and of its `gain_test`."""
    mean = {name: float(np.mean([s[name] for s in seeds])) for name in seeds[0]}
    bound = {name: lower_bound([s[name] for s in seeds]) for name in seeds[0]}
    primary = gain["lower_bound"] > 0 and all(bound[name] > LEAST for name in PRIMARY)
    return {"mean": mean, "lower_bound": bound, "gain": dict(gain), "primary_hold": primary}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", nargs="+")
    parser.add_argument(
        "--unconstrained", nargs="*", default=[], help="evaluations of unconstrained tuning, other seeds"
    )
    parser.add_argument("--best-of", default="", help="evaluation with the base's best of four, for its notes a clip")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    opened = [Evaluation.open(Path(folder)) for folder in options.evaluation]
    for folder, evaluation in zip(options.evaluation, opened, strict=True):
        if missing := {BASE, UNCONSTRAINED, CANDIDATE} - set(evaluation.labels):
            parser.error(f"{folder} has no policy labelled {sorted(missing)[0]}; evaluate with --policy LABEL=POLICY")
    more = [Evaluation.open(Path(folder)) for folder in options.unconstrained]
    if len({e.config.train.seed for e in (*opened, *more)}) < len(opened) + len(more):
        parser.error("two evaluations are of the same train.seed; give each seed once")
    values = [values_of(e) for e in opened]
    labels = [label for label in values[0]["reward"] if label not in (BASE, UNCONSTRAINED)]
    rewards = {label: [v["reward"][label] for v in values] for label in (BASE, UNCONSTRAINED, *labels)}
    rewards[UNCONSTRAINED] += [e.metric("reward", "reward").values[UNCONSTRAINED].value for e in more]
    found = {
        label: verdict(
            [retained(v, label) for v in values], gain_test(rewards[label], rewards[UNCONSTRAINED], rewards[BASE])
        )
        for label in (UNCONSTRAINED, *labels)
    }
    curve = Evaluation.open(Path(options.best_of)).record["best_of"] if options.best_of else []
    notes = next((point["notes"]["value"] for point in curve if point["n"] == 4), None)
    side = {label: side_conditions(values, label, notes) for label in found}
    rows = [["mean (lower bound)", *found]]
    rows += [
        [name, *(f"{f['mean'][name]:.3f} ({f['lower_bound'][name]:.3f})" for f in found.values())]
        for name in found[CANDIDATE]["mean"]
    ]
    rows.append(["gain, all seeds (above, bound)"])
    rows[-1] += [
        f"{f['gain']['share']:.3f} ({f['gain']['above']:.3f}, {f['gain']['lower_bound']:.3f})" for f in found.values()
    ]
    print(text_table(rows))
    print(
        f"The claim holds: {found[CANDIDATE]['primary_hold']}; side conditions: {side[CANDIDATE]}; "
        f"{len(opened)} seeds, {opened[0].basis}"
    )
    write_result(
        options.out,
        {
            "seeds": [
                {"evaluation": folder, "train_seed": e.config.train.seed, "values": v}
                for folder, e, v in zip(options.evaluation, opened, values, strict=True)
            ],
            "unconstrained_rewards": rewards[UNCONSTRAINED],
            "retained": found,
            "side_conditions": side,
            "notes_of_best_of_four": notes,
        },
    )


if __name__ == "__main__":
    main()
