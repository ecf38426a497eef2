"""A few steps of a run under torch's profiler: who worked when, on what, in how much memory, and who had to wait.

The steps are the first of the run that `train` would make of the same config, to the last bit, without its evaluations
and checkpoints. Stage spans, torch's operators and memory are put on one clock.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, _ExperimentalConfig

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.distributed import join_ranks
from fastsmart.machine.files import os_errors_as_user_errors, write_atomic
from fastsmart.machine.gc_control import gc_at_steps
from fastsmart.machine.hardware import memory_mb
from fastsmart.profiling.analysis import Interval, Memory, Operator, ProfiledSteps, summary
from fastsmart.run.folder import CONFIG_FILE, PROFILE_FILE, PROVENANCE_FILE, TRACE_FILE, RunFolder
from fastsmart.run.trace import LANES, Trace
from fastsmart.trainer.loop import open_run

MEMORY_EVERY_S = 0.05
# what torch tells of an operator beside its name and time, and a page or Perfetto has no use for
LEFT_OUT = ("Concrete Inputs", "Input type", "Input Strides", "Record function id", "Ev Idx", "Fwd thread id")
ANNOTATION, OPERATOR, ON_GPU = "user_annotation", "cpu_op", ("kernel", "gpu_memcpy", "gpu_memset")


def profile(
    config: Config,
    out: str | Path,
    steps: int = 3,
    warmup: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Profile `steps` steps after `warmup` others; writes trace.json and profile.json into `out`, gives the latter.

    The last step of the warm-up says what the profiler itself costs.

    Raises UserError where the folder holds something else than a profile or cannot be written, and where the run is
    shorter; and whatever `train` raises.
    """
    _require_steps(steps, warmup, config.train.steps)
    ranks = join_ranks()
    if ranks.world > 1:
        raise UserError("a profile is of one process; start it without torchrun")
    folder = RunFolder.for_profile(out, config)
    with open_run(folder, ranks) as (trainer, recorder), gc_at_steps() as collect:
        trace = trainer.worker.trace
        taken: list[Interval] = []

        def take(count: int) -> None:
            for _ in range(count):
                start_s = time.perf_counter()
                recorder.line(trainer.step(recorder.stage)[1], trainer.scheduler.dropped)
                collect(trainer.steps_done)
                taken.append(Interval(f"step {trainer.steps_done}", start_s, time.perf_counter()))
                progress(trainer.steps_done, warmup + steps)

        take(warmup)
        profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
            record_shapes=True,
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )
        with profiler, MemoryWatch() as memory:
            take(steps)
            trainer.sync_weights()  # nobody computes any more when the profiler stops
        since_s = taken[warmup].start_s
        events = torch_events(profiler, since_s)
        profiled = ProfiledSteps(
            steps=[step.later(-since_s) for step in taken[warmup:]],
            unprofiled_s=taken[warmup - 1].seconds if warmup > 1 else None,  # the first fills caches
            spans=[
                (Interval(s.stage, s.start_s - since_s, s.end_s - since_s), s.lane, s.thread)
                for s in trace.spans
                if s.end_s > since_s
            ],
            operators=operators(events),
            memory=memory.samples(since_s),
        )
        write_trace(folder.path / TRACE_FILE, trace, events, profiled, since_s)
    found = summary(profiled) | {
        "config": (folder.path / CONFIG_FILE).read_text(encoding="utf-8"),
        "provenance": json.loads((folder.path / PROVENANCE_FILE).read_text(encoding="utf-8")),
    }
    write_atomic(folder.path / PROFILE_FILE, json.dumps(found, indent=1) + "\n")
    return found


def _require_steps(steps: int, warmup: int, most: int) -> None:
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    if warmup + steps > most:
        raise UserError(
            f"{warmup} + {steps} steps are more than the {most} of train.steps; ask for fewer with --steps and --warmup"
        )


class MemoryWatch:
    """Notes the memory of this process, and of torch on the GPU, from a thread of its own; a context manager."""

    def __init__(self) -> None:
        self._seen: list[Memory] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def _watch(self) -> None:
        on_gpu = torch.cuda.is_available()
        while not self._ended.wait(MEMORY_EVERY_S):
            allocated, reserved = (
                (torch.cuda.memory_allocated() / 2**20, torch.cuda.memory_reserved() / 2**20) if on_gpu else (0.0, 0.0)
            )
            self._seen.append(Memory(time.perf_counter(), memory_mb()[0], allocated, reserved))

    def samples(self, since_s: float) -> list[Memory]:
        """Memory as it was seen, in seconds after `since_s`."""
        return [Memory(m.time_s - since_s, m.rss_mb, m.cuda_mb, m.cuda_reserved_mb) for m in self._seen]

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def torch_events(profiler: torch.profiler.profile, since_s: float) -> list[dict[str, Any]]:
    """torch's Chrome events, times in microseconds after `since_s` of `time.perf_counter`."""
    epoch_s = time.time() - time.perf_counter()  # torch counts from 1970
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "torch.json"
        with os_errors_as_user_errors(path):
            profiler.export_chrome_trace(str(path))
            content = json.loads(path.read_text(encoding="utf-8"))
    shift_us = content.get("baseTimeNanoseconds", 0) / 1e3 - (epoch_s + since_s) * 1e6
    events = []
    for event in content["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "process_sort_index":
            continue
        if "ts" in event:
            event["ts"] = round(event["ts"] + shift_us, 3)
        if "args" in event:
            event["args"] = {k: v for k, v in event["args"].items() if k not in LEFT_OUT}
        events.append(event)
    return events


def operators(events: list[dict[str, Any]]) -> list[Operator]:
    """The operators and annotations of all threads, and what ran on a GPU."""
    found = []
    for e in events:
        kind = e.get("cat")
        if e["ph"] != "X" or kind not in (ANNOTATION, OPERATOR, *ON_GPU):
            continue
        args = e.get("args", {})
        found.append(
            Operator(
                name=e["name"],
                start_s=e["ts"] / 1e6,
                end_s=(e["ts"] + e["dur"]) / 1e6,
                thread=-1 if kind in ON_GPU else int(e["tid"]),
                annotation=kind == ANNOTATION,
                shapes=str([shape for shape in args.get("Input Dims", ()) if shape]),
                number=args.get("External id", -1),
            )
        )
    return found


def write_trace(
    path: Path, trace: Trace, events: list[dict[str, Any]], profiled: ProfiledSteps, since_s: float
) -> None:
    """Stages, steps, operators and memory as one Chrome trace; raises UserError when the disk is full."""
    stages = [e | {"ts": round(e["ts"] - 1e6 * since_s, 3)} if "ts" in e else e for e in trace.events()]
    stages = [e for e in stages if e["ph"] == "M" or e["ts"] + e["dur"] >= 0]
    row = {"pid": trace.rank, "tid": len(LANES) + 1000}
    stages.append({"name": "thread_name", "ph": "M", **row, "args": {"name": "steps"}})
    for step in profiled.steps:
        stages.append({"name": step.name, "ph": "X", **row, "ts": 1e6 * step.start_s, "dur": 1e6 * step.seconds})
    for m in profiled.memory:
        values = {"resident": m.rss_mb} | ({"CUDA allocated": m.cuda_mb} if m.cuda_mb else {})
        stages.append({"name": "memory, MB", "ph": "C", "pid": trace.rank, "ts": 1e6 * m.time_s, "args": values})
    write_atomic(path, json.dumps({"traceEvents": stages + events}, separators=(",", ":")))
