"""What the marks that `fastsmart profile` reads cost a step of the demo when nobody profiles.

    python bench/profile_overhead.py --out bench/results/profile-overhead.json

Steps with the marks and steps with nothing in their place take turns. Their difference is far below
what steps vary by, so each mark is timed in a loop of its own too, and multiplied by how often a step comes upon it.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

from harness import interleaved, parser
from results import write_result
from torch.profiler import record_function

from fastsmart.machine.distributed import Ranks
from fastsmart.presets import demo
from fastsmart.run import trace
from fastsmart.run.folder import RunFolder
from fastsmart.trainer import trainer as trainer_module
from fastsmart.trainer import update
from fastsmart.trainer.loop import open_run

WITH, WITHOUT = "with the marks", "without"
CALLS = 100_000


def main() -> None:
    arguments = parser(__doc__ or "", runs=8)
    options = arguments.parse_args()
    config = demo()
    settings = replace(config.train, threads=options.threads)
    config = replace(config, train=settings, policy=replace(config.policy, device=options.device))
    with (
        tempfile.TemporaryDirectory() as folder,
        open_run(RunFolder.create(Path(folder) / "run", config), Ranks()) as (trainer, _),
    ):

        def bare() -> None:
            with unmarked():
                trainer.step()

        seconds = interleaved({WITH: trainer.step, WITHOUT: bare}, options.runs, options.device)
        with mock.patch.object(trace.threading, "get_native_id", wraps=threading.get_native_id) as asked:
            trainer.step()
        micro_batches = -(-settings.prompts * config.sampling.group // settings.micro_batch)
    marks = {
        "record_function": (annotate, 1 + micro_batches * (1 + settings.iterations)),  # the reference, and each forward
        "thread number": (threading.get_native_id, asked.call_count),
    }
    figures: dict = {"each_s": seconds, "marks": {}}
    for name, (job, times) in marks.items():
        each_s = min(timeit.repeat(job, number=CALLS, repeat=5)) / CALLS
        figures["marks"][name] = {"times_a_step": times, "each_s": each_s}
        print(f"{name:16} {times:4} times a step, {1e9 * each_s:6.0f} ns each")
    step_s = statistics.median(seconds[WITHOUT])
    marks_s = sum(mark["times_a_step"] * mark["each_s"] for mark in figures["marks"].values())
    ratios = [a / b for a, b in zip(seconds[WITH], seconds[WITHOUT], strict=True)]
    figures |= {"step_s": step_s, "marks_s": marks_s, "share": marks_s / step_s, "ratio": statistics.median(ratios)}
    print(
        f"together {1e6 * marks_s:.1f} µs of a step of {step_s:.2f} s: {marks_s / step_s:.5%}; steps with / without "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
    )
    if options.out:
        write_result(options.out, figures)


@record_function("mark")
def annotate() -> None:
    pass


@contextmanager
def unmarked() -> Iterator[None]:
    """The same code without what is there for a profile."""
    forward, reference = update.completion_logprobs.__wrapped__, update.reference_logprobs.__wrapped__
    with (
        mock.patch.object(update, "completion_logprobs", forward),
        mock.patch.object(trainer_module, "reference_logprobs", reference),
        mock.patch.object(trace.threading, "get_native_id", int),
    ):
        yield


if __name__ == "__main__":
    main()
