"""Arguments of the command line that are checked when they are read, before any work."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from fastsmart.errors import UserError

LONGEST_MESSAGE = 300  # characters of what argparse says, which quotes what was given
NAMES = ("files", "answers", "policy", "midi", "evaluation", "run", "source", "sweep", "key", "prompt")
NEED_OUT = ("pretrain", "bench", "profile", "sample", "evaluate", "sweep", "live")  # the others know what to do without


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are sentences like all others."""

    def error(self, message: str) -> NoReturn:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}..."
        raise UserError(f"{message}; {self.prog} --help says what there is")


class Version(argparse.Action):
    """Print the installed version, which is looked up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> NoReturn:
        from importlib.metadata import version

        print(f"fastsmart {version('fastsmart')}")
        parser.exit()


def whole_option(
    parser: argparse.ArgumentParser, *names: str, within: tuple[int, int], default: int | None = None, **said: Any
) -> None:
    """Add an option for a whole number; reading it raises UserError naming the option for any outside the limits, both
    included."""

    def read(text: str) -> int:
        try:
            value = int(text) if len(text) <= 100 else None
        except ValueError:
            value = None
        if value is None:
            raise UserError(f"{names[-1]} is {_shown(text)}; it must be a whole number")
        if not within[0] <= value <= within[1]:
            bound = f"at least {within[0]:,}" if value < within[0] else f"at most {within[1]:,}"
            raise UserError(f"{names[-1]} is {_shown(text)}; it must be {bound}")
        return value

    parser.add_argument(*names, type=read, default=default, **said)


def real_option(
    parser: argparse.ArgumentParser,
    *names: str,
    within: tuple[float, float],
    above: bool = False,
    default: Any = None,
    **said: Any,
) -> None:
    """Add an option for finite numbers within the limits, the lower one excluded with `above`; raises as
    `whole_option` does."""
    low, high = within

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            least = f"above {low:g}" if above else f"from {low:g}"
            most = "" if math.isinf(high) else f" to {high:g}"
            raise UserError(f"{names[-1]} is {_shown(text)}; it must be a finite number {least}{most}")
        return value

    parser.add_argument(*names, type=read, default=default, **said)


def alphas(text: str) -> list[float]:
    """Numbers from 0 to 1 with commas between them; raises UserError naming what is none, or comes twice."""
    found: list[float] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            raise UserError(f"--alphas has {_shown(part)!r}; write numbers from 0 to 1, such as 0.25,0.5,1")
        if value in found:
            raise UserError(f"--alphas has {value:g} twice; name each once")
        found.append(value)
    return found


def weighted(text: str) -> tuple[str, float]:
    """NAME:WEIGHT as its two parts; raises UserError where the weight is missing or not from -2 to 2."""
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not colon or not name or not -2 <= weight <= 2:
        raise UserError(f"--add has {_shown(text)!r}; write a policy and a weight from -2 to 2, such as runs/other:0.1")
    return name, weight


def refuse_empty_names(options: argparse.Namespace) -> None:
    """Raises UserError for an empty path or name, as an unset variable of a shell leaves it: it would mean the folder
    one stands in; and for one with a NUL in it, which no file system knows."""
    for key, value in vars(options).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise UserError(f"{key} holds a NUL character; write it without")
            if text == "" and (key in NAMES or (key == "out" and options.command in NEED_OUT)):
                raise UserError(f"{key} is empty; name a file or folder (perhaps a variable of the shell is not set)")


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}... ({len(text):,} characters)"


def settings_options(p: argparse.ArgumentParser) -> None:
    """Add what chooses the settings of a run: a preset, a file, single keys."""
    p.add_argument("--preset", help="demo, diverse, dpo, notagen-dpo, smart-paper, smart-released or h200")
    p.add_argument("--config", help="TOML file with the keys that --dry-run prints")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="set one key; repeatable")
