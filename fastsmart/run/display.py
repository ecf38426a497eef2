"""Displays of a run while it trains, for a person."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastsmart.config import Config
from fastsmart.words import counted

if TYPE_CHECKING:
    from rich.console import Group  # imported where there is a terminal

_STAGES = ("sample", "decode", "render", "score", "wait", "update", "reduce", "sync")


class Display(Protocol):
    """Somewhere to show a run; used as a context manager around it."""

    def start(self, config: Config, path: Path, step: int) -> None: ...
    def stage(self, name: str, done: int, total: int) -> None: ...
    def line(self, line: dict[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def __enter__(self) -> Display: ...
    def __exit__(self, *error: object) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, config: Config, path: Path, step: int) -> None:
        pass

    def stage(self, name: str, done: int, total: int) -> None:
        pass

    def line(self, line: dict[str, Any]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Plain(Silent):
    """One line a step, for logs and pipes."""

    def start(self, config: Config, path: Path, step: int) -> None:
        self.steps, self.began, self.first = config.train.steps, time.monotonic(), step
        print(f"{path}: {describe(config)}", flush=True)

    def line(self, line: dict[str, Any]) -> None:
        text = [f"step {line['step']}/{self.steps}"]
        if "reward" in line:
            text.append(summary(line))
            done = line["step"] - self.first
            left = (time.monotonic() - self.began) / done * (self.steps - line["step"])
            text.append(f"left {left / 60:.1f} min")
        if "eval" in line:
            text.append(held_out(line["eval"]))
        print("  ".join(text), flush=True)

    def message(self, text: str) -> None:
        print(text, flush=True)


class Terminal(Silent):
    """A live view: the step bar with the time left, the stage under way, the last step's numbers and evaluations."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(file=sys.stdout)
        self.steps = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps, left"), TimeRemainingColumn()
        )
        self.stages = Progress(TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn())
        self.now = self.stages.add_task("", total=1)
        self.last: dict[str, Any] = {}
        self.live = Live(get_renderable=self._view, console=self.console, refresh_per_second=5)

    def __enter__(self) -> Terminal:
        self.live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(None, None, None)

    def start(self, config: Config, path: Path, step: int) -> None:
        from rich.text import Text

        self.console.print(Text.assemble((str(path), "bold"), f"  {describe(config)}"))
        self.task = self.steps.add_task("steps", total=config.train.steps, completed=step)

    def stage(self, name: str, done: int, total: int) -> None:
        self.stages.update(self.now, description=name, completed=done, total=total)

    def line(self, line: dict[str, Any]) -> None:
        from rich.text import Text

        if "reward" in line:
            self.last = line
            self.steps.update(self.task, completed=line["step"])
        if "eval" in line:
            self.console.print(Text(f"step {line['step']:>4}  {held_out(line['eval'])}"))

    def message(self, text: str) -> None:
        from rich.text import Text

        self.console.print(Text(text))

    def _view(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 3))
        if self.last:
            table.add_row(Text(summary(self.last)))
            spent = self.last["time"]
            shares = [
                f"{s} {spent[s] / spent['step']:.0%}" for s in _STAGES if spent.get(s, 0.0) > 0.005 * spent["step"]
            ]
            table.add_row(Text("time: " + "  ".join(shares)))
        return Group(self.steps, self.stages, table)


def describe(config: Config) -> str:
    """The run in a line."""
    terms = " + ".join(f"{weight:g} {name}" for name, weight in config.reward.terms.items() if weight)
    completions = config.train.prompts * config.sampling.group
    return f"tuning {config.policy.source} for {terms}, {completions} completions a step"


def summary(line: dict[str, Any]) -> str:
    """The numbers of a step."""
    parts = [f"reward {_show(line['reward'])}"]
    parts += [f"{key} {_show(line[key])}" for key in ("kl", "entropy") if line.get(key) is not None]
    if line.get("kl_per_completion") is not None:
        parts.insert(2, f"({_show(line['kl_per_completion'], 2)} nats/clip)")
    spent = line["time"]
    parts.append(f"{line['notes']:.0f} notes/clip")
    if spent["tokens_per_s"]:  # steps between two rounds sample nothing
        parts.append(f"{spent['tokens_per_s']:.0f} tokens/s  {spent['clips_per_s']:.1f} clips/s")
    return "  ".join(parts)


def held_out(evaluation: dict[str, Any]) -> str:
    """The numbers of an evaluation."""
    terms = "  ".join(f"{name} {_show(m['mean'])}" for name, m in evaluation["terms"].items())
    reward, notes = evaluation["reward"], _show(evaluation["features"]["notes"]["mean"], 1)
    on = counted(evaluation["clips"], "output") + (
        f" on {counted(n, 'opening')}" if (n := evaluation.get("openings")) else ""
    )
    return f"held-out reward {_show(reward['mean'])} ± {_show(reward['std'])}  ({terms})  {notes} notes/clip  {on}"


def _show(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
