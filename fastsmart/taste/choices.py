"""Choices of listeners on disk: `choices.jsonl`, one JSON object a line, on the disk before anything is learnt from it.

{"id": "5f2c...", "time": 1764000000.0, "listener": "ann", "left": "a1", "right": "b7", "choice": "left"}
{"id": "77d0...", "time": 1764000009.5, "listener": "ann", "undo": "5f2c..."}
"""

from __future__ import annotations

import json
import math
import os
import re
import time as clock
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastsmart.errors import UserError
from fastsmart.machine.files import os_errors_as_user_errors, read_file, sync

Answer = Literal["left", "right", "equal", "both_bad"]
ANSWERS = get_args(Answer)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # of a clip or a choice: it can be a file's name
LONGEST_LISTENER = 64  # characters
LONGEST_LINE = 2048  # bytes
MOST_BYTES = 2**28  # of a file of choices: a million of them


@dataclass(frozen=True)
class Choice:
    """One answer of a listener, or the taking back of one.

    id          : its name within the file
    time        : seconds since 1970
    listener    : name of a session; "" is a listener like any other
    left, right : ids of the clips; "" where only something is taken back
    choice      : the answer; "" where only something is taken back
    undo        : id of the choice that is taken back; "" = none. Taking back an undo lets its choice stand again
    """

    id: str
    time: float
    listener: str
    left: str = ""
    right: str = ""
    choice: str = ""
    undo: str = ""

    @staticmethod
    def new(listener: str, left: str = "", right: str = "", choice: str = "", undo: str = "") -> Choice:
        """A choice of this moment with an id of its own; raises UserError as `append_choice` does."""
        made = Choice(uuid.uuid4().hex[:16], round(clock.time(), 3), listener, left, right, choice, undo)
        if wrong := _wrong(made):
            raise UserError(f"a choice {wrong}")
        return made


@dataclass(frozen=True)
class ChoiceLog:
    """Choices as a file has them, oldest first, taken back or not; see `standing`.

    damaged : a sentence for every line that could not be read, naming it
    """

    choices: tuple[Choice, ...]
    damaged: tuple[str, ...] = ()


def append_choice(path: str | Path, choice: Choice) -> None:
    """Add a choice to the file, which is on the disk when this returns.

    A half-written line that a crash has left is ended first, so that it damages none but itself. Raises UserError for a
    choice that has no such answer, clip or listener, and where the file cannot be written; then it is as it was.
    """
    if wrong := _wrong(choice):
        raise UserError(f"a choice {wrong}")
    path = Path(path)
    tree = {key: value for key, value in vars(choice).items() if value != "" or key == "listener"}
    line = json.dumps(tree, ensure_ascii=False).encode("utf-8") + b"\n"
    with os_errors_as_user_errors(path):
        fresh = not path.exists()
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line
            try:
                if os.write(handle, line) != len(line):
                    raise OSError(28, os.strerror(28))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
        if fresh:
            sync(path.parent)


def read_choices(path: str | Path) -> ChoiceLog:
    """The choices of a file; one that is not there has none. Lines that are no choice are counted and named.

    Raises UserError when it cannot be read.
    """
    path = Path(path)
    try:
        content = read_file(path, MOST_BYTES)
    except FileNotFoundError:
        return ChoiceLog(())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; put back the file that was there") from error
    choices: dict[str, Choice] = {}
    damaged = []
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        choice = _parsed(text)
        if isinstance(choice, Choice) and choice.id in choices:
            choice = "has the id of an earlier line"
        if isinstance(choice, Choice):
            choices[choice.id] = choice
        else:
            damaged.append(f"line {number} of {path.name} {choice}")
    return ChoiceLog(tuple(choices.values()), tuple(damaged))


def standing(choices: Iterable[Choice]) -> list[Choice]:
    """The answers that have not been taken back, in their order."""
    known: dict[str, Choice] = {}
    taken_back: dict[str, bool] = {}

    def take_back(name: str, back: bool) -> None:
        for _ in range(len(known)):  # an undo of an undo of ...
            taken_back[name] = back
            if name not in known or not (name := known[name].undo):
                return
            back = not back

    for choice in choices:
        if choice.undo in known:
            take_back(choice.undo, True)
        known[choice.id] = choice
    return [c for c in known.values() if c.choice and not taken_back.get(c.id, False)]


def of_listener(choices: Iterable[Choice], listener: str | None) -> list[Choice]:
    """The choices of one listener; of all where it is None."""
    return [choice for choice in choices if listener is None or choice.listener == listener]


def _parsed(text: bytes) -> Choice | str:
    """A choice, or what is wrong with the line."""
    if len(text) > LONGEST_LINE:
        return f"is longer than {LONGEST_LINE:,} bytes"
    try:
        tree = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return "is cut short or no JSON"
    if not isinstance(tree, dict):
        return "is no JSON object"
    known = {key: tree[key] for key in ("id", "time", "listener", "left", "right", "choice", "undo") if key in tree}
    if missing := [key for key in ("id", "time", "listener") if key not in known]:
        return f'has no "{missing[0]}"'
    time = known["time"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time):
        return 'has a "time" that is no number'
    texts: dict[str, Any] = {key: value for key, value in known.items() if key != "time"}
    if odd := [key for key, value in texts.items() if not isinstance(value, str)]:
        return f'has a "{odd[0]}" that is no text'
    choice = Choice(time=float(time), **texts)
    return _wrong(choice) or choice


def _wrong(choice: Choice) -> str:
    """Fault of a choice, in words; "" = none."""
    if not NAME.fullmatch(choice.id):
        return 'has an "id" that is not 1 to 64 letters, digits, _ or -'
    if len(choice.listener) > LONGEST_LISTENER or not choice.listener.isprintable():
        return f'has a "listener" that is not up to {LONGEST_LISTENER} printable characters'
    if choice.undo and not NAME.fullmatch(choice.undo):
        return 'has an "undo" that is no id'
    if not choice.choice and choice.undo and not choice.left and not choice.right:
        return ""
    if choice.choice not in ANSWERS:
        return f'has a "choice" that is none of {", ".join(ANSWERS)}'
    for side in ("left", "right"):
        if not NAME.fullmatch(getattr(choice, side)):
            return f'has a "{side}" that is no id of a clip'
    return "compares a clip with itself" if choice.left == choice.right else ""
