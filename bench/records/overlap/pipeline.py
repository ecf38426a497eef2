"""What overlap gives: on the stage times of a GPU node, slept, and on the demo's job on this machine.

    python bench/pipeline.py --out bench/results/pipeline.json

Slept: 64 completions come evenly over 40 ms, rendering them takes 10 ms, scoring 40 ms, the update 20 ms. Every mode is
held against the throughput of its schedule, computed stage by stage without any cost of threads and queues. The real
job: a run of the demo whose steps are "off" and "overlap" in turns (off, overlap, overlap, off, ...), each compared
with its neighbour; and turns of "off" and "one-step-off" as in `fastsmart bench`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

import numpy as np
from results import write_result

from fastsmart.audio import AudioBatch
from fastsmart.config import Config
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.gc_control import gc_at_steps
from fastsmart.notes import NoteBatch
from fastsmart.presets import demo
from fastsmart.profiling.throughput import as_text, bench
from fastsmart.reward import Clips, Scores
from fastsmart.run.folder import RunFolder
from fastsmart.run.trace import Trace
from fastsmart.sampling import Completion
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.loop import open_run
from fastsmart.trainer.rollout_pipeline import Progress, RolloutPipeline, ScoredRollout, started_thread
from fastsmart.trainer.rollout_worker import RolloutScheduler

MODES = ("off", "overlap", "one-step-off")
CLIPS, CHUNK = 64, 8
SAMPLE_S, RENDER_S, SCORE_S, UPDATE_S = 0.040, 0.010, 0.040, 0.020


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=50, help="slept steps of each mode")
    arguments.add_argument("--pairs", type=int, default=12, help="of steps of the demo, one off, one overlapped")
    arguments.add_argument("--rounds", type=int, default=5, help="turns of 5 steps each, off and one step off")
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    slept = {mode: slept_steps(mode, options.steps) for mode in MODES}
    figures: dict = {"slept": {}, "demo": {}}
    for mode, seconds in slept.items():
        ideal = schedule_s(mode)
        share = ideal / statistics.mean(seconds)
        print(
            f"{mode:13} {1e3 * statistics.mean(seconds):6.1f} ms a step, schedule {1e3 * ideal:5.1f}: {share:.1%} of it"
        )
        figures["slept"][mode] = {"step_s": seconds, "schedule_s": ideal, "share_of_schedule": share}
    if options.pairs:
        figures["demo"]["overlap"] = alternating(options.pairs)
        median, least, most = figures["demo"]["overlap"]["times_as_fast"]
        print(f"overlap at the demo: {median:.3f} (quartiles {least:.2f} - {most:.2f}) times as fast as off")
    if options.rounds:
        with tempfile.TemporaryDirectory() as folder:
            found = bench({mode: demo_in(mode) for mode in ("off", "one-step-off")}, folder, rounds=options.rounds)
        print(as_text(found))
        for mode, each in found["contenders"].items():
            figures["demo"][mode] = {name: each[name] for name in ("times_as_fast", "step_s", "stage_s", "steps_s")}
    if options.out:
        write_result(options.out, figures)


def schedule_s(mode: str) -> float:
    """Seconds a step takes at best: a clip is sampled, rendered, scored with its chunk as soon as stages are free."""
    if mode == "off":
        return SAMPLE_S + RENDER_S + SCORE_S + UPDATE_S
    rendered = scored = 0.0
    for i in range(CLIPS):
        sampled = SAMPLE_S * (i + 1) / CLIPS
        rendered = max(rendered, sampled) + RENDER_S / CLIPS
        if (i + 1) % CHUNK == 0:
            scored = max(scored, rendered) + SCORE_S * CHUNK / CLIPS
    return scored + UPDATE_S if mode == "overlap" else max(scored, UPDATE_S)


def slept_steps(mode: str, steps: int) -> list[float]:
    """Seconds of each step after the first, by the pipeline itself around stages that sleep."""
    worker, seconds = SleptWorker(mode, steps + 1), []
    scheduler, start = RolloutScheduler(worker), 0.0  # type: ignore[arg-type]
    for step in range(steps + 1):
        start = time.perf_counter()
        scheduler.next(step, None)  # type: ignore[arg-type]
        time.sleep(UPDATE_S)
        seconds.append(time.perf_counter() - start)
    worker.close()
    return seconds[1:]


class SleptWorker:
    """A rollout worker whose engine, renderer and reward sleep."""

    def __init__(self, mode: str, steps: int) -> None:
        settings = replace(demo().train, pipeline=mode, steps=steps)  # type: ignore[arg-type]
        self.config, self.trace, self.engine = SimpleNamespace(train=settings), Trace(), SleptEngine()
        self.sampling_thread = started_thread("rollout")
        self.pipeline = RolloutPipeline(self.decode, SleptRenderer(), self.score, mode != "off", self.trace)
        self.prompts = TokenBatch.pack([[0]] * CLIPS)

    def generate_step(self, step: int, progress: Progress | None = None) -> ScoredRollout:
        return self.pipeline.run(self.engine.stream(), self.prompts, 1, CHUNK)

    @staticmethod
    def decode(ids: np.ndarray) -> NoteBatch:
        return NoteBatch.empty(1)

    @staticmethod
    def score(clips: Clips) -> Scores:
        time.sleep(SCORE_S * len(clips) / CLIPS)
        return Scores({}, np.zeros(len(clips), np.float32))

    def close(self) -> None:
        self.sampling_thread.shutdown()
        self.pipeline.close()


class SleptEngine:
    version = 0

    def load(self, policy: object, version: int) -> None:
        self.version = version

    def stream(self) -> Iterator[Completion]:
        start = time.perf_counter()
        for i in range(CLIPS):
            time.sleep(max(0.0, start + SAMPLE_S * (i + 1) / CLIPS - time.perf_counter()))
            yield Completion(i, np.zeros(1, np.int32), np.zeros(1, np.float32), self.version)


class SleptRenderer:
    """Renders one clip after the other, elsewhere."""

    def __init__(self) -> None:
        self.ready: dict[int, float] = {}
        self.free = 0.0

    def submit(self, index: int, notes: NoteBatch) -> None:
        self.free = max(self.free, time.perf_counter()) + RENDER_S / CLIPS
        self.ready[index] = self.free

    def poll(self, timeout_s: float = 0.0) -> list[int]:
        if self.ready:
            time.sleep(min(timeout_s, max(0.0, min(self.ready.values()) - time.perf_counter())))
        done = [i for i, at in self.ready.items() if at <= time.perf_counter()]
        for i in done:
            del self.ready[i]
        return done

    def gather(self, indices: Sequence[int]) -> AudioBatch:
        return AudioBatch(np.zeros((len(indices), 1), np.float32), np.ones(len(indices), np.int64), 16000)

    def clear(self) -> None:
        assert not self.ready


def alternating(pairs: int) -> dict[str, Any]:
    """Seconds of the steps of one run of the demo, by pairs of neighbours: one stage after the other, and overlapped.

    Two steps before are not counted. `times_as_fast` is median, quartiles of the pairs' ratios.
    """
    each: list[dict[bool, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_run(RunFolder.create(Path(folder) / "run", demo_in("overlap")), Ranks()) as (trainer, _),
        gc_at_steps() as collect,
    ):
        pipeline = trainer.worker.pipeline
        for step in range(2 * pairs + 2):
            pipeline.overlap = step % 4 in (1, 2)
            seconds = trainer.step()[1]["time"]["step"]
            if step % 2 == 0:
                each.append({})
            each[-1][pipeline.overlap] = seconds
            collect(trainer.steps_done)
    counted = each[1:]
    ratios = [pair[False] / pair[True] for pair in counted]
    return {
        "times_as_fast": [statistics.median(ratios), *np.quantile(ratios, [0.25, 0.75]).tolist()],
        "off_s": [pair[False] for pair in counted],
        "overlap_s": [pair[True] for pair in counted],
    }


def demo_in(mode: str) -> Config:
    return replace(demo(), train=replace(demo().train, pipeline=mode))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
