"""Algorithms at the same number of completions, over seeds: python bench/records/algorithms/compare.py --out t.json

Reads `seed-N/` beside this file: an evaluation of base, grpo, credit, tilt and dpo, and the metrics of their runs.
Prints and writes of each the means over seeds with 95 % intervals by Student's t.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import numpy as np
from scipy import stats

from fastsmart.machine.text_table import text_table
from fastsmart.presets import demo
from fastsmart.study.evaluation import Evaluation

HERE = Path(__file__).parent
KEPT = {"rarefied_effective_outputs": "outputs", "rarefied_effective_embeddings_order_2": "embeddings"}
JUDGES = {"judge": "bits kept, judge", "second judge": "bits kept, forest"}


def with_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval by Student's t."""
    mean, n = float(np.mean(values)), len(values)
    error = float(np.std(values, ddof=1)) / n**0.5 * stats.t.ppf(0.975, n - 1)
    return mean, mean - error, mean + error


def of_seed(folder: Path) -> dict[str, dict[str, float]]:
    """Label -> measure -> value of one seed."""
    found = Evaluation.open(folder)
    values = {(metric.group, metric.name): {x: e.value for x, e in metric.values.items()} for metric in found.metrics}
    weights = demo().reward.terms
    reward = {
        x: sum(w * values["reward", term][x] for term, w in weights.items()) for x in values["reward", "presence"]
    }
    rows = {}
    for label in reward:
        row = {"demo reward": reward[label], "style margin": values["reward", "style_margin"][label]}
        row["notes"] = values["feature", "notes"][label]
        for name, said in KEPT.items():
            row[f"effective {said}, of the base's"] = (
                values["diversity", name][label] / values["diversity", name]["base"]
            )
        within = [name for group, name in values if name.startswith("effective outputs within ")]
        row["within a style, of the base's"] = float(
            np.mean([values["style", name][label] / values["style", name]["base"] for name in within])
        )
        for judge, said in JUDGES.items():
            bits = values["style", f"bits between asked and heard, {judge}"]
            row[said] = bits[label] / bits["base"]
        metrics = folder / f"{label}.jsonl.xz"
        if metrics.is_file():
            lines = [json.loads(line) for line in lzma.decompress(metrics.read_bytes()).splitlines()][1:]
            row["nats a piece when last sampled"] = lines[-1]["kl_per_completion"]
            row["seconds"] = sum(line["time"]["step"] for line in lines)
        rows[label] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    seeds = [of_seed(folder) for folder in sorted(HERE.glob("seed-*"))]
    table = {
        label: {name: with_interval([seed[label][name] for seed in seeds]) for name in seeds[0][label]}
        for label in seeds[0]
    }
    for label, row in table.items():
        print(f"\n{label}")
        print(text_table([[name, *(f"{x:.3f}" for x in cells)] for name, cells in row.items()]))
    if given.out:
        given.out.write_text(json.dumps({"seeds": len(seeds), "means": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
