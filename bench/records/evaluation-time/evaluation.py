"""How long an evaluation takes, stage by stage: python bench/evaluation.py --policy A --policy B -n 1000 --out FOLDER

Writes FOLDER/evaluation (whole, with its figures) and the times as JSON to --result.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

import torch
from results import write_result

from fastsmart.config import with_overrides
from fastsmart.machine.files import cpu_cores
from fastsmart.presets import load_preset
from fastsmart.study.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", action="append", required=True)
    parser.add_argument("-n", "--prompts", type=int, default=1000)
    parser.add_argument("--best-of", type=int, default=0)
    parser.add_argument("--training-set", default="")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", required=True)
    parser.add_argument("--result", required=True)
    options = parser.parse_args()
    torch.set_num_threads(cpu_cores())
    last, seconds = time.perf_counter(), {}

    def clock(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage] = seconds.get(stage, 0.0) + now - last
        last = now
        if done == total:
            print(f"{stage}: {total} in {seconds[stage]:.1f} s", flush=True)

    start = time.perf_counter()
    config, folder = with_overrides(load_preset("demo"), options.set), Path(options.out) / "evaluation"
    evaluate(options.policy, folder, config, options.prompts, options.best_of, (), options.training_set, progress=clock)
    figures = {
        "what": "fastsmart evaluate, preset demo: formula rewards, one soundfont",
        "policies": len(options.policy),
        "prompts": options.prompts,
        "best_of": options.best_of,
        "settings": options.set,
        "seconds": time.perf_counter() - start,
        "seconds_by_stage": seconds,
    }
    write_result(options.result, figures)
    print(f"{figures['seconds']:.0f} s")


if __name__ == "__main__":
    main()
