"""What a step would take on GPUs, from counted work and assumed rates. Nothing here has been measured on a GPU.

    python bench/prediction.py --out bench/results/prediction.json

First one H200, stage by stage: arithmetic and bytes of the code as it is, counted (bench/counting.py) or by formula;
the floor they have at the best rates that dense products and copies reach there; the time to expect from ordinary
efficiencies and from launching every kernel. Then the model of docs/scaling.md on several GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

from counting import audiobox_work, decode_kernels, update_work
from harness import Ceilings, Work
from results import write_result
from scaling import Job, sampling_terms, update_terms

REACHABLE = Ceilings(gemm_gflop_per_s=790e3, copy_gb_per_s=0.85 * 4800)  # of an H200, in bf16: 80 % of its data sheet
NOTES, HEARD_S, RATE_HZ, CLIP_S = 60, 2.0, 16000, 10.0  # notes of a clip and how long each is heard; both assumed
OPTIMIZER_KERNELS = 60  # gradient norm, fused AdamW over two groups, and a look whether weights are finite


@dataclass(frozen=True)
class Node:
    """Rates of a GPU and its links; data sheet x an efficiency that is assumed, not measured."""

    name: str = "H200, eight a node, NVLink; 400 Gbit/s a GPU between nodes"
    ordinary: Ceilings = Ceilings(gemm_gflop_per_s=0.4 * 989e3, copy_gb_per_s=0.6 * 4800)  # noqa: RUF009
    launch_us: float = 6.0  # a kernel that Python launches, one after the other
    replay_us: float = 2.0  # a small kernel inside a CUDA graph, at best
    slow_replay_us: float = 3.3  # and where each kernel waits for the one before
    clip_render_ms: float = 0.03  # plan of a clip on the CPU and its way over the bus; the mixdown itself is less
    in_node_gb_per_s: float = 300.0  # all-reduce, each GPU
    between_gb_per_s: float = 40.0
    latency_us: float = 30.0  # of a collective


@dataclass(frozen=True)
class Stage:
    """A stage's work and kernels; `replayed` where they are in a CUDA graph. `beside_s`: what a CPU does first."""

    name: str
    work: Sequence[Work]
    kernels: int
    replayed: bool = False
    beside_s: float = 0.0

    def launch_s(self, node: Node, slow: bool = False) -> float:
        replay_us = node.slow_replay_us if slow else node.replay_us
        return self.kernels * (replay_us if self.replayed else node.launch_us) * 1e-6

    def busy_s(self, node: Node) -> float:
        return node.ordinary.floor_s(self.work)

    def expected_s(self, node: Node, slow: bool = False) -> float:
        return max(self.busy_s(node), self.launch_s(node, slow)) + self.beside_s


def stages(job: Job, node: Node, graph: bool = True) -> list[Stage]:
    """The four stages of a rank's share of a step; `graph`: as it is, a decode step being recorded and replayed."""
    score = counted_score(job.clips)
    learn = [*counted_update(job), Work("AdamW", gbyte=update_terms(job)[2])]
    a_layer, beside = counted_decode(graph)
    return [
        Stage("sample", sampling(job), job.tokens * (a_layer * job.layers + beside), graph),
        Stage("render", mixing(job.clips), 4, beside_s=job.clips * node.clip_render_ms * 1e-3),
        Stage("score", score, len(score), replayed=True),
        Stage("update", learn, len(learn) + OPTIMIZER_KERNELS),
    ]


counted_update, counted_score, counted_decode = cache(update_work), cache(audiobox_work), cache(decode_kernels)


def sampling(job: Job) -> list[Work]:
    """Every decode step reads all weights, and every token the keys and values before it; 16 bit."""
    _, gflop, cached, _ = sampling_terms(job)
    return [Work("matrix products", gflop, 2e-9 * job.matrix * job.tokens), Work("keys and values", gbyte=cached / 2)]


def mixing(clips: int) -> list[Work]:
    """Stored notes are read in 16 bit; the audio is written, and read and written once more to bring its peak to 1."""
    return [Work("mixdown", gbyte=1e-9 * clips * RATE_HZ * (2 * NOTES * HEARD_S + 3 * 4 * CLIP_S))]


