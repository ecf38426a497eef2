"""SIGKILL at random instants of every command that writes, until each ends as if nobody had disturbed it.

    python bench/kills.py --kills 200 --out bench/results/kills.json
    python bench/kills.py --kills 20 --job score --job evaluate

Each job is run once in peace. Then the same command is started in one folder again and again and killed, with all of
its children, after a random time below that of a whole run; every few kills it is let through, and what it leaves
is compared: metrics, weights, tables, lines. The jobs take turns; counts of an earlier start in OUT are
added to, so that what was interrupted goes on. A start that refuses to go on (exit code 2) must say so in one sentence;
then a fresh folder is tried. After each such folder the command is also run where no file may grow beyond some size,
which is what a full disk is to it, on a read-only disk (where this is run by root), and twice at once in one folder.
Processes are forked from one that has imported fastsmart, so that most of them are killed at work, not at start.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import as_commands  # noqa: F401  # isort: skip  # before torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small, and much runs side by side

import torch
from kills_jobs import Job, jobs, prepare
from results import write_result

from fastsmart import commands  # noqa: F401  # imported before the forks
from fastsmart.cli import main as command_line
from fastsmart.study.evaluation import EVALUATION_FILE
from fastsmart.study.sweep import run_sweep  # noqa: F401  # brings everything that trains and evaluates

PATIENCE_S = 1200.0  # after which a command is said to hang
EACH = 6  # kills of a folder, at most, before it is let through
EVALUATE = [  # with outputs of five seconds, to be listened to
    *("evaluate", "--policy", "a=pop909-tiny", "--policy", "b=pop909-tiny", "-n", "6", "--best-of", "0"),
    *("--set", "sampling.max_tokens=150", "--set", "prompts.source=procedural", "--set", "prompts.tempo_max=70"),
    *("--set", "prompts.tempo_min=50", "--set", "reward.terms={variety=1}"),
]
PIPE_BYTES = 2**20


class LostError(RuntimeError):
    """What a disturbed command has lost, or where it failed."""


def make_read_only(folder: Path) -> bool:
    """Let this process, and no other, find a folder on a read-only disk; whether it may do so (root may)."""
    libc, place = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)
    private, bind, read_only = 0x44000, 0x1000, 0x21  # MS_REC | MS_PRIVATE, MS_BIND, MS_REMOUNT | MS_RDONLY
    return not (
        libc.unshare(0x20000)  # CLONE_NEWNS
        or libc.mount(None, b"/", None, private, None)
        or libc.mount(place, place, None, bind, None)
        or libc.mount(None, place, None, bind | read_only, None)
    )


class Started:
    """A command in a forked process that leads a group of its own.

    cache     : the command's cache folder, which is also what it writes into
    largest   : bytes that a file of it may have: what is longer finds the disk full
    read_only : the folder is on a read-only disk to it; exit code 0 where that cannot be arranged
    """

    def __init__(self, words: list[str], cache: Path, largest: int | None = None, read_only: bool = False) -> None:
        self.said_fd, sink = os.pipe()  # no file, which a full disk would cut
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.pid = os.fork()
        if not self.pid:
            self._run(words, cache, sink, largest, read_only)
        os.close(sink)

    def _run(self, words: list[str], cache: Path, sink: int, largest: int | None, read_only: bool) -> NoReturn:
        code = 70
        try:
            os.setpgid(0, 0)
            os.environ["FASTSMART_CACHE"] = str(cache)
            for stream in (1, 2):
                os.dup2(sink, stream)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w") for stream in (1, 2))
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            if read_only and not make_read_only(cache):
                os._exit(0)
            code = command_line(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self, within_s: float) -> tuple[int | None, str]:
        """Exit code (negative for a signal) and what was said, if it ends by itself in that time; else it is killed,
        with its children, and its exit code is None."""
        until, code = time.monotonic() + within_s, None
        while time.monotonic() < until:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if code is None:
            os.waitpid(self.pid, 0)
        os.set_blocking(self.said_fd, False)
        with suppress(BlockingIOError), os.fdopen(self.said_fd, "rb", buffering=0) as said:
            return code, (said.read(PIPE_BYTES) or b"").decode("utf-8", "replace")[-3000:]
        return code, ""


def apart(call: Callable[[], None]) -> None:
    """Run something in a forked process."""
    pid = os.fork()
    if not pid:
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise LostError("the input could not be made")


@dataclass
class Disturbed:
    """A job, what it leaves in peace, and what has been done to it. Raises LostError where anything was lost."""

    name: str
    job: Job
    folder: Path
    chance: random.Random
    seconds: float = 0.0
    expected: Any = None

    def in_peace(self) -> None:
        """Run it once undisturbed."""
        out, began = self._fresh("peace"), time.monotonic()
        code, said = self._run(out, PATIENCE_S)
        if code != 0:
            raise LostError(f"{self.name} fails in peace, exit code {code}: {said}")
        self.seconds, self.expected = time.monotonic() - began, self.job.result(out)

    def turn(self, most: int) -> Iterator[Counter[str]]:
        """So many kills, in as many folders as that takes, then a full disk, a read-only disk and two at once; what was
        done, after each."""
        if self.expected is None:
            self.in_peace()
        while most > 0:
            counts = self.killed(self.chance.randint(1, min(EACH, most)))
            most -= counts["kills"]
            yield counts
        for disturbance in (self.on_a_full_disk, self.on_a_read_only_disk, self.twice_at_once):
            yield disturbance()

    def killed(self, planned: int) -> Counter[str]:
        """Start it again and again, kill it up to so many times, then let it through."""
        counts: Counter[str] = Counter()
        out = self._fresh("killed")
        while counts["kills"] < planned:
            began = time.monotonic()
            code, said = self._run(out, self.chance.uniform(0.0, 1.05 * self.seconds))
            if code is None:
                counts["kills"] += 1
            elif code == 0:
                if not counts["kills"]:  # the machine is less busy than it was
                    self.seconds = min(self.seconds, time.monotonic() - began)
                break
            else:
                counts["refusals"] += self._refused(code, said)
                out = self._fresh("killed")
        self._through(out, counts)
        return counts

    def on_a_full_disk(self) -> Counter[str]:
        """Start it where no file may grow beyond some size, then let it through."""
        counts = Counter({"full disks": 1})
        out, largest = self._fresh("full"), self.chance.choice((0, 50, 400, 3000, 20_000, 200_000))
        code, said = self._run(out, PATIENCE_S, largest)
        if code not in (0, 2) or "Traceback" in said:
            raise LostError(f"{self.name} on a disk that holds files of {largest} bytes, exit code {code}: {said}")
        self._through(out, counts)
        return counts

    def on_a_read_only_disk(self) -> Counter[str]:
        """Start it where its folder cannot be written."""
        out = self._fresh("read-only")
        code, said = Started(self.job.command(out), out, read_only=True).ended(PATIENCE_S)
        if code == 0 and not any(out.iterdir()):
            return Counter()  # this machine cannot arrange it
        self._refused(code, said)
        return Counter({"read-only disks": 1})

    def twice_at_once(self) -> Counter[str]:
        """Start it twice in one folder: one may be refused, and what comes out is what one alone leaves."""
        counts = Counter({"two at once": 1})
        out = self._fresh("twice")
        for twin in [Started(self.job.command(out), out) for _ in range(2)]:
            code, said = twin.ended(PATIENCE_S)
            if code != 0:
                counts["refusals"] += self._refused(code, said)
        self._through(out, counts)
        return counts

    def _fresh(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def _run(self, out: Path, within_s: float, largest: int | None = None) -> tuple[int | None, str]:
        return Started(self.job.command(out), out, largest).ended(within_s)

    def _refused(self, code: int | None, said: str) -> int:
        if code != 2 or said.count("fastsmart: ") != 1 or "Traceback" in said:
            raise LostError(f"{self.name} cannot go on, exit code {code}: {said}")
        return 1

    def _through(self, out: Path, counts: Counter[str]) -> None:
        """Let it end, in a fresh folder where it refuses to go on in this one, and compare."""
        code, said = self._run(out, PATIENCE_S)
        if code != 0 and not (self._ended(out) and code == 2):
            counts["refusals"] += self._refused(code, said)
            out = self._fresh("anew")
            code, said = self._run(out, PATIENCE_S)
            if code != 0:
                raise LostError(f"{self.name} fails in a fresh folder, exit code {code}: {said}")
        counts["let through"] += 1
        if (found := self.job.result(out)) != self.expected:
            difference = f"{str(found)[:1500]}\ninstead of\n{str(self.expected)[:1500]}"
            raise LostError(f"{self.name} ends otherwise:\n{difference}")

    def _ended(self, out: Path) -> bool:
        """Whether all is there already, so that the command has a reason to refuse."""
        try:
            return self.job.result(out) == self.expected
        except (OSError, ValueError, AssertionError):
            return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="over all jobs")
    parser.add_argument("--turn", type=int, default=12, help="of a job, before it is the next one's turn")
    parser.add_argument("--job", action="append", help="repeatable; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="JSON file of the counts, which are added to")
    options = parser.parse_args()
    earlier = json.loads(Path(options.out).read_text()) if options.out and Path(options.out).exists() else {}
    chance, seeds = random.Random(options.seed), [*earlier.get("seeds", []), options.seed]
    found = defaultdict(Counter[str], {name: Counter(counts) for name, counts in earlier.get("jobs", {}).items()})
    lost = dict[str, str](earlier.get("lost", {}))

    def record() -> None:
        if options.out:
            write_result(options.out, {"seeds": seeds, "torch": torch.__version__, "jobs": found, "lost": lost})

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        apart(lambda: prepare(base))  # the threads of a parent that has computed do not live on in its forks
        known = jobs(base)
        chosen = options.job or list(known)
        if {"listen make"} & set(chosen):
            code, said = Started([*EVALUATE, "--out", str(base / "evaluation")], base).ended(PATIENCE_S)
            assert code == 0, said
            assert (base / "evaluation" / EVALUATION_FILE).is_file()
        disturbed = {
            name: Disturbed(name, known[name], Path(folder) / f"job-{i}", chance) for i, name in enumerate(chosen)
        }
        while disturbed and (left := options.kills - sum(found[name]["kills"] for name in found)) > 0:
            name = min(disturbed, key=lambda name: found[name]["two at once"])  # whose turn it is
            try:
                for done in disturbed[name].turn(min(options.turn, left)):
                    found[name] += done
                    record()
            except LostError as error:
                lost[name] = str(error)
                del disturbed[name]
                record()
            print(f"{name}: {lost.get(name) or dict(found[name])}", flush=True)
    total = sum(found.values(), Counter[str]())
    print(f"{'lost in ' + ', '.join(lost) if lost else 'nothing lost'}: {dict(total)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
