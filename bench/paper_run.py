"""Two hundred steps of the paper's run with random Audiobox weights: seconds of a step and of its stages.

    python bench/paper_run.py --out bench/results/paper-run.json

The preset `smart-paper` as `fastsmart train` runs it, with a policy of the paper's shape that plays real music. The
rewards mean nothing; that all are finite, and what the run cost, does. Evaluation is cut to a few prompts, and nothing
is written to listen to.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

from harness import parser
from policies import playing_policy
from results import write_result
from stages import parse

from fastsmart import presets
from fastsmart.config import merged
from fastsmart.machine.files import JsonLines
from fastsmart.policy.hf_format import save_policy
from fastsmart.run.display import Plain
from fastsmart.trainer.loop import train

QUICK = {
    "sampling": {"group": 2, "max_tokens": 32},
    "train": {"prompts": 1, "eval_prompts": 2},
    "audio": {"max_seconds": 10.0},
}


def main() -> None:
    options = parser(__doc__, runs=1)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--soundfont", default="", help="default: the first one installed")
    given = parse(options, {"steps": 3})
    with tempfile.TemporaryDirectory() as folder:
        save_policy(playing_policy(), Path(folder, "policy"))
        changes = {
            "policy": {"source": str(Path(folder, "policy")), "vocabulary": "", "device": given.device},
            "audio": {"soundfont": given.soundfont},
            "reward": {"audiobox_checkpoint": "random", "audiobox_dtype": "float32"},
            "train": {"steps": given.steps, "eval_prompts": 32, "listen": 0, "save_every": 0, "threads": given.threads},
        }
        if given.device != "cpu":
            changes["reward"]["audiobox_dtype"] = "float16"
        config = merged(presets.load_preset("smart-paper"), changes)
        config = merged(config, QUICK) if given.quick else config
        start = time.perf_counter()
        run = train(config, Path(folder, "run"), display=Plain())
        wall_s = time.perf_counter() - start
        lines = JsonLines(run.path / "metrics.jsonl").lines()
    figures = summary(lines, config.train.steps, wall_s)
    print(figures["figure"])
    if given.out:
        write_result(given.out, figures)


def summary(lines: list[dict[str, Any]], steps: int, wall_s: float) -> dict[str, Any]:
    """Medians over all steps but the first tenth, in which kernels are compiled; and whether every reward is finite."""
    taken = [line for line in lines if "reward" in line]
    settled = taken[len(taken) // 10 :]
    stages = {name for line in settled for name, value in line["time"].items() if isinstance(value, float)}
    seconds = {name: median([line["time"].get(name, 0.0) for line in settled]) for name in sorted(stages)}
    idle = {name: median([line["time"]["idle"][name] for line in settled]) for name in settled[-1]["time"]["idle"]}
    finite = sum(line["reward"] is not None and math.isfinite(line["reward"]) for line in taken)
    return {
        "figure": f"{len(taken)} steps in {wall_s:.1f} s, {1e3 * seconds['step']:.0f} ms a step",
        "passed": finite == len(taken) == steps,
        "steps": len(taken),
        "finite_rewards": finite,
        "wall_s": wall_s,
        "median_s": seconds,
        "median_idle_share": idle,
        "gpu_mixed": taken[-1]["time"]["gpu_mixed"],
        "reward": [line["reward"] for line in taken],
        "step_s": [line["time"]["step"] for line in taken],
        "health": taken[-1]["health"],
    }


if __name__ == "__main__":
    main()
