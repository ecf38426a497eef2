"""A progress bar for jobs that count."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is fed `(done, total)`; where stderr is no terminal it shows nothing."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each stage that is fed `(stage, done, total)`; where stderr is no terminal, a line when a
    stage ends."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = sys.stderr.isatty()
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(file=sys.stderr), disable=not terminal) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)
            if not terminal and done == total:
                print(f"{stage}: {total} done", file=sys.stderr, flush=True)

        yield show
