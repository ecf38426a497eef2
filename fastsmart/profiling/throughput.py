"""Speed of a run on this machine, alone or beside the same run with other settings, the contenders taking turns.

A turn is the first steps of a run, without evaluations and checkpoints; those of the warm-up are not counted. Machines
drift, so contenders are compared within a round, in which each has one turn.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastsmart.config import Config, to_toml, with_overrides
from fastsmart.errors import UserError
from fastsmart.machine.distributed import Ranks, join_ranks
from fastsmart.machine.files import make_folder, write_atomic
from fastsmart.machine.gc_control import gc_at_steps
from fastsmart.machine.text_table import text_table
from fastsmart.run.folder import PROVENANCE_FILE, RunFolder
from fastsmart.tilt.settings import TiltSettings
from fastsmart.trainer.loop import open_run
from fastsmart.trainer.settings import MergeSettings

RESULT_FILE = "bench.json"
STAGES = ("sample", "render", "score", "update")
AS_ASKED = "as asked"

Progress = Callable[[int, int], None]


def contenders(config: Config, against: Sequence[str]) -> dict[str, Config]:
    """The run as asked for, and for each text ("SECTION.KEY=VALUE ...") the same with these settings, by name."""
    return {AS_ASKED: config} | {text: with_overrides(config, shlex.split(text)) for text in against}


def bench(
    configs: Mapping[str, Config],
    out: str | Path,
    steps: int = 5,
    warmup: int = 2,
    rounds: int = 3,
    progress: Progress = lambda done, total: None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Let the configs take `rounds` turns of `warmup` + `steps` steps each; writes bench.json into `out`, gives it.

    Ratios are of the medians within a round: how many times as fast as the first config. Started by torchrun, every
    rank calls this with the same arguments; times are those of rank 0 (`ranks`: see `join_ranks`, the default).

    Raises UserError where a count is too small or `out` cannot be written; and whatever `train` raises.
    """
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0), ("rounds", rounds, 1)):
        if value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    ranks, turns = ranks or join_ranks(), make_folder(out) / "turns"
    if ranks.leader:
        shutil.rmtree(turns, ignore_errors=True)  # of a bench that was ended
    lines: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in configs}
    provenance: dict[str, Any] = {}
    for turn in range(rounds * len(configs)):
        name = list(configs)[turn % len(configs)]
        folder = turns / str(turn)
        lines[name].append(run_turn(configs[name], folder, warmup + steps, ranks)[warmup:])
        if ranks.leader:
            provenance[name] = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
        progress(turn + 1, rounds * len(configs))
    ranks.broadcast(0)  # nobody is in the folders any more
    first = [statistics.median(line["time"]["step"] for line in each) for each in lines[next(iter(configs))]]
    found = {
        "command": shlex.join(["fastsmart", *sys.argv[1:]]),
        "ranks": ranks.world,
        "contenders": {
            name: {"config": to_toml(configs[name]), "provenance": provenance.get(name)} | summary(each, first)
            for name, each in lines.items()
        },
    }
    if ranks.leader:
        shutil.rmtree(turns, ignore_errors=True)
        write_atomic(Path(out) / RESULT_FILE, json.dumps(found, indent=1) + "\n")
    return found


def run_turn(config: Config, path: Path, steps: int, ranks: Ranks) -> list[dict[str, Any]]:
    """The first steps of the run of a config, as lines of metrics; the last has the most memory of a GPU in use."""
    # one step more than is taken, so that the last one draws ahead as the others do
    tilt = config.tilt if config.train.algorithm == "tilt" else TiltSettings()
    train = replace(config.train, steps=steps + 1, writers=())
    config = replace(config, train=train, merge=MergeSettings(), tilt=tilt)  # of several runs, the first
    lines: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with (
        RunFolder.open(path, config, False, ranks) as folder,
        open_run(folder, ranks) as (trainer, recorder),
        gc_at_steps() as collect,
    ):
        for _ in range(steps):
            lines.append(trainer.step()[1])
            recorder.line(lines[-1], trainer.scheduler.dropped)
            collect(trainer.steps_done)
    if torch.cuda.is_available():
        lines[-1]["cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return lines


def summary(rounds: Sequence[Sequence[Mapping[str, Any]]], first: Sequence[float]) -> dict[str, Any]:
    """Summary of a contender; `first` are the medians of the first one's rounds.

    Seconds of every counted step by round, and medians over all of them; `times_as_fast` is median, least and most over
    the rounds.
    """
    lines = [line for each in rounds for line in each]
    times = [line["time"] for line in lines]
    ratios = [
        one / statistics.median(line["time"]["step"] for line in each) for one, each in zip(first, rounds, strict=True)
    ]
    return {
        "step_s": statistics.median(time["step"] for time in times),
        "times_as_fast": [statistics.median(ratios), min(ratios), max(ratios)],
        "stage_s": {stage: statistics.median(time.get(stage, 0.0) for time in times) for stage in STAGES},
        "tokens_per_s": statistics.median(time["tokens_per_s"] for time in times),
        "clips_per_s": statistics.median(time["clips_per_s"] for time in times),
        "rss_mb": max(line["health"]["rss_mb"] for line in lines),
        "cuda_mb": max(line.get("cuda_mb", 0.0) for line in lines),
        "steps_s": [[line["time"]["step"] for line in each] for each in rounds],
    }


def as_text(found: Mapping[str, Any]) -> str:
    """A line a contender."""
    rows = [["", "s a step", "times as fast", "clips/s", "tokens/s", *(f"{stage}, s" for stage in STAGES), "MB"]]
    for name, each in found["contenders"].items():
        middle, least, most = each["times_as_fast"]
        rows.append([
            name, f"{each['step_s']:.3f}", f"{middle:.2f} ({least:.2f} - {most:.2f})", f"{each['clips_per_s']:.1f}",
            f"{each['tokens_per_s']:.0f}", *(f"{each['stage_s'][stage]:.3f}" for stage in STAGES),
            f"{each['cuda_mb'] or each['rss_mb']:.0f}",
        ])  # fmt: skip
    return text_table(rows, numbers=True)
