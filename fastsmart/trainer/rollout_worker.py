"""From prompts to scores: what a completion passes before it becomes an advantage."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fastsmart.audio import RenderPool
from fastsmart.audio.gpu_mixdown import DeviceRenderer
from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.cpu_affinity import separate_helpers
from fastsmart.machine.cuda_graph import OwnStream
from fastsmart.machine.distributed import Ranks
from fastsmart.notes import NoteBatch
from fastsmart.policy.transformer import Policy
from fastsmart.reward import RewardBlend
from fastsmart.run.provenance import judge_path
from fastsmart.run.trace import Trace
from fastsmart.sampling import Engine, RandomStream, SamplingSettings, make_engine
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import PromptSource, asked_styles
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.rollout_pipeline import Progress, RolloutPipeline, ScoredRollout, started_thread


class RolloutWorker:
    """The sampling engine, the renderer pool and the rewards of a run, started once and closed together.

    reward : None = those of the config, with the `statistics`; one that is passed in is computed on a CPU
    engine : None = the one of config.sampling

    batch   : completions of a step on this rank, the most that one call may hold
    writing : a thread for what may take its time, on the cores of the helpers

    With train.pipeline "overlap" a clip is rendered the moment its completion ends, and scored with its chunk, while
    others are still being sampled. Raises UserError where a rank would be without a prompt, and whatever engine, pool
    and rewards raise.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        statistics: str | Path,
        dtype: torch.dtype,
        version: int = 0,
        quarantine: Path | None = None,
        ranks: Ranks | None = None,
        reward: RewardBlend | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        for key in ("prompts", "eval_prompts"):
            if (count := getattr(config.train, key)) < self.ranks.world:
                raise UserError(f"train.{key} is {count}, fewer than the {self.ranks.world} ranks, and each needs one")
        self.vocab: Vocabulary = policy.vocab
        self.trace = Trace(self.ranks.rank)
        most_prompts = -(-config.train.prompts // self.ranks.world)
        self.batch = most_prompts * config.sampling.group
        self.reward = reward or RewardBlend(config.reward, statistics, str(policy.device), judge_path(config))
        self.engine = engine or make_engine(config.sampling, policy, version, dtype, self.batch)
        self.pool: RenderPool | None = None
        self.mixer: DeviceRenderer | None = None
        with separate_helpers(policy.device) as self.rejoin_cores:
            if self.reward.needs_audio:
                self.pool = RenderPool(config.audio, self.batch, quarantine)
                if mixes_on_gpu(config, policy.device):
                    self.mixer = DeviceRenderer(self.pool, policy.device)
            overlap, scorer, own = config.train.pipeline != "off", None, OwnStream(policy.device)
            if policy.device.type == "cuda":
                scorer = started_thread("score")
                scorer.submit(self._prepare_rewards, own).result()
            renderer = self.mixer or self.pool
            self.pipeline = RolloutPipeline(
                self._decoded, renderer, self.reward, overlap, self.trace, scorer, own, self._asked
            )
            self.sampling_thread, self.writing = started_thread("rollout"), started_thread("write")

    def _decoded(self, ids: np.ndarray) -> NoteBatch:
        return decode(TokenBatch.pack([ids]), self.vocab, self.config.audio.max_seconds)

    def _asked(self, prompts: TokenBatch) -> list[str]:
        return asked_styles(prompts, self.vocab) if self.config.prompts.styles else []

    def _prepare_rewards(self, own: OwnStream) -> None:
        with own.in_turn():  # after their weights have been copied to the GPU
            self.reward.prepare()

    def generate(
        self,
        prompts: TokenBatch,
        settings: SamplingSettings,
        seed: tuple[int, ...],
        progress: Progress | None = None,
        first: int = 0,
    ) -> ScoredRollout:
        """Sample, decode, render and score every prompt, at most `batch` completions.

        seed, first : completion i of this call draws from the random stream (seed, first + i)
        progress    : `progress(stage, done, total)` is called along the way, from any thread
        """
        chunk = max(1, self.config.train.score_batch // settings.group) * settings.group  # whole groups
        mixed = self.mixer.mixed if self.mixer else 0
        stream = self.engine.stream(prompts, settings, seed, first)
        scored = self.pipeline.run(stream, prompts, settings.group, chunk, first, progress)
        for pid, start_s, end_s in self.pool.pop_work() if self.pool else []:
            self.trace.add("clip", start_s, end_s, lane=f"render worker {pid}")
        return replace(scored, gpu_mixed=self.mixer.mixed - mixed) if self.mixer else scored

    def generate_step(self, step: int, progress: Progress | None = None) -> ScoredRollout:
        """Sample and score this rank's share of a step's batch.

        Prompts and random numbers belong to the step and the number of the completion, whichever rank draws it.
        """
        config, group = self.config, self.config.sampling.group
        share, seed = self.ranks.share(config.train.prompts), (config.train.seed, RandomStream.TRAIN, step)
        start = step * config.train.prompts + share.start
        prompts = self.prompts.take("train", start, len(share))
        return self.generate(prompts, config.sampling, seed, progress, share.start * group)

    def generate_split(
        self, split: str, count: int, group: int, stream: RandomStream, progress: Progress | None = None
    ) -> Iterator[ScoredRollout]:
        """`group` completions of each of the first `count` prompts of a split, this rank's share of them in order.

        As many at a time as a step has; `progress` is told of each such batch anew.
        """
        return self._in_batches(split, 0, count, group, (self.config.train.seed, stream), progress)

    def generate_round(self, number: int, count: int, progress: Progress | None = None) -> Iterator[ScoredRollout]:
        """`sampling.group` completions of each of the `count` training prompts of a round, as `generate_split` does."""
        seed = (self.config.train.seed, RandomStream.ROUND, number)
        return self._in_batches("train", number * count, count, self.config.sampling.group, seed, progress)

    def _in_batches(
        self, split: str, first: int, count: int, group: int, seed: tuple[int, ...], progress: Progress | None
    ) -> Iterator[ScoredRollout]:
        """The completions of prompts `first` to `first + count - 1` of a split, numbered from 0."""
        config, share = self.config, self.ranks.share(count)
        settings = replace(config.sampling, group=group)
        at_once = max(1, self.batch // group)
        for start in range(share.start, share.stop, at_once):
            n = min(at_once, share.stop - start)
            prompts = self.prompts.take(split, first + start, n)
            yield self.generate(prompts, settings, seed, progress, start * group)

    @cached_property
    def prompts(self) -> PromptSource:
        """Prompts of the config. Raises UserError as that does."""
        return PromptSource(self.config.prompts, self.vocab)

    @property
    def renders_with(self) -> str:
        """Device that mixes the clips, "gpu" or "cpu"; "" where no reward listens."""
        return "gpu" if self.mixer else "cpu" if self.pool else ""

    def close(self) -> None:
        self.pipeline.closing = True
        self.sampling_thread.shutdown()
        self.writing.shutdown()
        self.pipeline.close()
        if self.mixer:
            self.mixer.close()
        if self.pool:
            self.pool.close()
        self.engine.close()
        self.rejoin_cores()

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mixes_on_gpu(config: Config, device: torch.device) -> bool:
    """Whether the clips of a run whose policy is on this device are mixed there; raises UserError if it is no GPU."""
    on_gpu = device.type == "cuda"
    if config.audio.mixdown == "gpu" and not on_gpu:
        raise UserError(f"audio.mixdown = 'gpu' needs policy.device = 'cuda', not {device}; choose 'auto'")
    return on_gpu and config.audio.mixdown != "cpu" and config.audio.mixes_on_gpu


class RolloutScheduler:
    """Gives each step its batch: sampled when it is asked for or, one step off, while the policy learnt from the last.

    One step off, the batch of step k has been sampled by the policy that step k - 1 began with: its version is k - 1,
    its staleness 1. A batch staler than `train.max_staleness` is sampled again; `dropped` are its completions.
    """

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker
        settings = worker.config.train
        self.ahead = settings.pipeline == "one-step-off"
        self.max_staleness = settings.max_staleness if self.ahead else 0
        self.steps = settings.steps
        self.dropped = 0  # of the last batch
        self._next: Future[ScoredRollout] | None = None

    def next(self, step: int, policy: Policy, progress: Progress | None = None) -> ScoredRollout:
        """The batch of a step (counted from 0), whose policy this is; the engine holds its weights afterwards.

        Without a batch under way it is sampled now: by this policy or, one step off, by the engine's weights as they
        are.
        """
        sample = self.worker.generate_step
        sampled = sample(step, progress) if self.ahead and not self._next else None
        self.sync_weights(policy, step)
        scored = sampled or (self._next.result() if self._next else sample(step, progress))
        stale = step - scored.rollout.version > self.max_staleness
        self.dropped = len(scored.rollout) if stale else 0
        if stale:
            scored = sample(step, progress)
        more = self.ahead and step + 1 < self.steps
        self._next = self.worker.sampling_thread.submit(sample, step + 1, progress) if more else None
        return scored

    def sync_weights(self, policy: Policy, version: int) -> None:
        """Give the engine these weights once it has sampled the batch under way, unless it has them."""
        if self._next:
            with self.worker.trace("wait"):
                wait([self._next])
        if self.worker.engine.version != version:
            with self.worker.trace("sync"):
                self.worker.engine.load(policy, version)
