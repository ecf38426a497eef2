"""What tuned policies keep of the base's styles, over seeds: python bench/records/styles/kept.py --out kept.json

Reads `seed-N/evaluation.json` beside this file, of policies called base and plain and others. Prints and writes of each
policy the means over seeds with 95 % intervals by Student's t: demo reward, its gain over plain's, bits between asked
and heard and effective outputs within a style, both over the base's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from fastsmart.machine.text_table import text_table
from fastsmart.presets import demo
from fastsmart.study.evaluation import Evaluation

HERE = Path(__file__).parent
JUDGES = {"judge": "bits, judge", "second judge": "bits, forest"}
WITHIN = "effective outputs within "
BESIDE = ("rarefied_effective_outputs", "rarefied_effective_embeddings_order_2")


def with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval by Student's t; of one value no interval, NaN."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 * stats.t.ppf(0.975, len(values) - 1)
    return mean, mean - error, mean + error


def of_seed(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Label -> measure -> value of one seed."""
    values: dict[tuple[str, str], Mapping[str, float]] = {
        (metric.group, metric.name): {label: e.value for label, e in metric.values.items()}
        for metric in evaluation.metrics
    }
    weights = demo().reward.terms
    labels = list(values["reward", "consonance"])
    reward = {x: sum(weight * values["reward", term][x] for term, weight in weights.items()) for x in labels}
    styles = [name.removeprefix(WITHIN) for group, name in values if name.startswith(WITHIN)]
    found: dict[str, dict[str, float]] = {}
    for label in labels:
        row = {"demo reward": reward[label], "style margin": values["reward", "style_margin"][label]}
        row["notes"] = values["feature", "notes"][label]
        if label == "base":
            row |= {said: values["style", f"bits between asked and heard, {judge}"][label]
                    for judge, said in JUDGES.items()}  # fmt: skip
        else:
            row["gain over plain's"] = (reward[label] - reward["base"]) / (reward["plain"] - reward["base"])

            def share(group: str, name: str, label: str = label) -> float:
                return values[group, name][label] / values[group, name]["base"]

            row |= {said: share("style", f"bits between asked and heard, {judge}") for judge, said in JUDGES.items()}
            within = {style: share("style", WITHIN + style) for style in styles}
            row |= {f"within {style}": kept for style, kept in within.items()}
            row["within, mean"] = float(np.mean(list(within.values())))
            row |= {name: share("diversity", name) for name in BESIDE}
        row["distance to real windows"] = float(
            np.mean([values["style", f"distance of {style} to its real windows"][label] for style in styles])
        )
        found[label] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folders = sorted(HERE.glob("seed-*"))
    seeds = [of_seed(Evaluation.open(folder)) for folder in folders]
    labels = [label for label in seeds[0] if all(label in seed for seed in seeds)]
    table = {
        label: {name: with_interval([seed[label][name] for seed in seeds]) for name in seeds[0][label]}
        for label in labels
    }
    for label in labels:
        print(f"\n{label}, {len(seeds)} seeds")
        rows = [[name, f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]"] for name, (mean, low, high) in table[label].items()]
        print(text_table([["", "mean", "95 % interval"], *rows]))
    if given.out:
        written = {"seeds": [folder.name for folder in folders], "means": table, "of each seed": seeds}
        given.out.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
