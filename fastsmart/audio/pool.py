"""`RenderPool`: the renderer on all cores, in processes that may die without taking the run along.

Notes go to a worker as raw bytes over its pipe; audio comes back in one block of shared memory that has no name, so
there is nothing to leave behind however a process ends. Nothing is pickled, and the caller's main module is not
imported again, which is why the workers are plain subprocesses and not `multiprocessing.Process`.

Shape letters: N clips, T samples.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing import connection as mp_connection
from pathlib import Path

import numpy as np

from fastsmart.audio.batch import AudioBatch
from fastsmart.audio.fluidsynth import load_library
from fastsmart.audio.settings import RenderSettings
from fastsmart.audio.soundfont import find_soundfont
from fastsmart.audio.tinysoundfont import tinysoundfont_module
from fastsmart.audio.worker import READY, REFUSED, REPORT, pack_task
from fastsmart.errors import UserError
from fastsmart.machine.workers import start_worker
from fastsmart.notes import NoteBatch

IN_HAND = 4  # clips a worker holds at most: enough to stay busy while the caller samples a token
PIPE_BYTES = 32 * 1024  # and bytes, far below what Linux lets wait in a pipe, so that sending does not block
TRIES = 2  # a clip whose worker dies this often is given up
START_TRIES = 3  # workers in a row that may die while loading the soundfont
START_TIMEOUT_S = 60.0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: mp_connection.Connection
    ready: bool = False
    in_hand: deque[tuple[int, int]] = field(default_factory=deque)  # clip and bytes of its task, the one at work first
    since_s: float = field(default_factory=time.monotonic)  # when it started, or took up the clip at work

    @property
    def bytes_in_hand(self) -> int:
        return sum(size for _, size in self.in_hand)


class RenderPool:
    """Renders up to `capacity` clips at a time: `submit` them as they come, then `wait` for the batch.

    A worker that dies, or hangs for `clip_timeout_s`, is replaced and its clips are rendered again, with the same
    samples; a clip that this happens to twice becomes NaN, and its MIDI is written to the folder `quarantine`.

    replaced, failed : workers replaced and clips given up so far

    Owns processes and memory: a context manager, or call `close`, which also happens when the interpreter ends. Not
    for several threads at once.

    Raises UserError when FluidSynth or the soundfont cannot be used (at once, or from `poll` and `wait`).
    """

    def __init__(self, settings: RenderSettings, capacity: int, quarantine: Path | None = None) -> None:
        check_backend(settings)  # say what is missing here, not in a worker
        self.soundfont = find_soundfont(settings.soundfont)
        self.settings = settings
        self.capacity = capacity
        self.quarantine = quarantine
        self.replaced = 0
        self.failed = 0
        self._memory_fd = _anonymous_memory(max(1, capacity * settings.max_samples) * np.float32().itemsize)
        self._block = np.frombuffer(mmap.mmap(self._memory_fd, 0), np.float32)
        self._block = self._block[: capacity * settings.max_samples].reshape(capacity, settings.max_samples)
        self._lengths = np.zeros(capacity, np.int64)
        self._pieces: dict[int, tuple[NoteBatch, int]] = {}  # clips submitted and not waited for
        self._queue: deque[int] = deque()  # clips no worker has in hand
        self._strikes: dict[int, int] = {}
        self._done: set[int] = set()
        self._unseen: list[int] = []  # clips done since the last poll
        self._events: list[str] = []
        self._work: deque[tuple[int, float, float]] = deque(maxlen=10_000)
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._workers, self._memory_fd)
        for _ in range(max(1, min(settings.worker_count, capacity))):
            self._workers.append(self._start())

    def submit(self, index: int, notes: NoteBatch, piece: int = 0) -> None:
        """Have one piece of `notes` rendered as clip `index` of the batch; returns at once."""
        if not 0 <= index < self.capacity:
            raise ValueError(f"clip {index} does not fit a pool of {self.capacity}")
        if index in self._pieces:
            raise ValueError(f"clip {index} was submitted before")
        self._pieces[index] = (notes, piece)
        self._queue.append(index)
        self._serve_workers(timeout_s=0.0)

    def poll(self, timeout_s: float = 0.0) -> list[int]:
        """The clips finished (or given up) since the last call, in the order they ended; `gather` hands them out.

        Waits for the next report of a worker up to `timeout_s`, where none has been finished since.
        """
        self._serve_workers(timeout_s=0.0 if self._unseen else timeout_s)
        unseen, self._unseen = self._unseen, []
        return unseen

    def gather(self, indices: Sequence[int]) -> AudioBatch:
        """Finished clips, copied out of the shared memory."""
        missing = sorted(set(indices) - self._done)
        if missing:
            raise ValueError(f"clips {missing} are not finished")
        rows = np.asarray(indices, np.int64)
        lengths = self._lengths[rows]
        return AudioBatch(self._block[rows, : lengths.max(initial=0)], lengths, self.settings.sample_rate)

    def wait(self, progress: Callable[[int], None] | None = None) -> AudioBatch:
        """All clips submitted, 0 to the highest index, as a copy; the pool is empty again afterwards.

        `progress` is called with the number of finished clips whenever it grows. Raises ValueError when an index in
        between was never submitted.
        """
        told = -1
        while True:
            self._serve_workers(timeout_s=0.0 if told < 0 else 1.0)
            if progress and len(self._done) > told:
                progress(len(self._done))
            told = len(self._done)
            if told == len(self._pieces):
                break
        batch = self.gather(range(max(self._pieces, default=-1) + 1))
        self.clear()
        return batch

    def render(self, notes: NoteBatch, progress: Callable[[int], None] | None = None) -> AudioBatch:
        """All pieces of a batch as clips in their order; `progress` as of `wait`."""
        for i in range(len(notes)):
            self.submit(i, notes, i)
        return self.wait(progress)

    def clear(self) -> None:
        """Forget the finished clips: the pool is empty again. Raises ValueError while a clip is under way."""
        if len(self._done) < len(self._pieces):
            raise ValueError(f"{len(self._pieces) - len(self._done)} clips are not finished")
        self._pieces.clear()
        self._strikes.clear()
        self._done.clear()
        self._unseen.clear()

    def pop_events(self) -> list[str]:
        """Events of workers and clips since the last call, a sentence each."""
        events, self._events = self._events, []
        return events

    def pop_work(self) -> list[tuple[int, float, float]]:
        """Process id, start and end (seconds of `time.monotonic`) of every clip rendered since the last call."""
        work = list(self._work)
        self._work.clear()
        return work

    def heartbeats(self) -> list[dict[str, float]]:
        """State of each worker: its process id, the clips it has in hand, the seconds since it last gave a sign."""
        now = time.monotonic()
        return [
            {"pid": w.process.pid, "in_hand": len(w.in_hand), "silent_s": round(now - w.since_s, 1) if w.in_hand else 0}
            for w in list(self._workers)
        ]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the workers and give the memory back; clips under way are dropped."""
        self._finalizer()
        self._block = np.empty((0, 0), np.float32)

    def __enter__(self) -> RenderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _serve_workers(self, timeout_s: float) -> None:
        """Take in what workers report, waiting for it up to `timeout_s`; replace the dead; hand out clips."""
        if not self._finalizer.alive:
            raise RuntimeError("this pool is closed")
        reporting = mp_connection.wait([worker.connection for worker in self._workers], timeout_s)
        for place, worker in enumerate(self._workers):
            alive = worker.connection not in reporting or self._read_reports(worker)
            if not alive or time.monotonic() - worker.since_s > self._patience_s(worker):
                self._replace(place, hung=alive)
        self._hand_out()

    def _patience_s(self, worker: _Worker) -> float:
        if not worker.ready:
            return START_TIMEOUT_S
        return self.settings.clip_timeout_s if worker.in_hand else float("inf")

    def _read_reports(self, worker: _Worker) -> bool:
        """Read all reports of a worker; False when it is dead."""
        try:
            while worker.connection.poll():
                report = worker.connection.recv_bytes()
                index, length = REPORT.unpack_from(report)
                if index == REFUSED:
                    raise UserError(report[REPORT.size :].decode())
                start_s, worker.since_s = worker.since_s, time.monotonic()
                if index == READY:
                    worker.ready = True
                    self._failed_starts = 0
                else:
                    self._work.append((worker.process.pid, start_s, worker.since_s))
                    worker.in_hand.popleft()
                    self._finish(index, length)
        except (EOFError, ConnectionError):
            return False
        return True

    def _finish(self, index: int, length: int) -> None:
        self._lengths[index] = length
        self._done.add(index)
        self._unseen.append(index)

    def _replace(self, place: int, hung: bool = False) -> None:
        worker = self._workers[place]
        _kill(worker)
        clips = [index for index, _ in worker.in_hand]
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts == START_TRIES:
                raise UserError(
                    f"render workers die while loading {self.soundfont} (exit status {worker.process.returncode}): "
                    "there may be too little memory, lower audio.workers"
                )
        elif clips:
            self._strikes[clips[0]] = self._strikes.get(clips[0], 0) + 1
            if self._strikes[clips[0]] == TRIES:
                self._give_up(clips.pop(0))
        name, status = f"render worker {place} (process {worker.process.pid})", worker.process.returncode
        fate = f"hung for {time.monotonic() - worker.since_s:.0f} s" if hung else f"died (exit status {status})"
        self._events.append(f"{name} {fate} {'over a clip' if worker.in_hand else 'idle'} and was replaced")
        self._queue.extendleft(reversed(clips))
        self._workers[place] = self._start()
        self.replaced += 1

    def _give_up(self, index: int) -> None:
        self._block[index] = np.nan
        self._finish(index, self.settings.empty_samples)
        self.failed += 1
        self._events.append(f"clip {index} ended {TRIES} workers and was given up")
        if self.quarantine is not None:
            self.quarantine.mkdir(parents=True, exist_ok=True)
            names = (self.quarantine / f"clip-{n:04d}.mid" for n in range(self.failed, sys.maxsize))
            notes, piece = self._pieces[index]
            notes.to_midi(piece, next(path for path in names if not path.exists()))

    def _hand_out(self) -> None:
        while self._queue:
            task = pack_task(self._queue[0], *self._pieces[self._queue[0]])
            free = [
                worker
                for worker in self._workers
                if len(worker.in_hand) < IN_HAND
                and (worker.bytes_in_hand + len(task) <= PIPE_BYTES or (worker.ready and not worker.in_hand))
            ]
            if not free:
                return
            worker = min(free, key=lambda worker: worker.bytes_in_hand)
            if not worker.in_hand and worker.ready:
                worker.since_s = time.monotonic()
            worker.in_hand.append((self._queue.popleft(), len(task)))
            try:
                worker.connection.send_bytes(task)
            except ConnectionError:
                self._read_reports(worker)  # what it finished before it died
                self._replace(self._workers.index(worker))

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        settings = asdict(self.settings) | {"soundfont": str(self.soundfont)}
        ours.send_bytes(json.dumps(settings).encode())
        process = start_worker("fastsmart.audio.worker", theirs.fileno(), self._memory_fd)
        theirs.close()
        return _Worker(process, ours)


