"""Metrics for TensorBoard and Weights & Biases, where a run asks for them; metrics.jsonl is written in any case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastsmart.errors import UserError


class Writer(Protocol):
    """Somewhere to put lines of metrics."""

    def write(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`; raises UserError where TensorBoard is not installed.

    step : the run's last; what an earlier life of it has written beyond is hidden
    """

    def __init__(self, run: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(_missing("tensorboard")) from error
        self.sink = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line):
            self.sink.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.sink.close()


class WeightsAndBiases:
    """A run called like the run's folder, with its files there; raises UserError where wandb is not installed.

    WANDB_MODE=offline keeps it on this machine. A resumed run goes on under the same id, where wandb itself leaves out
    steps that it has.
    """

    def __init__(self, run: Path, step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(_missing("wandb")) from error
        name = run.resolve().name
        self.sink = wandb.init(project="fastsmart", name=name, id=name, dir=str(run), resume="allow")

    def write(self, line: Mapping[str, Any]) -> None:
        self.sink.log(dict(numbers(line)), step=line["step"])

    def close(self) -> None:
        self.sink.finish()


WRITERS: dict[str, Callable[[Path, int], Writer]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_writers(names: Sequence[str], run: Path, step: int) -> list[Writer]:
    """The writers of these names, for a run that goes on after `step`; raises UserError where one is not installed."""
    return [WRITERS[name](run, step) for name in names]


def numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a line of metrics under its path, such as `time/sample`."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}{key}", float(value)


def _missing(package: str) -> str:
    return f"train.writers names {package}, which is not installed; pip install {package}, or take it out of the list"
