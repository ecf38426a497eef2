"""Where a command is run on hostile input and held to the invariant.

Whatever the input: exit code 0 or 2, with 2 one sentence on stderr, no traceback, no more than some seconds of
processor time, no memory beyond reason, and every file that is not the command's own as it was.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsmart.cli import main

MOST_CPU_S = 30  # of one input
MOST_GROWTH_MB = 1500  # of the process, by one input
MOST_STDERR = 20_000  # characters, of many files' sentences


@dataclass(frozen=True)
class Case:
    """One hostile input.

    kind      : what was made hostile
    arguments : of the command, run in the stand's folder `work`, where `../base` holds whole files
    files     : written into `work` before
    many      : the command may say one sentence for each of several files
    """

    kind: str
    arguments: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    many: bool = False

    def to_json(self) -> str:
        """A line of the corpus."""
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        tree = {"kind": self.kind, "arguments": self.arguments, "files": files, "many": self.many}
        return json.dumps(tree)

    @staticmethod
    def of_json(line: str) -> Case:
        """A line of the corpus read."""
        tree = json.loads(line)
        files = {name: base64.b64decode(text) for name, text in tree["files"].items()}
        return Case(tree["kind"], tree["arguments"], files, tree["many"])


class TookTooLongError(BaseException):
    """Not an Exception, so that no command takes it for an error of its own."""


class Stand:
    """A folder with `base`, files that must stay as they are, and `work`, which every input gets empty."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.work = folder, folder / "base", folder / "work"
        self.base.mkdir(parents=True, exist_ok=True)
        self._before: dict[str, tuple[int, int]] = {}

    def seal(self) -> None:
        """Take down what `base` holds; from here on it must stay so."""
        self._before = _listed(self.base)

    def wrong(self, case: Case) -> str:
        """What an input broke of the invariant; "" = nothing."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name, content in case.files.items():
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        grown_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with _inside(self.work):
            code, _, err = run(lambda: main(case.arguments))
        grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown_mb) // 1024
        if said := judged(code, err, case.many):
            return said
        if grown_mb > MOST_GROWTH_MB:
            return f"took {grown_mb} MB"
        if _listed(self.base) != self._before:
            return f"changed files that are not its own: {_listed(self.base).items() ^ self._before.items()}"
        return ""


def judged(code: Any, err: str, many: bool) -> str:
    """What is wrong with how a command ended; "" = nothing."""
    if isinstance(code, str):
        return code
    if code not in (0, 2):
        return f"exit code {code}: {err[-500:]}"
    sentences = [line for line in err.splitlines() if line.startswith("fastsmart: ")]
    if code == 2 and not (sentences or many):
        return f"exit code 2 without a sentence: {err[-500:]!r}"
    if code == 2 and not many and (len(sentences) != 1 or len(sentences[0]) > 6000):
        return f"not one sentence: {err[:1000]!r}"
    if "Traceback" in err or len(err) > MOST_STDERR:
        return f"said too much: {err[:500]!r}"
    return ""


def run(call: Callable[[], Any]) -> tuple[Any, str, str]:
    """Exit code (or what was raised, in words), stdout and stderr of a call."""
    out, err = _stream(), _stream()
    code: Any
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _bounded():
        try:
            code = call()
        except SystemExit as left:
            code = left.code or 0
        except TookTooLongError:
            code = f"took more than {MOST_CPU_S} s: {traceback.format_exc()[-1500:]}"
        except BaseException:
            code = traceback.format_exc()[-3000:]
    return code, _text(out), _text(err)


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return "" if buffer.closed else buffer.getvalue().decode("utf-8", "replace")


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _listed(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    found: dict[str, tuple[int, int]] = {}
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    stat = entry.stat(follow_symlinks=False)
                    found[entry.path] = (stat.st_size, stat.st_mtime_ns)
    return found