def one_gpu(job: Job, node: Node) -> list[dict[str, Any]]:
    """Table of one GPU; printed as it stands in docs/scaling.md."""
    print(f"\n{job}, one H200: predicted, not measured\n")
    print("| stage | GFLOP | GB | floor, ms | kernels | launches, ms | expected, ms | share of floor |")
    print("|---|---|---|---|---|---|---|---|")
    steps, (launched, *_) = stages(job, node), stages(job, node, graph=False)
    rows = [row(stage.name, stage, node) for stage in steps] + [row("sample, cuda_graph = false", launched, node)]
    for name, chosen in (("step", steps), ("step, cuda_graph = false", [launched, *steps[1:]])):
        floor = sum(REACHABLE.floor_s(stage.work) for stage in chosen)
        expected, slow = (sum(stage.expected_s(node, slow) for stage in chosen) for slow in (False, True))
        print(f"| {name} | | | {1e3 * floor:.1f} | | | {band(expected, slow)} | {floor / expected:.0%} |")
        rows.append({"stage": name, "floor_s": floor, "expected_s": expected, "slow_s": slow})
    return rows


def band(least_s: float, most_s: float) -> str:
    """Milliseconds from the least to the most, one number where they are the same."""
    least, most = (f"{1e3 * s:.1f}" for s in (least_s, most_s))
    return least if least == most else f"{least}–{most}"


def row(name: str, stage: Stage, node: Node) -> dict[str, Any]:
    gflop, gbyte = sum(w.gflop for w in stage.work), sum(w.gbyte for w in stage.work)
    floor, launch, expected = REACHABLE.floor_s(stage.work), stage.launch_s(node), stage.expected_s(node)
    slow = stage.expected_s(node, slow=True)
    print(
        f"| {name} | {gflop:,.0f} | {gbyte:.2f} | {1e3 * floor:.2f} | {stage.kernels:,} | "
        f"{band(launch, stage.launch_s(node, slow=True))} | {band(expected, slow)} | {floor / expected:.0%} |"
    )
    return {
        "stage": name, "gflop": gflop, "gbyte": gbyte, "floor_s": floor, "kernels": stage.kernels, "launch_s": launch,
        "expected_s": expected, "slow_s": slow,
    }  # fmt: skip


def several_gpus(node: Node) -> list[dict[str, Any]]:
    """Seconds of each stage of a step, for a policy of the paper's size and one of 1 B parameters; and the modes."""
    rows = []
    shown = ("sample", "render", "score", "update", "reduce", "off", "overlap", "one_step_off")
    print(f"\npredicted, not measured on a GPU ({node.name}); milliseconds\n")
    print(f"| policy | GPUs | clips | {' | '.join(shown)} | clips/s |\n|{'---|' * (len(shown) + 4)}")
    for name, width, layers in (("17 M", 512, 4), ("1 B", 2048, 15)):
        for gpus, clips in ((1, 64), (8, 64), (8, 512), (64, 512), (64, 4096)):
            figures = {"policy": name, **predicted(Job(width, layers, clips // gpus, 256), gpus, node)}
            times = " | ".join(f"{1e3 * figures[stage]:.1f}" for stage in shown)
            print(f"| {name} | {gpus} | {clips} | {times} | {clips / figures['one_step_off']:,.0f} |")
            rows.append(figures)
    return rows


def predicted(job: Job, gpus: int, node: Node) -> dict[str, Any]:
    """One rank's stages, in seconds, with `job` its share; weights and cache in 16 bit, gradients in 32.

    Completions are taken to end together, as they do when most have the full length: then overlap only hides
    rendering behind scoring. One step off, what keeps the GPU's arithmetic busy adds up, and only waiting is hidden.
    """
    steps = stages(job, node)
    sample, render, score, learn = (stage.expected_s(node) for stage in steps)
    bandwidth = node.in_node_gb_per_s if gpus <= 8 else node.between_gb_per_s
    ring = 2 * (gpus - 1) / gpus * 4e-9 * job.parameters / bandwidth
    reduce = ring + 4 * node.latency_us * 1e-6 if gpus > 1 else 0.0
    rollout = sample + max(render, score) + min(render, score) / max(1, job.clips // 16)
    busy = sum(stage.busy_s(node) for stage in steps)
    return {
        "gpus": gpus, "clips": job.clips * gpus, "sample": sample, "render": render, "score": score, "update": learn,
        "reduce": reduce, "off": sample + render + score + learn + reduce, "overlap": rollout + learn + reduce,
        "one_step_off": max(rollout, busy, learn + reduce),
    }  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    node = Node()
    figures = {
        "assumed": asdict(node), "reachable": asdict(REACHABLE), "one_gpu": one_gpu(Job(512, 4, 64, 256), node),
        "several_gpus": several_gpus(node),
    }  # fmt: skip
    if options.out:
        write_result(options.out, figures)


if __name__ == "__main__":
    main()
