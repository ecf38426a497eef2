"""A long run with everything that can go wrong going wrong, held against the same run in peace.

    python bench/soak.py --steps 1000 --out bench/results/soak.json
    python bench/soak.py --steps 3000 --calm --out bench/results/soak-calm.json    # in peace only, for memory

The shipped policy, eight clips of two seconds a step. At fixed steps a render worker is killed, or stopped as if it
hung; audio is overwritten with NaN before it is scored; the disk is full for a while; and the whole run is asked to
stop by SIGTERM, or killed, and resumed. What must come out: every step once; the numbers of the run in peace, up to the
first corrupted clip; an account of each event in the metrics; and memory and file descriptors that do not grow. In
the first thousand steps memory still does, by some MB for every number of rows that oneDNN has not met before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import psutil
from results import write_result

from fastsmart.config import Config, merged, read_config, to_toml
from fastsmart.machine.files import JsonLines
from fastsmart.run.display import Silent
from fastsmart.trainer.loop import train
from fastsmart.trainer.rollout_worker import RolloutWorker

KILL, HANG, NAN, FULL, FREE, TERM, CRASH = "kill", "hang", "nan", "full disk", "disk free", "SIGTERM", "kill -9"
HANG_S = 1.0


def faults(steps: int) -> dict[int, str]:
    """What happens after which step: each kind every tenth of the run, the worst of them rarer."""
    plan: dict[int, str] = {}
    tenth = steps // 10
    for start in range(0, steps - tenth + 1, tenth):
        plan[start + tenth // 5] = KILL
        plan[start + 2 * tenth // 5] = FULL
        plan[start + 2 * tenth // 5 + tenth // 10] = FREE
        plan[start + 3 * tenth // 5] = HANG
        plan[start + 4 * tenth // 5] = (TERM, CRASH)[start // tenth % 2]
        if start >= steps // 2:
            plan[start + tenth // 2 + 1] = NAN
    return plan


class Injector(Silent):
    """Strikes when a step's line has been written; each fault strikes once, whatever life of the run it is."""

    def __init__(self, run: Path, plan: dict[int, str]) -> None:
        self.run, self.plan = run, plan
        self.told = run.parent / "struck.jsonl"
        told = self.told.read_text().splitlines() if self.told.exists() else []
        self.struck = {json.loads(line)["step"] for line in told}

    def line(self, line: dict[str, Any]) -> None:
        step = line["step"]
        what = self.plan.get(step)
        if what is None or step in self.struck:
            return
        self.struck.add(step)
        with open(self.told, "a", encoding="utf-8") as sink:
            sink.write(json.dumps({"step": step, "what": what}) + "\n")
        if what in (KILL, HANG):
            workers = [p.pid for p in psutil.Process().children() if "fastsmart.audio.worker" in p.cmdline()]
            os.kill(workers[0], signal.SIGKILL if what == KILL else signal.SIGSTOP)
        elif what == NAN:
            CORRUPT.append(step)
        elif what in (FULL, FREE):
            size = (self.run / "metrics.jsonl").stat().st_size + 50 if what == FULL else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        else:
            os.kill(os.getpid(), signal.SIGTERM if what == TERM else signal.SIGKILL)


CORRUPT: list[int] = []  # a step is here when one of the clips of the next is to be corrupted


def corrupting(gather: Any) -> Any:
    """The pool's `gather`, which finds NaN in the memory of the first clip where a corruption is due."""

    def gathered(indices: Any) -> Any:
        audio = gather(indices)
        if CORRUPT and 0 in indices:
            CORRUPT.clear()
            audio.samples[0] = np.nan
        return audio

    return gathered


def live(folder: Path, resume: bool, in_peace: bool) -> int:
    """One life of the run; its exit code."""
    config = read_config(folder / "config.toml")
    out = folder / ("peace" if in_peace else "run")
    if not in_peace:
        build = RolloutWorker.__init__

        def built(self: RolloutWorker, *arguments: Any) -> None:
            build(self, *arguments)
            if self.pool:
                self.pool.gather = corrupting(self.pool.gather)  # type: ignore[method-assign]

        RolloutWorker.__init__ = built  # type: ignore[method-assign]
    display = Silent() if in_peace else Injector(out, faults(config.train.steps))
    return train(config, out, resume, display).exit_code


def config_for(steps: int) -> Config:
    tree = {
        "prompts": {"time_signatures": ["4/4"], "tempo_min": 100.0},
        "sampling": {"group": 4, "max_tokens": 48},
        "audio": {"max_seconds": 2.0, "workers": 2, "clip_timeout_s": HANG_S},
        "reward": {"terms": {"consonance": 1.0, "variety": 0.5}, "normalize": "group"},
        "train": {
            "steps": steps,
            "prompts": 2,
            "score_batch": 4,
            "eval_every": steps // 10,
            "eval_prompts": 8,
            "listen": 0,
            "save_every": 20,
            "keep": 2,
            "learning_rate": 1e-4,
            "threads": 1,
        },
    }
    return merged(Config(), tree)


