"""Records of a run: metrics, checkpoints, the trace, the live view. Rank 0 tells, the others are silent."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.hardware import memory_mb
from fastsmart.policy.checkpoints import Snapshot, best_of
from fastsmart.run.display import Display, Silent
from fastsmart.run.folder import LIVE_FILE, TRACE_FILE, RunFolder
from fastsmart.run.trace import Trace
from fastsmart.run.writers import Writer, open_writers

LIVE_EVERY_S = 0.5
EVENTS = ("workers_replaced", "clips_failed", "stale_dropped", "failed_saves")


class RenderWorkers(Protocol):
    """Processes that render, as `fastsmart.audio.RenderPool` is; `replaced` and `failed` count since the start."""

    replaced: int
    failed: int

    def pop_events(self) -> list[str]: ...
    def heartbeats(self) -> list[dict[str, float]]: ...


class Recorder:
    """Writes the files of a run, off the critical path where they are large. A context manager.

    A disk that is full stops nothing: lines of metrics wait in memory and checkpoints are tried again with the next
    one; what has been missed is told in `health`. Only the end of the run raises.

    writing : the thread that writes checkpoints and the trace
    pool    : whose faults are counted in `health`; None where nothing is rendered
    display : shown on rank 0
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: Ranks,
        trace: Trace,
        writing: Executor,
        pool: RenderWorkers | None = None,
        display: Display | None = None,
    ) -> None:
        self.folder, self.ranks, self.trace, self.writing, self.pool = folder, ranks, trace, writing, pool
        self.show: Display = display if display and self.ranks.leader else Silent()
        names = folder.config.train.writers if self.ranks.leader else ()
        self.writers: list[Writer] = open_writers(names, folder.path, folder.checkpoints.step)
        self._counts: Counter[str] = Counter()  # of EVENTS since the last line
        self.best = folder.checkpoints.best()[1]
        self.saved = folder.checkpoints.step
        self._notes: list[str] = []
        self._seen = (0, 0)  # workers replaced, clips given up
        self._writing: Future[None] | None = None
        self._lock = threading.Lock()
        self._live: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "steps": folder.config.train.steps,
        }
        self._live_s = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        self._stack.enter_context(self.show)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self._writing:
            self._writing.exception()
        for writer in self.writers:
            writer.close()
        if self.ranks.leader:
            with suppress(OSError):
                (self.folder.path / LIVE_FILE).unlink(missing_ok=True)

    def start(self, step: int, provenance: dict[str, Any]) -> None:
        """Begin, or go on after a step; raises UserError where a resumed run has other inputs than it began with."""
        if self.ranks.leader:
            self.folder.write_provenance(provenance)
            undone = [line for line in self.folder.metrics.lines() if line["step"] > step]
            for health in (line.get("health", {}) for line in undone):  # what happened has happened
                self._counts.update({name: health.get(name, 0) for name in EVENTS})
                self._notes += health.get("notes", [])
            self.folder.metrics.forget_after(step)
            if step:
                self._notes.append(f"resumed after step {step}")
        self.show.start(self.folder.config, self.folder.path, step)
        if self.ranks.leader:
            for text in self.folder.odd():
                self.note(text)

    def stage(self, name: str, done: int, total: int) -> None:
        """Tell how far a stage is; called from any thread."""
        self.show.stage(name, done, total)
        self._tell_live(stage=name, done=done, total=total)

    def note(self, text: str) -> None:
        """Something a person should know: shown now, and kept in the next line of metrics."""
        self._notes.append(text)
        self.show.message(text)
        if not self.ranks.leader:
            print(f"rank {self.ranks.rank}: {text}", file=sys.stderr, flush=True)

    def line(self, line: dict[str, Any], stale_dropped: int = 0) -> None:
        """Finish a step's line with its `health`, and put it wherever it belongs."""
        line["health"] = self.health(stale_dropped)
        if not self.ranks.leader:
            return
        try:
            self.folder.metrics.append(line)
        except UserError as error:
            self.note(f"metrics wait in memory: {error}")
        for writer in self.writers:
            writer.write(line)
        self.show.line(line)
        self._live_s = 0.0
        self._tell_live(step=line["step"])

    def health(self, stale_dropped: int) -> dict[str, Any]:
        """Memory and file descriptors of the largest rank, and what has gone wrong on any since the last line."""
        pool = self.pool
        seen = (pool.replaced, pool.failed) if pool else (0, 0)
        if pool:
            for text in pool.pop_events():
                self.note(text)
        mine = [*memory_mb(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0]
        mine += [now - before for now, before in zip(seen, self._seen, strict=True)] + [stale_dropped]
        self._seen = seen
        rows = self.ranks.gather(np.array([mine], np.float64), self.ranks.world)
        rss_mb, shm_mb, files = rows[:, :3].max(axis=0)
        replaced, failed, stale = rows[:, 3:].sum(axis=0)
        self._collect_write()
        health: dict[str, Any] = {"rss_mb": round(rss_mb, 1), "shm_mb": round(shm_mb, 1), "files": int(files)}
        self._counts.update(dict(zip(EVENTS, map(int, (replaced, failed, stale)), strict=False)))
        health |= {name: count for name, count in self._counts.items() if count}
        self._counts.clear()
        if self._notes:
            health["notes"], self._notes = self._notes, []
        return health

    def better(self, reward: float | None, kept: float | None = None) -> bool:
        """Whether this held-out reward is the best so far of policies that keep the floor of diversity.

        kept : held-out diversity as a share of the untrained policy's; None = not measured
        """
        floor = self.folder.checkpoints.floor
        if reward is None or not reward > self.best:
            return False
        if best_of({"": (reward, kept)}, floor) is None:
            self.note(f"held-out diversity is {kept:.0%} of the base's, under the floor of {floor:.0%}: not the best")
            return False
        self.best = reward
        return True

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint and the trace in the background, after the one before."""
        if self.ranks.leader:
            self._collect_write(wait=True)
            self._writing = self.writing.submit(self._write, snapshot)
        self.saved = snapshot.step

    def finish(self) -> None:
        """Wait until everything is on disk; raises UserError where it cannot be."""
        if self._writing:
            self._writing.result()
            self._writing = None
        if self.ranks.leader:
            self.folder.metrics.flush()
            self.trace.write(self.folder.path / TRACE_FILE)

    def _write(self, snapshot: Snapshot) -> None:
        self.folder.checkpoints.write(snapshot)
        self.trace.write(self.folder.path / TRACE_FILE)

    def _collect_write(self, wait: bool = False) -> None:
        """Look how the last write went, if it is over."""
        if not self._writing or not (wait or self._writing.done()):
            return
        try:
            self._writing.result()
        except UserError as error:
            self._counts["failed_saves"] += 1
            self.note(f"a checkpoint could not be saved: {error}")
        self._writing = None

    def _tell_live(self, **now: Any) -> None:
        """Rewrite, now and then, the file that `fastsmart top` looks at; a full disk only makes the view stale."""
        with self._lock:
            self._live |= now
            if not self.ranks.leader or time.monotonic() - self._live_s < LIVE_EVERY_S:
                return
            self._live_s = time.monotonic()
            workers = self.pool.heartbeats() if self.pool else []
            text = json.dumps(self._live | {"time": time.time(), "workers": workers})
            part = self.folder.path / f".{LIVE_FILE}.part"
            with suppress(OSError):
                part.write_text(text, encoding="utf-8")
                part.replace(self.folder.path / LIVE_FILE)
