"""Threads that wait for each other, made to sleep sooner while another program wants some of their cores.

A thread of GNU OpenMP that waits looks for work 300,000 times, for some milliseconds, before it sleeps. On an idle
machine that is what makes a step quick; beside one busy process, which it holds a core against, a step takes many times
as long (docs/running.md). How often it looks is read once, when OpenMP is loaded, but where there are more of its
threads than cores it looks 100 times only ("GOMP_SPINCOUNT" in libgomp's manual). So a thread here reads every fifth of
a second how busy the cores are, and by whom, and while others are in the way it keeps some threads of OpenMP's that do
nothing. Results do not change with it: the threads that compute are as many as before.

Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastsmart.machine.hardware import WAITING, wait_by_watching

STAT = Path("/proc/stat")
INTERVAL_S = 0.2
# Shares of all cores' time
IDLE = 0.1  # with more idle time than this nobody is in the way
FEW = 0.08  # of others: with less than this neither
# Of others, in the mean of so many intervals in which threads slept soon: with more they are on every core, and looking
# longer is no worse. A process on one of two cores has a half there, one on each has 0.57 to 0.7
MOST, PATIENCE = 0.56, 5
NOT_AGAIN_S = 10.0  # after that


@dataclass(frozen=True)
class Usage:
    """Time that some cores have been busy, and that this process has had, in seconds since some moment."""

    at: float
    busy: float
    own: float

    @staticmethod
    def now(cores: frozenset[int], stat: Path = STAT) -> Usage:
        """That of these cores; raises OSError or ValueError where it cannot be read."""
        tick, busy = os.sysconf("SC_CLK_TCK"), 0.0
        for line in stat.read_text(encoding="ascii").splitlines():
            name, *times = line.split()
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
                user, nice, system, _, _, irq, softirq = map(int, times[:7])
                busy += (user + nice + system + irq + softirq) / tick
        return Usage(time.monotonic(), busy, time.process_time())


class Judge:
    """Judge of whether others want cores that this process's threads compute on, of `cores` they may use.

    sleeping : whether waiting threads are to sleep soon
    """

    def __init__(self, cores: int) -> None:
        self.cores, self.sleeping = cores, False
        self._others, self._not_before = deque[float](maxlen=PATIENCE), 0.0

    def hear(self, since: Usage, now: Usage) -> bool:
        """Learn what was used since then; gives `sleeping`."""
        total = self.cores * max(now.at - since.at, 1e-9)
        busy = (now.busy - since.busy) / total
        others = busy - (now.own - since.own) / total
        if self.sleeping:
            self._others.append(others)
        else:
            self._others.clear()
        if len(self._others) == PATIENCE and sum(self._others) > PATIENCE * MOST:
            self._not_before = now.at + NOT_AGAIN_S
        trouble = others > FEW and (self.sleeping or busy > 1 - IDLE)
        self.sleeping = trouble and now.at >= self._not_before
        return self.sleeping


class Crowd:
    """Threads of OpenMP's that do nothing: enough that there are more of them than `cores`."""

    def __init__(self, cores: int) -> None:
        self.cores, self._end = cores, threading.Event()
        self._keepers: list[threading.Thread] = []

    def come(self) -> None:
        """Be there; nothing happens where OpenMP computes with one thread."""
        import torch

        width = torch.get_num_threads()
        if width < 2 or self._keepers:
            return
        self._end = threading.Event()
        for _ in range(1 + (self.cores - width) // (width - 1)):
            ready = threading.Event()
            keeper = threading.Thread(target=_keep, args=(ready, self._end), name="crowd", daemon=True)
            keeper.start()
            ready.wait()
            self._keepers.append(keeper)

    def go(self) -> None:
        """Be gone."""
        self._end.set()
        for keeper in self._keepers:
            keeper.join()
        self._keepers = []


def _keep(ready: threading.Event, end: threading.Event) -> None:
    """Have a team of OpenMP's of one's own, for as long as this thread lives."""
    import torch

    torch.zeros(1 << 18).add_(1)  # large enough for all threads
    ready.set()
    end.wait()


class Watch(threading.Thread):
    """The thread that looks who is in the way, until the process ends."""

    def __init__(self) -> None:
        super().__init__(name="politeness", daemon=True)
        self.cores = frozenset(os.sched_getaffinity(0))
        self.crowd, self.judge = Crowd(len(self.cores)), Judge(len(self.cores))

    def run(self) -> None:
        with suppress(OSError, ValueError):  # a /proc of another kind
            before = Usage.now(self.cores)
            while True:
                time.sleep(INTERVAL_S)
                now = Usage.now(self.cores)
                if "torch" in sys.modules:
                    (self.crowd.come if self.judge.hear(before, now) else self.crowd.go)()
                before = now


_watch: list[Watch] = []


def begin() -> None:
    """Watch from now on, in place of a fixed number of looks; to be called before torch is imported.

    Nothing happens where the environment says how threads wait, where torch came first, with one core, and where there
    is no /proc/stat.
    """
    if _watch or len(getattr(os, "sched_getaffinity", lambda _: ())(0)) < 2 or not STAT.is_file():
        return
    if wait_by_watching():
        assert not any(name in os.environ for name in WAITING)
        _watch.append(Watch())
        _watch[0].start()
