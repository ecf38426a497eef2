"""What all benchmarks share: contenders take turns, the machine's ceilings are measured beside them, and a stage's time
is held against the least its work can take.

A floor is arithmetic and memory traffic at measured rates: each piece of work takes the longer of the two, and pieces
follow one another. The reference kernel is the same small job in every benchmark of every commit; the time of a stage
over its time compares commits on machines that drift, and roughly machines.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastsmart.machine.files import cpu_cores

Job = Callable[[], object]
REFERENCE = "reference kernel"


@dataclass(frozen=True)
class Work:
    """A piece of what a stage has to do at least: operations, in units of 10^9, and bytes read or written, likewise."""

    what: str
    gflop: float = 0.0
    gbyte: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, with the threads that the benchmark uses: matrix products and copies."""

    gemm_gflop_per_s: float
    copy_gb_per_s: float

    def floor_s(self, work: Sequence[Work]) -> float:
        """Seconds that the work takes at least."""
        return sum(max(w.gflop / self.gemm_gflop_per_s, w.gbyte / self.copy_gb_per_s) for w in work)


def parser(doc: str, runs: int, peers: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that every benchmark has. `peers` are those it knows."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=runs, help=f"counted runs of each contender, in turn ({runs})")
    options.add_argument("--threads", type=int, default=cpu_cores(), help="of every contender; default: one a core")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if peers:
        options.add_argument(
            "--peer", action="append", choices=[*peers, "all"], default=[], help="run this one beside; repeatable"
        )
    options.add_argument("--out", default="", help="JSON file for the result")
    return options


def chosen_peers(options: argparse.Namespace, peers: Sequence[str]) -> list[str]:
    return list(peers) if "all" in options.peer else [peer for peer in peers if peer in options.peer]


def interleaved(jobs: Mapping[str, Job], runs: int, device: str = "cpu", warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each run of each job, A B C A B C …, after `warmup` rounds that are not counted.

    The reference kernel is one of them, under its name.
    """
    turns = {**jobs, REFERENCE: reference_kernel(device)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(-warmup, runs):
        for name, job in turns.items():
            elapsed = timed(job, device)
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def timed(job: Job, device: str = "cpu") -> float:
    """Seconds of one call; on a GPU until it has finished."""
    synchronise(device)
    start = time.perf_counter()
    job()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def reference_kernel(device: str) -> Job:
    """A product of two 1024 x 1024 matrices, a soft-max of the result and a copy of it, float32, ten times."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator).to(device) for _ in range(2))
    out = torch.empty_like(a)

    def job() -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)
            out.copy_(torch.softmax(out, dim=-1))

    return job


def measured_ceilings(device: str = "cpu", dtype: torch.dtype = torch.float32, runs: int = 7) -> Ceilings:
    """The best of some runs of a large square product in `dtype`, and of a copy that no cache holds, read + written."""
    side = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = min(timed(lambda: a @ b, device) for _ in range(runs))
    source = torch.zeros((2**30 if device.startswith("cuda") else 2**28) // 4, device=device)
    target = torch.zeros_like(source)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(runs))
    return Ceilings(2e-9 * side**3 / product, 2e-9 * source.nbytes / copy)


def report(
    stage: str, seconds: Mapping[str, Sequence[float]], ours: str, work: Sequence[Work], ceilings: Ceilings
) -> dict[str, Any]:
    """Print a short table and give its figures: the median and spread of every contender, how many times as long as
    ours each takes (pair by pair), our share of the floor, and our time over the reference kernel's.
    """
    floor, median = ceilings.floor_s(work), statistics.median(seconds[ours])
    print(
        f"{stage}: {sum(w.gflop for w in work):.3g} GFLOP, {sum(w.gbyte for w in work):.3g} GB; floor {floor:.3g} s at "
        f"{ceilings.gemm_gflop_per_s:.0f} GFLOP/s, {ceilings.copy_gb_per_s:.1f} GB/s; {ours} reaches "
        f"{floor / median:.0%} of it"
    )
    figures: dict[str, Any] = {
        "ceilings": asdict(ceilings),
        "work": [asdict(w) for w in work],
        "floor_s": floor,
        "share_of_floor": floor / median,
        "ours": ours,
        "contenders": {},
    }
    for name, each in seconds.items():
        ratios = [other / own for other, own in zip(each, seconds[ours], strict=True)]
        figures["contenders"][name] = {
            "median_s": statistics.median(each),
            "min_s": min(each),
            "max_s": max(each),
            "over_ours": [statistics.median(ratios), min(ratios), max(ratios)],
            "each_s": list(each),
        }
        if name != REFERENCE:
            print(
                f"  {name:36} {statistics.median(each):9.4f} s ({min(each):.4f} - {max(each):.4f})"
                f"  {statistics.median(ratios):6.2f} x ours ({min(ratios):.2f} - {max(ratios):.2f})",
                flush=True,
            )
    figures["over_reference_kernel"] = median / statistics.median(seconds[REFERENCE])
    return figures
