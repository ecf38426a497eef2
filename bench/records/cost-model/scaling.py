"""What a step costs: the model of docs/scaling.md, held against measured points.

    python bench/scaling.py --out bench/results/scaling.json

The constants of each stage are fitted to some points (non-negative least squares) and tried on others; with one thread
and one render worker, because two threads on a shared machine measure their neighbours. bench/growth.py asks the model
how cost grows, bench/prediction.py what a GPU would take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

import numpy as np
import torch
from harness import timed
from results import write_result
from scipy.optimize import nnls

from fastsmart.audio import RenderPool, RenderSettings
from fastsmart.grpo.settings import LossSettings
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.presets import demo
from fastsmart.reward import Clips, RewardBlend
from fastsmart.run.provenance import statistics_path
from fastsmart.sampling import Rollout, SamplingSettings
from fastsmart.sampling.native import NativeEngine
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import procedural
from fastsmart.tokens.vocabulary import load_vocabulary
from fastsmart.trainer.micro_batch import micro_batches
from fastsmart.trainer.update import reference_logprobs, update

PROMPT, VOCABULARY, GROUP = 4, 413, 8


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
    """GFLOP of matrix products (reference 2, forward 2, backward 4 a weight and token) and of attention, GB of Adam.

    Attention is 4 operations a pair of positions and width, forward and of the reference, and 10 backward, where the
    scores are made again; a kernel that leaves out what the causal mask hides does half.
    """
    length = PROMPT + job.tokens
    passed = job.clips * length
    attention = 18.0 * job.layers * job.width * passed * length
    return [8e-9 * job.matrix * passed, 1e-9 * attention, 1e-9 * 28.0 * job.parameters]


def audio_terms(point: tuple[int, float]) -> list[float]:
    """Clips, and their seconds."""
    return [point[0], point[0] * point[1]]


FIT = (
    Job(128, 2, 32, 64), Job(256, 4, 64, 128), Job(256, 4, 32, 256), Job(512, 4, 32, 128), Job(512, 2, 64, 64),
    Job(384, 6, 48, 128),
)  # fmt: skip
TRY = (Job(256, 4, 64, 250), Job(256, 8, 128, 64), Job(512, 4, 64, 256))
AUDIO_FIT, AUDIO_TRY = ((16, 10.0), (64, 5.0), (32, 2.5)), ((64, 10.0), (48, 7.5))  # clips, seconds of each


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    figures = measured()
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

    for place, stage in enumerate(("render", "score")):
        seconds = {point: time[place] for point, time in audio.items()}
        result[stage] = fitted(stage, AUDIO_FIT, AUDIO_TRY, audio_terms, seconds, list)  # type: ignore[arg-type]
    return result


def fitted(
    stage: str, fit: Sequence, trial: Sequence, terms: Callable, seconds: dict, describe: Callable[[object], object]
) -> dict:
    constants = fit_constants([terms(point) for point in fit], [seconds[point] for point in fit])
    points = []
    for point in (*fit, *trial):
        said = float(np.dot(terms(point), constants))
        points.append({"point": describe(point), "seconds": seconds[point], "model": said, "tried": point in trial})
        mark, error = "tried " if point in trial else "fitted", said / seconds[point] - 1
        print(f"{stage:7} {mark} {point!s:52} {seconds[point]:7.3f} s, model {said:7.3f} ({error:+.0%})")
    return {"constants": constants.tolist(), "points": points}


def fit_constants(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> np.ndarray:
    """Seconds of a unit of each term, none negative; relative errors count, so each row is divided by its time."""
    return nnls(np.array(terms) / np.array(seconds)[:, None], np.ones(len(seconds)))[0]


class PolicyRun:
    """Sampling and update, with its reference pass, of a policy of fresh weights; `sample` comes before `update`."""

    def __init__(self, job: Job, device: str = "cpu") -> None:
        vocab = load_vocabulary("smart")
        size = PolicySize(VOCABULARY, job.width, 4 * job.width, job.layers, job.width // 64, job.width // 64)
        self.policy = Policy(size, vocab).initialise(torch.Generator().manual_seed(0)).eval().to(device)
        self.engine = NativeEngine(self.policy)
        self.optimizer = make_optimizer(self.policy, 1e-6, (0.9, 0.999), 0.0)
        self.prompts = procedural(vocab, job.clips // GROUP, seed=0).tokens
        self.settings = SamplingSettings(group=GROUP, max_tokens=job.tokens, max_rows=job.clips, ignore_eos=True)

    def sample(self) -> None:
        self.rollout = Rollout.gather(self.engine.stream(self.prompts, self.settings, (0,)), self.prompts, GROUP)

    def update(self) -> None:
        batches = list(micro_batches(self.rollout, 16, self.policy.device))
        ref_logprobs = reference_logprobs(self.policy, batches, 1.0, torch.float32)
        update(
            self.policy, self.optimizer, batches, ref_logprobs, torch.ones(len(self.rollout)), LossSettings(),
            temperature=1.0, learning_rate=1e-6, max_grad_norm=1.0,
        )  # fmt: skip


class AudioRun:
    """Decode, render and score with the demo's rewards, in this order, of pieces of which nothing is heard after
    `seconds`."""

    def __init__(self, pool: RenderPool, pieces: Sequence[np.ndarray], seconds: float) -> None:
        config = demo()
        self.pool, self.pieces, self.seconds = pool, pieces, seconds
        self.vocab = load_vocabulary("smart")
        self.reward = RewardBlend(config.reward, statistics_path(config))

    def decode(self) -> None:
        self.notes = decode(self.pieces, self.vocab, self.seconds)

    def render(self) -> None:
        for i in range(len(self.notes)):
            self.pool.submit(i, self.notes, i)
        self.audio = self.pool.wait()

    def score(self) -> None:
        self.reward(Clips(self.notes, self.audio))


def shipped_pieces(clips: int, tokens: int) -> list[np.ndarray]:
    """Pieces of the shipped policy: a prompt of four tokens, and `tokens` more."""
    policy = load_policy("pop909-tiny")
    engine = NativeEngine(policy)
    prompts = procedural(policy.vocab, clips, seed=0, time_signatures=["4/4"], tempo_range=(60.0, 90.0)).tokens
    rollout = Rollout.gather(
        engine.stream(prompts, SamplingSettings(group=1, max_tokens=tokens, ignore_eos=True), (0,)), prompts, 1
    )
    return [rollout.sequence(i) for i in range(clips)]


def policy_seconds(job: Job, runs: int = 2) -> tuple[float, ...]:
    """Seconds of sampling, and of the update with its reference pass: the shortest of the runs."""
    run = PolicyRun(job)
    times = [(timed(run.sample), timed(run.update)) for _ in range(runs)]
    return tuple(min(each) for each in zip(*times, strict=True))


def audio_seconds(clips: int, seconds: float, runs: int = 3) -> tuple[float, ...]:
    """Seconds of rendering and of scoring, of pieces cut to length: the shortest of the runs."""
    with RenderPool(replace(RenderSettings(), max_seconds=seconds, workers=1), clips) as pool:
        run = AudioRun(pool, shipped_pieces(clips, 256), seconds)
        run.decode()
        times = [(timed(run.render), timed(run.score)) for _ in range(runs)]
    return tuple(min(each) for each in zip(*times, strict=True))


if __name__ == "__main__":
    main()
