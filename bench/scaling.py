"""What a step costs: the model of docs/scaling.md, held against measured points, and what it says of GPUs.

    python bench/scaling.py --out bench/results/scaling.json

The constants of each stage are fitted to some points (non-negative least squares) and tried on others; with one thread
and one render worker, because two threads on a shared machine measure their neighbours. The prediction for GPUs puts
data-sheet rates and assumed efficiencies in their place; nothing of it has been measured on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from results import write_result
from scipy.optimize import nnls

from fastsmart.audio import RenderPool, RenderSettings
from fastsmart.grpo.settings import LossSettings
from fastsmart.policy.checkpoint import load_policy
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.presets import demo
from fastsmart.reward import Clips, RewardMix
from fastsmart.sampling import Rollout, SamplingSettings
from fastsmart.sampling.native import NativeEngine
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import procedural
from fastsmart.tokens.vocabulary import load_vocabulary
from fastsmart.train.provenance import statistics_path
from fastsmart.train.update import micro_batches, reference_logprobs, update

PROMPT, VOCABULARY, GROUP = 4, 413, 8
AUDIOBOX_GFLOP_PER_S = 14.8  # of its forward pass, per second of audio


@dataclass(frozen=True)
class Job:
    """A rank's share of a step: a policy of `layers` layers `width` wide, `clips` completions of `tokens` tokens."""

    width: int
    layers: int
    clips: int
    tokens: int

    @property
    def matrix(self) -> float:
        """Parameters in matrices that every token passes: attention 4 D^2, feed-forward 3 x 4 D^2, and the head."""
        return 16.0 * self.layers * self.width**2 + VOCABULARY * self.width

    @property
    def parameters(self) -> float:
        return self.matrix + VOCABULARY * self.width


def sampling_terms(job: Job) -> list[float]:
    """Layers passed (launches), GFLOP of matrix products, GB of keys and values read, draws of 1,000 logits."""
    passed = job.tokens * job.clips
    cache = 8.0 * job.layers * job.width * passed * (PROMPT + job.tokens / 2)
    return [job.layers * job.tokens, 2e-9 * job.matrix * passed, 1e-9 * cache, 1e-3 * VOCABULARY * passed]


def update_terms(job: Job) -> list[float]:
    """GFLOP of matrix products (reference 2, forward 2, backward 4 a weight and token) and of attention, GB of Adam."""
    length = PROMPT + job.tokens
    passed = job.clips * length
    attention = 16.0 * 2.0 * job.layers * job.width * passed * length
    return [8e-9 * job.matrix * passed, 1e-9 * attention, 1e-9 * 28.0 * job.parameters]


FIT = (
    Job(128, 2, 32, 64), Job(256, 4, 64, 128), Job(256, 4, 32, 256), Job(512, 4, 32, 128), Job(512, 2, 64, 64),
    Job(384, 6, 48, 128),
)  # fmt: skip
TRY = (Job(256, 4, 64, 250), Job(256, 8, 128, 64), Job(512, 4, 64, 256))
AUDIO_FIT, AUDIO_TRY = ((16, 10.0), (64, 5.0), (32, 2.5)), ((64, 10.0), (48, 7.5))  # clips, seconds of each


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--predict", action="store_true", help="only print what the model says of GPUs")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict = {} if options.predict else measured()
    figures["predicted"] = predictions()
    if options.out:
        write_result(options.out, figures)


def measured() -> dict:
    """Fit and trial of each stage on this machine."""
    times = {job: policy_seconds(job) for job in FIT + TRY}
    result = {}
    for place, (stage, terms) in enumerate((("sample", sampling_terms), ("update", update_terms))):
        seconds = {job: time[place] for job, time in times.items()}
        result[stage] = fitted(stage, FIT, TRY, terms, seconds, lambda job: asdict(job))  # type: ignore[arg-type]
    audio = {point: audio_seconds(*point) for point in AUDIO_FIT + AUDIO_TRY}

    def audio_terms(point: tuple[int, float]) -> list[float]:
        return [point[0], point[0] * point[1]]

    for place, stage in enumerate(("render", "score")):
        seconds = {point: time[place] for point, time in audio.items()}
        result[stage] = fitted(stage, AUDIO_FIT, AUDIO_TRY, audio_terms, seconds, list)  # type: ignore[arg-type]
    return result


def fitted(
    stage: str, fit: Sequence, trial: Sequence, terms: Callable, seconds: dict, describe: Callable[[object], object]
) -> dict:
    # relative errors count: each row is divided by its time
    rows = np.array([terms(point) for point in fit]) / np.array([[seconds[point]] for point in fit])
    constants, _ = nnls(rows, np.ones(len(fit)))
    points = []
    for point in (*fit, *trial):
        said = float(np.dot(terms(point), constants))
        points.append({"point": describe(point), "seconds": seconds[point], "model": said, "tried": point in trial})
        mark, error = "tried " if point in trial else "fitted", said / seconds[point] - 1
        print(f"{stage:7} {mark} {point!s:52} {seconds[point]:7.3f} s, model {said:7.3f} ({error:+.0%})")
    return {"constants": constants.tolist(), "points": points}