def slope(values: list[float]) -> float:
    """Change per 1,000 steps of the line through the second half of the values."""
    half = np.asarray(values[len(values) // 2 :])
    return 1000.0 * float(np.polyfit(np.arange(len(half)), half, 1)[0])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--out", default="", help="JSON file for the result")
    arguments.add_argument("--calm", action="store_true", help="only the run in peace")
    arguments.add_argument("--live", nargs=3, metavar=("FOLDER", "RESUME", "PEACE"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.live:
        sys.exit(live(Path(options.live[0]), options.live[1] == "1", options.live[2] == "1"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.toml").write_text(to_toml(config_for(options.steps)))
        figures = calm(folder, options.steps) if options.calm else soak(folder, options.steps)
    print(json.dumps({key: value for key, value in figures.items() if key != "lives"}, indent=1))
    if options.out:
        write_result(options.out, figures)


def start(folder: Path, *life: str) -> int:
    return subprocess.run([sys.executable, __file__, "--live", str(folder), *life], check=False).returncode


def calm(folder: Path, steps: int) -> dict[str, Any]:
    """The run in peace alone, and how its memory went."""
    began = time.monotonic()
    assert start(folder, "0", "1") == 0
    return {"steps": steps, "seconds": round(time.monotonic() - began, 1), **memory(folder)}


def memory(folder: Path) -> dict[str, Any]:
    """Of the run in peace: slopes over its second half, and all of it at intervals."""
    health = [line["health"] for line in JsonLines(folder / "peace" / "metrics.jsonl").lines()]
    return {
        "slope_per_1000_steps": {
            key: round(slope([entry[key] for entry in health]), 3) for key in ("rss_mb", "shm_mb", "files")
        },
        "rss_mb_every_50_steps": [entry["rss_mb"] for entry in health[::50]],
    }


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """Both runs, and what is to be said about them; raises AssertionError where a step or a number was lost."""
    began = time.monotonic()
    assert start(folder, "0", "1") == 0
    peace_s, began = time.monotonic() - began, time.monotonic()
    codes = [start(folder, "0", "0")]
    while codes[-1] in (128 + signal.SIGTERM, -signal.SIGKILL):
        codes.append(start(folder, "1", "0"))
    assert codes[-1] == 0, codes
    run, peace = (JsonLines(folder / name / "metrics.jsonl").lines() for name in ("run", "peace"))
    struck = [json.loads(line) for line in (folder / "struck.jsonl").read_text().splitlines()]
    plan = faults(steps)
    assert {fault["step"]: fault["what"] for fault in struck} == plan
    assert [line["step"] for line in run] == list(range(steps + 1)), "a step is missing or there twice"
    first_nan = min((step for step, what in plan.items() if what == NAN), default=steps)
    same = [numbers(a) == numbers(b) for a, b in zip(run, peace, strict=True)]
    if not all(same[: first_nan + 1]):
        step = same.index(False)
        keys = [key for key, value in numbers(run[step]).items() if value != peace[step].get(key)]
        raise AssertionError(f"step {step} differs: {[(key, run[step][key], peace[step].get(key)) for key in keys]}")
    health = [line["health"] for line in run]
    events: Counter[str] = Counter()
    for line in run:
        events.update({key: line["health"].get(key, 0) for key in ("workers_replaced", "clips_failed", "failed_saves")})
        events["unscored"] += line.get("unscored", 0)
        events["notes"] += len(line["health"].get("notes", []))
    last = [i for i, line in enumerate(run) if line["step"] > max(s for s, w in plan.items() if w in (TERM, CRASH))]
    return {
        "steps": steps,
        "faults": dict(Counter(plan.values())),
        "lives": codes,
        "exits": dict(Counter(map(str, codes))),
        "steps_equal_to_the_run_in_peace": sum(same),
        "first_corrupted_clip_after_step": first_nan,
        "account": dict(events),
        **memory(folder),
        "files_first_last": [health[1]["files"], health[-1]["files"]],
        "steps_of_last_life": len(last),
        "seconds": {"peace": round(peace_s, 1), "faults": round(time.monotonic() - began, 1)},
        "left_in_dev_shm": sorted(name for name in os.listdir("/dev/shm") if "fastsmart" in name),
    }


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("time", "health")}


if __name__ == "__main__":
    main()