def check_backend(settings: RenderSettings) -> None:
    """Raises UserError when this machine lacks what the backend needs; a stored bank plays without FluidSynth."""
    if settings.backend == "tinysoundfont":
        tinysoundfont_module()
        return
    try:
        load_library()
    except UserError:
        if settings.backend != "bank":
            raise
        from fastsmart.audio.bank import NoteBank  # not above: only a bank needs the compiler's libraries

        with NoteBank(settings) as bank:
            if not bank.info.notes:
                raise


def _kill(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()  # it has nothing to save
    worker.process.wait()


def _end(owner_pid: int, workers: list[_Worker], memory_fd: int) -> None:
    if os.getpid() != owner_pid:  # a fork of the owner that exits must not end the owner's workers
        return
    for worker in workers:
        _kill(worker)
    os.close(memory_fd)


def _anonymous_memory(size: int) -> int:
    """A file descriptor of `size` zero bytes that can be mapped by several processes and has no name."""
    if hasattr(os, "memfd_create"):  # Linux; unlike /dev/shm it has no size limit of its own in containers
        descriptor = os.memfd_create("fastsmart-audio")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        wanted = f"{size / 2**20:.1f} MB that rendering shares with its workers cannot be had"
        raise UserError(
            f"the {wanted}: {error.strerror}; raise the limit (ulimit -f), or render fewer clips"
        ) from error
    return descriptor
