"""From prompts to scores: the stations a completion passes before it becomes an advantage."""

from __future__ import annotations

from concurrent.futures import Future, wait
from dataclasses import dataclass
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
from fastsmart.reward import RewardBlend, Scores
from fastsmart.run.trace import Trace
from fastsmart.sampling import Completion, RandomStream, Rollout, SamplingSettings, make_engine
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.rollout_pipeline import Progress, RolloutPipeline, started_thread


@dataclass(frozen=True)
class ScoredRollout:
    """What came of a batch of prompts: N completions, their notes, what they were worth.

    sample_s  : how long sampling took, seconds
    gpu_mixed : clips that were mixed on the GPU
    """

    rollout: Rollout
    notes: NoteBatch
    scores: Scores
    sample_s: float
    gpu_mixed: int = 0


class RolloutWorker:
    """The sampling engine, the renderer pool and the rewards of a run, started once and closed together.

    writing : a thread for what may take its time, on the cores of the helpers

    With train.pipeline "overlap" a clip is rendered the moment its completion ends, and scored with its chunk, while
    others are still being sampled.
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
    ) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        for key in ("prompts", "eval_prompts"):
            if (count := getattr(config.train, key)) < self.ranks.world:
                raise UserError(f"train.{key} is {count}, fewer than the {self.ranks.world} ranks, and each needs one")
        self.vocab: Vocabulary = policy.vocab
        self.trace = Trace(self.ranks.rank)
        most_prompts = -(-config.train.prompts // self.ranks.world)
        self.batch = most_prompts * config.sampling.group  # completions of a step: what one call may hold
        self.reward = RewardBlend(config.reward, statistics, str(policy.device))
        self.engine = make_engine(config.sampling, policy, version, dtype, self.batch)
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
            self.pipeline = RolloutPipeline(self.mixer or self.pool, self.reward, overlap, self.trace, scorer, own)
            self.sampling_thread, self.writing = started_thread("rollout"), started_thread("write")

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
        group = settings.group
        chunk = max(1, self.config.train.score_batch // group) * group  # whole groups

        def decoded(i: int, completion: Completion) -> NoteBatch:
            whole = np.concatenate([prompts.row(i // group), completion.ids])
            return decode(TokenBatch.pack([whole]), self.vocab, self.config.audio.max_seconds)

        mixed = self.mixer.mixed if self.mixer else 0
        stream = self.engine.stream(prompts, settings, seed, first)
        made = self.pipeline.run(stream, decoded, len(prompts) * group, chunk, first, progress)
        for pid, start_s, end_s in self.pool.pop_work() if self.pool else []:
            self.trace.add("clip", start_s, end_s, lane=f"render worker {pid}")
        rollout = Rollout.gather(made.completions, prompts, group, first)
        mixed = self.mixer.mixed - mixed if self.mixer else 0
        return ScoredRollout(rollout, made.notes, made.scores, made.sample_s, mixed)

    def generate_step(self, step: int, progress: Progress | None = None) -> ScoredRollout:
        """This rank's share of a step's batch: prompts and random numbers are those of the step, whoever draws them."""
        config = self.config
        share = self.ranks.share(config.train.prompts)
        prompts = make_prompts(
            config.prompts, self.vocab, "train", step * config.train.prompts + share.start, len(share)
        )
        seed = (config.train.seed, RandomStream.TRAIN, step)
        return self.generate(prompts, config.sampling, seed, progress, share.start * config.sampling.group)

    @property
    def renders_with(self) -> str:
        """What mixes the clips, "gpu" or "cpu"; "" where no reward listens."""
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
    """The batch of each step, drawn when it is asked for; one step off, drawn while the step before was learnt from.

    Then the batch of step k has been drawn by the policy that step k - 1 began with: its version is k - 1, its
    staleness 1. A batch staler than `train.max_staleness` is dropped, counted in `pop_dropped`, and drawn again.
    """

    def __init__(self, worker: RolloutWorker, progress: Progress | None = None) -> None:
        self.worker, self.progress = worker, progress
        settings = worker.config.train
        self.ahead = settings.pipeline == "one-step-off"
        self.max_staleness = settings.max_staleness if self.ahead else 0
        self.steps = settings.steps
        self._dropped = 0
        self._next: Future[ScoredRollout] | None = None

    def next(self, step: int, policy: Policy) -> ScoredRollout:
        """The batch of a step (counted from 0), whose policy this is; the engine holds its weights afterwards.

        Without a batch under way it is drawn now: by this policy or, one step off, by the engine's weights as they are.
        """
        drawn = self._sample_batch(step) if self.ahead and not self._next else None
        self.sync_weights(policy, step)
        scored = drawn or (self._next.result() if self._next else self._sample_batch(step))
        if step - scored.rollout.version > self.max_staleness:
            self._dropped += len(scored.rollout)
            scored = self._sample_batch(step)
        self._next = (
            self.worker.sampling_thread.submit(self._sample_batch, step + 1)
            if self.ahead and step + 1 < self.steps
            else None
        )
        return scored

    def pop_dropped(self) -> int:
        """Completions that were too stale, since the last call."""
        count, self._dropped = self._dropped, 0
        return count

    def sync_weights(self, policy: Policy, version: int) -> None:
        """Give the engine these weights, when it has finished what it is drawing, unless it has them."""
        if self._next:
            with self.worker.trace("wait"):
                wait([self._next])
        if self.worker.engine.version != version:
            with self.worker.trace("sync"):
                self.worker.engine.load(policy, version)

    def _sample_batch(self, step: int) -> ScoredRollout:
        return self.worker.generate_step(step, self.progress)
