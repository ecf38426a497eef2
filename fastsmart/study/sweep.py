"""Several runs that differ in a few settings, and the frontier of reward and diversity they draw.

A sweep is a TOML file:

    preset = "demo"                      # or config = "base.toml"; what all runs have in common
    set = ["train.prompts=4"]
    prompts = 200                        # outputs of each policy in the evaluation, the test openings in turn
    best_of = 4                          # of the baseline; 0 = none

    [grid]                               # every combination of these ...
    "grpo.beta" = [0.0, 0.04]
    "train.steps" = [40, 120]

    [[runs]]                             # ... and these
    name = "varied"
    set = ["reward.terms.variety=4"]

Its folder holds runs/NAME, each a run like any other, evaluation/ of all that are finished, figures/ (the frontier
among them) and report.html. All are judged by the rewards, prompts and soundfont they have in common.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmart.config import Config, read_config, shortened, toml_value, with_overrides
from fastsmart.errors import UserError
from fastsmart.machine.files import make_folder, read_file, write_atomic
from fastsmart.music.training_set import require_training_set
from fastsmart.presets import load_preset
from fastsmart.run.display import Display
from fastsmart.run.folder import RunFolder
from fastsmart.study.evaluate import OutputStore, evaluate, labelled
from fastsmart.study.evaluation import FORBIDDEN, is_label
from fastsmart.study.outputs import Progress
from fastsmart.study.report import drawn_figures, standalone, write_report
from fastsmart.trainer.loop import train

MOST_RUNS = 10_000
LONGEST_VALUE = 40  # characters of a value in the name of a run
METRES = ("prompts.time_signatures",)  # 3/4 is no path
UNNAMEABLE = dict.fromkeys([*FORBIDDEN, "="], "-")  # in the name of a policy
KEYS = ("preset", "config", "set", "prompts", "best_of", "grid", "runs")


@dataclass(frozen=True)
class Sweep:
    """Contents of a sweep file: the common config, and each run by name."""

    common: Config
    runs: dict[str, Config]
    prompts: int
    best_of: int


def read_sweep(path: str | Path) -> Sweep:
    """A sweep from its TOML file; raises UserError naming the file and the key that is wrong."""
    try:
        tree = tomllib.loads(read_file(path).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds a number of too many digits or too deep a list; write it smaller") from error
    try:
        return _sweep(tree, Path(path).parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    index: int | None = None,
    training_set: str = "",
    display: Callable[[], Display] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> int:
    """Train what is not trained yet, evaluate, and draw the frontier; returns 0, or 128 + signal when asked to stop.

    index        : only the run of that number, as one job of an array; who comes last draws the frontier
    training_set : as of `evaluate`

    Call it again to go on. Raises UserError when a run in `out` has other settings than the sweep asks for.
    """
    require_training_set(training_set, "--training-set")
    out, names = make_folder(out), list(sweep.runs)
    if index is not None and not 0 <= index < len(names):
        raise UserError(f"--index {index}: the sweep has runs 0 to {len(names) - 1}")
    for name in names if index is None else [names[index]]:
        folder = out / "runs" / name
        begun = RunFolder.begun(folder)
        if begun and RunFolder.reopen(folder).config != sweep.runs[name]:
            raise UserError(f"{folder} holds a run with other settings than the sweep asks for; choose another --out")
        if not _finished(folder):
            exit_code = train(sweep.runs[name], folder, begun, display() if display else None).exit_code
            if exit_code:
                return exit_code
        if index is not None:  # each job plays its own policy; the last finds what all have played
            OutputStore(out / "evaluation", sweep.common, sweep.prompts).play(name, str(folder), progress)
    finished = [name for name in names if _finished(out / "runs" / name)]
    if index is None or len(finished) == len(names):
        _compare(sweep, out, training_set, progress)
    return 0


def _compare(sweep: Sweep, out: Path, training_set: str, progress: Progress) -> None:
    """Evaluate the base policy and every finished run of a sweep, and write the frontier and the report."""
    base = sweep.common.policy.source
    finished = [f"{name}={out / 'runs' / name}" for name in sweep.runs if _finished(out / "runs" / name)]
    folder = out / "evaluation"
    found = evaluate(
        [base, *finished], folder, sweep.common, sweep.prompts, sweep.best_of, (), training_set, progress=progress
    )
    pictures = make_folder(out / "figures")
    for figure in (drawn := drawn_figures(found)):
        write_atomic(pictures / f"{figure['name']}.svg", standalone(figure["svg"]))
    write_report(found, out / "report.html", progress=progress, drawn=drawn)


def _require_form(tree: dict[str, Any]) -> None:
    """Raises UserError for the first key of a sweep file that is unknown or holds another kind of value."""
    for key in tree:
        if key not in KEYS:
            raise UserError(f"unknown key {key}; a sweep has {', '.join(KEYS)}")
    for key in ("preset", "config"):
        if not isinstance(tree.get(key, ""), str):
            raise UserError(f"{key} is {tree[key]!r}; it must be text")
    if not _are_texts(tree.get("set", [])):
        raise UserError(f"set is {tree['set']!r}; it must be a list of texts, such as ['train.steps=50']")
    if not isinstance(tree.get("grid", {}), dict):
        raise UserError(f"grid is {tree['grid']!r}; it must be a table, [grid], of a list of values for each key")
    runs = tree.get("runs", [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"runs is {runs!r}; write each run as a table, [[runs]]")
    for k, run in enumerate(runs):
        if not isinstance(run.get("name", ""), str) or not _are_texts(run.get("set", [])):
            raise UserError(f"runs[{k}] needs a name of its own and a list called set, such as ['grpo.beta=0']")


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _sweep(tree: dict[str, Any], folder: Path) -> Sweep:
    _require_form(tree)
    common = load_preset(tree["preset"]) if "preset" in tree else Config()
    if "config" in tree:
        common = read_config(folder / tree["config"], common)
    common = with_overrides(common, tree.get("set", []))
    runs = {}
    grid = tree.get("grid", {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f'grid."{key}" must be a list of values')
    if (size := math.prod(map(len, grid.values()))) > MOST_RUNS:
        raise UserError(f"grid makes {size:,} runs; a sweep has at most {MOST_RUNS:,}")
    named = [list(zip(_names(key, values), values, strict=True)) for key, values in grid.items()]
    for point in itertools.product(*named) if grid else ():
        name = "_".join(part for part, _ in point)
        settings = zip(grid, (value for _, value in point), strict=True)
        runs[name] = with_overrides(common, [f"{key}={_as_set(value)}" for key, value in settings])
    for k, run in enumerate(tree.get("runs", [])):
        if set(run) != {"name", "set"} or run["name"] in runs:
            raise UserError(f"runs[{k}] needs a name of its own and a list called set, such as ['grpo.beta=0']")
        runs[run["name"]] = with_overrides(common, run["set"])
    if not runs:
        raise UserError("no run to make; add a [grid] or some [[runs]]")
    for name in runs:
        if not is_label(name) or "=" in name:
            raise UserError(f"{shortened(name)!r} cannot name a policy, so not a run; give it another name in [[runs]]")
    labelled([common.policy.source, *(f"{name}=." for name in runs)])  # refuses the name of the base policy
    for key, least in (("prompts", 2), ("best_of", 0)):
        if key in tree and (not isinstance(tree[key], int) or tree[key] < least):
            raise UserError(f"{key} is {tree[key]!r}; it is a whole number from {least} up")
    return Sweep(common, runs, tree.get("prompts", 200), tree.get("best_of", 4))


def _names(key: str, values: list[Any]) -> list[str]:
    """Texts that the values of a key of the grid add to the names of its runs: of a path its last part."""
    last, plain, names = key.split(".")[-1], list[str](), list[str]()
    for value in values:
        parts = [Path(v).name if isinstance(v, str) and key not in METRES else v for v in _flat(value)]
        text = "+".join(str(p).lower() if isinstance(p, bool) else str(p) for p in parts)
        name = f"{last}-" + "".join(UNNAMEABLE.get(c, c) if c.isprintable() else "-" for c in text)[:LONGEST_VALUE]
        again = plain.count(name)  # two paths with one last part
        plain.append(name)
        names.append(f"{name}.{again + 1}" if again else name)
    return names


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [f"{key}-{part}" for key, v in value.items() for part in _flat(v)]
    return [part for v in value for part in _flat(v)] if isinstance(value, list) else [value]


def _as_set(value: Any) -> str:
    """A value of the grid as --set takes it; a text is read as --set reads it, so that "0.1" is a number, too."""
    return value if isinstance(value, str) else toml_value(value)


def _finished(folder: Path) -> bool:
    if not RunFolder.begun(folder):
        return False
    run = RunFolder.reopen(folder)
    return run.checkpoints.step >= run.config.train.steps
