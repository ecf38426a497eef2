"""Spans of every stage, with who worked and when, for the times in the metrics and as a Chrome trace.

A *lane* is something that can be busy or idle: the sampler, the renderer, the scorer, the trainer, one render worker.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastsmart.machine.files import write_atomic

LANES = {
    "sample": "sampler",
    "sync": "sampler",
    "decode": "decoder",
    "render": "renderer",
    "score": "scorer",
    "wait": "waiting",
    "update": "trainer",
    "reduce": "network",
}
RESOURCES = ("sampler", "renderer", "scorer", "trainer")  # whose idle share is worth a number
MERGE_S = 1e-4  # spans of one kind this close together are one: 64 draws of a token are one "sample"


@dataclass(frozen=True, slots=True)
class Span:
    """One stage at work, in seconds of `time.perf_counter`, which on Linux are those of `time.monotonic`.

    thread : the system's number of the thread that has told
    """

    stage: str
    lane: str
    start_s: float
    end_s: float
    thread: int


class _Ring:
    """The last `capacity` spans, in memory that is all there from the start, so that a long run does not grow by it."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self.start_s, self.end_s = array("d", bytes(8 * capacity)), array("d", bytes(8 * capacity))
        self.kind, self.thread = array("H", bytes(2 * capacity)), array("q", bytes(8 * capacity))
        self.kinds: dict[tuple[str, str], int] = {}  # stage and lane -> their number in `kind`

    def append(self, stage: str, lane: str, start_s: float, end_s: float, thread: int) -> int:
        """Its number, counted from the first of all."""
        at = self.count % self.capacity
        self.start_s[at], self.end_s[at], self.thread[at] = start_s, end_s, thread
        self.kind[at] = self.kinds.setdefault((stage, lane), len(self.kinds))
        self.count += 1
        return self.count - 1

    def lengthen(self, number: int, end_s: float) -> None:
        """Let a span that is still there end later."""
        if self.count - number <= self.capacity:
            self.end_s[number % self.capacity] = end_s

    def spans(self) -> Iterator[Span]:
        kinds = list(self.kinds)
        for number in range(max(0, self.count - self.capacity), self.count):
            at = number % self.capacity
            yield Span(*kinds[self.kind[at]], self.start_s[at], self.end_s[at], self.thread[at])


class Trace:
    """Collects spans from any thread; the last `capacity` are kept for the picture.

    rank : of this process, its row in a picture of several
    """

    def __init__(self, rank: int = 0, capacity: int = 20_000) -> None:
        self.rank = rank
        self._ring = _Ring(capacity)
        self._last: dict[str, tuple[int, str, float]] = {}  # of each lane the newest: number, stage, end
        self._seconds: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._since_s = time.perf_counter()
        self._excluding, self._excluded_s = False, 0.0
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what happens inside the block as `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, start, time.perf_counter())

    @contextmanager
    def excluding(self, stage: str) -> Iterator[None]:
        """Keep what happens inside the block out of the times: an evaluation between two steps. See
        `pop_excluded_s`."""
        start, self._excluding = time.perf_counter(), True
        try:
            yield
        finally:
            end, self._excluding = time.perf_counter(), False
            self._since_s += end - start
            self._excluded_s += end - start
            self.add(stage, start, end, lane="run")

    def add(self, stage: str, start_s: float, end_s: float, lane: str = "") -> None:
        """Count a span that has ended; with a `lane` of its own (a render worker) it is in the picture only."""
        with self._lock:
            if not lane:
                lane = LANES.get(stage, stage)
            if lane in LANES.values() and not self._excluding:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + end_s - start_s
                self._busy[lane] = self._busy.get(lane, 0.0) + end_s - start_s
            number, before, ended_s = self._last.get(lane, (0, "", 0.0))
            if before == stage and start_s - ended_s < MERGE_S:
                self._ring.lengthen(number, end_s)
            else:
                number = self._ring.append(stage, lane, start_s, end_s, threading.get_native_id())
            self._last[lane] = number, stage, end_s

    def pop_times(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of each stage, and the idle share of each resource, since the last call.

        A stage is counted when it ends. Resources that have never worked in this run are left out.
        """
        with self._lock:
            now = time.perf_counter()
            elapsed, self._since_s = now - self._since_s, now
            seconds, self._seconds = self._seconds, {}
            busy = {lane: self._busy[lane] for lane in RESOURCES if lane in self._busy}
            self._busy = dict.fromkeys(self._busy, 0.0)
        return seconds, {lane: max(0.0, 1.0 - spent / max(elapsed, 1e-9)) for lane, spent in busy.items()}

    def pop_excluded_s(self) -> float:
        """Seconds spent apart since the last call."""
        seconds, self._excluded_s = self._excluded_s, 0.0
        return seconds

    @property
    def spans(self) -> list[Span]:
        """Spans that are kept, in the order in which they were told."""
        with self._lock:
            return list(self._ring.spans())

    def events(self) -> Iterator[dict]:
        """The spans as Chrome trace events, times in microseconds; ui.perfetto.dev and chrome://tracing show them."""
        spans = self.spans
        lanes = {lane: i for i, lane in enumerate(dict.fromkeys([*LANES.values(), *(s.lane for s in spans)]))}
        yield _name("process_name", self.rank, 0, f"rank {self.rank}")
        yield from (_name("thread_name", self.rank, number, lane) for lane, number in lanes.items())
        for s in spans:
            row = {"pid": self.rank, "tid": lanes[s.lane]}
            yield {"name": s.stage, "ph": "X", **row, "ts": s.start_s * 1e6, "dur": (s.end_s - s.start_s) * 1e6}

    def write(self, path: Path) -> None:
        """Write the spans as Chrome trace JSON; raises UserError when the disk is full."""
        write_atomic(path, f'{{"traceEvents": [{", ".join(map(json.dumps, self.events()))}]}}')


def _name(kind: str, process: int, thread: int, name: str) -> dict:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