def policy_seconds(job: Job, runs: int = 2) -> tuple[float, float]:
    """Seconds of sampling, and of the update with its reference pass: the shortest of the runs."""
    vocab = load_vocabulary("smart")
    size = PolicySize(VOCABULARY, job.width, 4 * job.width, job.layers, job.width // 64, job.width // 64)
    policy = Policy(size, vocab).initialise(torch.Generator().manual_seed(0)).eval()
    engine, optimizer = NativeEngine(policy), make_optimizer(policy, 1e-6, (0.9, 0.999), 0.0)
    engine.eos = -1  # no such token: every completion has its full length
    prompts = procedural(vocab, job.clips // GROUP, seed=0).tokens
    settings = SamplingSettings(group=GROUP, max_tokens=job.tokens)
    sampled, updated = [], []
    for run in range(runs):
        start = time.perf_counter()
        rollout = Rollout.gather(engine.stream(prompts, settings, (run,)), prompts, GROUP)
        middle = time.perf_counter()
        batches = list(micro_batches(rollout, 16, policy.device))
        anchors = reference_logprobs(policy, batches, 1.0, torch.float32)
        update(
            policy, optimizer, batches, anchors, torch.ones(len(rollout)), LossSettings(), temperature=1.0,
            learning_rate=1e-6, max_grad_norm=1.0,
        )  # fmt: skip
        sampled.append(middle - start)
        updated.append(time.perf_counter() - middle)
    return min(sampled), min(updated)


def audio_seconds(clips: int, seconds: float, runs: int = 3) -> tuple[float, float]:
    """Seconds of rendering and of scoring with the demo's rewards: pieces of the shipped policy, cut to length."""
    policy, config = load_policy("pop909-tiny"), demo()
    prompts = procedural(policy.vocab, clips, seed=0, time_signatures=["4/4"], tempo_range=(60.0, 90.0)).tokens
    rollout = Rollout.gather(NativeEngine(policy).stream(prompts, SamplingSettings(group=1), (0,)), prompts, 1)
    notes = decode(rollout.sequences(), policy.vocab, seconds)
    reward, times = RewardMix(config.reward, statistics_path(config)), []
    with RenderPool(replace(RenderSettings(), max_seconds=seconds, workers=1), clips) as pool:
        for _ in range(runs):
            start = time.perf_counter()
            for i in range(clips):
                pool.submit(i, notes, i)
            audio = pool.wait()
            middle = time.perf_counter()
            reward(Clips(notes, audio))
            times.append((middle - start, time.perf_counter() - middle))
    return min(t for t, _ in times), min(t for _, t in times)


@dataclass(frozen=True)
class Node:
    """Rates of a GPU and its links; data sheet x an efficiency that is assumed, not measured."""

    name: str = "H200, eight a node, NVLink; 400 Gbit/s a GPU between nodes"
    launch_us: float = 25.0  # a layer of a decode step inside a CUDA graph, of which little is arithmetic
    matrix_tflops: float = 0.4 * 989  # bf16 dense, large products
    memory_gb_per_s: float = 0.6 * 4800
    clip_render_ms: float = 0.03  # a clip of 50 notes, mixed from a note bank on the GPU
    in_node_gb_per_s: float = 300.0  # all-reduce, each GPU
    between_gb_per_s: float = 40.0
    latency_us: float = 30.0  # of a collective


def predictions() -> list[dict]:
    """Seconds of each stage of a step, for a policy of the paper's size and one of 1 B parameters; and the modes."""
    node, rows = Node(), []
    shown = ("sample", "render", "score", "update", "reduce", "off", "overlap", "one_step_off")
    print(f"\npredicted, not measured on a GPU ({node.name}); milliseconds")
    print("policy GPUs  clips " + " ".join(f"{name:>12}" for name in (*shown, "clips/s")))
    for name, width, layers in (("17 M", 512, 4), ("1 B", 2048, 15)):
        for gpus, clips in ((1, 64), (8, 64), (8, 512), (64, 512), (64, 4096)):
            row = {"policy": name, **predicted(Job(width, layers, clips // gpus, 256), gpus, node)}
            figures = [1e3 * row[stage] for stage in shown] + [clips / row["one_step_off"]]
            print(f"{name:>6} {gpus:4} {clips:6} " + " ".join(f"{figure:12.1f}" for figure in figures))
            rows.append(row)
    return rows


def predicted(job: Job, gpus: int, node: Node, seconds: float = 10.0) -> dict:
    """One rank's stages, in seconds, with `job` its share; weights and cache in 16 bit, gradients in 32.

    Completions are taken to end together, as they do when most have the full length: then overlap only hides
    rendering behind scoring. One step off, what keeps the GPU's arithmetic busy adds up, and only waiting is hidden.
    """
    passes, gflop, cache, _ = sampling_terms(job)
    weights = 2e-9 * job.matrix * job.tokens  # GB: every decode step reads all of them
    busy = gflop / node.matrix_tflops / 1e3 + (weights + cache / 2) / node.memory_gb_per_s
    sample = max(passes * node.launch_us * 1e-6, busy)
    products, attention, adam = update_terms(job)
    learn = (products + attention) / node.matrix_tflops / 1e3 + adam / node.memory_gb_per_s
    score = job.clips * seconds * AUDIOBOX_GFLOP_PER_S / node.matrix_tflops / 1e3
    render = job.clips * node.clip_render_ms * 1e-3
    bandwidth = node.in_node_gb_per_s if gpus <= 8 else node.between_gb_per_s
    ring = 2 * (gpus - 1) / gpus * 4e-9 * job.parameters / bandwidth
    reduce = ring + 4 * node.latency_us * 1e-6 if gpus > 1 else 0.0
    rollout = sample + max(render, score) + min(render, score) / max(1, job.clips // 16)
    return {
        "gpus": gpus, "clips": job.clips * gpus, "sample": sample, "render": render, "score": score, "update": learn,
        "reduce": reduce, "off": sample + render + score + learn + reduce, "overlap": rollout + learn + reduce,
        "one_step_off": max(rollout, busy + render + score + learn, learn + reduce),
    }  # fmt: skip


if __name__ == "__main__":
    main()
