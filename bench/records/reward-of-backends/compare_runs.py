"""Draws the reward of two or more runs, step by step, into one picture, and prints how far they lie apart.

python bench/compare_runs.py runs/bank runs/fluidsynth --picture docs/rendering-rewards.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

import matplotlib.pyplot as plt
import numpy as np
from results import write_result


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("runs", nargs="+", help="run folders, the reference last")
    arguments.add_argument("--picture", required=True, help="PNG to write")
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    curves = {Path(run).name: curve(Path(run)) for run in options.runs}
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, (steps, reward, held_out) in curves.items():
        (line,) = axes.plot(steps, reward, label=name, linewidth=1)
        axes.plot(*zip(*held_out, strict=True), "o", color=line.get_color(), markersize=4)
    axes.set(xlabel="step", ylabel="reward (dots: held out)")
    axes.legend()
    figure.savefig(options.picture, dpi=100)
    *others, (reference, (_, wanted, wanted_held_out)) = curves.items()
    for name, (_, reward, held_out) in others:
        n = min(len(reward), len(wanted))
        apart = np.array(reward[:n]) - np.array(wanted[:n])
        ends = [a[1] - b[1] for a, b in zip(held_out, wanted_held_out, strict=False)]
        print(
            f"{name} - {reference} over {n} steps: first {apart[0]:+.5f}, mean {apart.mean():+.4f}, "
            f"standard deviation {apart.std():.4f}; held out {', '.join(f'{x:+.4f}' for x in ends)}"
        )
    if options.out:
        figures = {name: {"steps": s, "reward": r, "held_out": h} for name, (s, r, h) in curves.items()}
        write_result(options.out, figures)


def curve(run: Path) -> tuple[list[int], list[float], list[tuple[int, float]]]:
    """Steps, the reward of each, and (step, held-out reward) of a run."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["step"]]
    held_out = [(line["step"], line["eval"]["reward"]["mean"]) for line in lines if line.get("eval")]
    return [line["step"] for line in trained], [line["reward"] for line in trained], held_out


if __name__ == "__main__":
    main()
