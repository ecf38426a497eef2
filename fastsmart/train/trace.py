"""Who did what, and when: spans of every stage, for the times in the metrics and as a Chrome trace.

A *lane* is something that can be busy or idle: the sampler, the renderer, the scorer, the trainer, one render worker.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastsmart.files import write_atomic

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


@dataclass(slots=True)
class Span:
    """One stage at work, in seconds of `time.perf_counter`, which on Linux are those of `time.monotonic`.

    thread : the system's number of the thread that has told
    """

    stage: str
    lane: str
    start_s: float
    end_s: float
    thread: int


class Trace:
    """Collects spans from any thread; the last `capacity` are kept for the picture.

    rank : of this process, its row in a picture of several
    """

    def __init__(self, rank: int = 0, capacity: int = 20_000) -> None:
        self.rank = rank
        self.spans: deque[Span] = deque(maxlen=capacity)
        self._last: dict[str, Span] = {}  # the newest of each lane
        self._seconds: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._since_s = time.perf_counter()
        self._apart, self._apart_s = False, 0.0
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
    def apart(self, stage: str) -> Iterator[None]:
        """Keep what happens inside the block out of the times: an evaluation between two steps. See `take_apart`."""
        start, self._apart = time.perf_counter(), True
        try:
            yield
        finally:
            end, self._apart = time.perf_counter(), False
            self._since_s += end - start
            self._apart_s += end - start
            self.add(stage, start, end, lane="run")

    def add(self, stage: str, start_s: float, end_s: float, lane: str = "") -> None:
        """Count a span that has ended; with a `lane` of its own (a render worker) it is in the picture only."""
        with self._lock:
            if not lane:
                lane = LANES.get(stage, stage)
            if lane in LANES.values() and not self._apart:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + end_s - start_s
                self._busy[lane] = self._busy.get(lane, 0.0) + end_s - start_s
            last = self._last.get(lane)
            if last and last.stage == stage and start_s - last.end_s < MERGE_S:
                last.end_s = end_s
            else:
                self._last[lane] = Span(stage, lane, start_s, end_s, threading.get_native_id())
                self.spans.append(self._last[lane])

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
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

    def take_apart(self) -> float:
        """Seconds spent apart since the last call."""
        seconds, self._apart_s = self._apart_s, 0.0
        return seconds

    def events(self) -> list[dict]:
        """The spans as Chrome trace events, times in microseconds; ui.perfetto.dev and chrome://tracing show them."""
        with self._lock:
            spans = [(s.stage, s.lane, s.start_s, s.end_s) for s in self.spans]
        lanes = {lane: i for i, lane in enumerate(dict.fromkeys([*LANES.values(), *(lane for _, lane, *_ in spans)]))}
        named = [_name("process_name", self.rank, 0, f"rank {self.rank}")]
        named += [_name("thread_name", self.rank, number, lane) for lane, number in lanes.items()]
        return named + [
            {
                "name": stage,
                "ph": "X",
                "pid": self.rank,
                "tid": lanes[lane],
                "ts": start_s * 1e6,
                "dur": (end_s - start_s) * 1e6,
            }
            for stage, lane, start_s, end_s in spans
        ]

    def write(self, path: Path) -> None:
        """Write the spans as Chrome trace JSON; raises UserError when the disk is full."""
        write_atomic(path, json.dumps({"traceEvents": self.events()}))


def _name(kind: str, process: int, thread: int, name: str) -> dict:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
