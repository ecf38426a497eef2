"""From prompts to scores: the stations a completion passes before it becomes an advantage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastsmart.audio import RenderPool
from fastsmart.config import Config
from fastsmart.notes import NoteBatch
from fastsmart.policy.transformer import Policy
from fastsmart.reward import Clips, RewardMix, Scores
from fastsmart.sampling import Rollout, SamplingSettings, make_engine
from fastsmart.tokens.decode import decode
from fastsmart.tokens.sequences import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary


@dataclass
class StageClock:
    """Seconds spent in each stage since the last `reset`."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def reset(self) -> dict[str, float]:
        """The seconds so far; counting starts anew."""
        seconds, self.seconds = self.seconds, {}
        return seconds


@dataclass(frozen=True)
class Performance:
    """What came of a batch of prompts: N completions, their notes, and what they were worth."""

    rollout: Rollout
    notes: NoteBatch
    scores: Scores


class Stations:
    """The sampling engine, the renderer pool and the rewards of a run, started once and closed together.

    A clip is handed to the renderer the moment its completion ends, while the others are still being sampled.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        statistics: str | Path,
        dtype: torch.dtype,
        version: int = 0,
        quarantine: Path | None = None,
    ) -> None:
        self.config = config
        self.vocab: Vocabulary = policy.vocab
        self.clock = StageClock()
        self.batch = config.train.prompts * config.sampling.group  # completions of a step: what one call may hold
        self.reward = RewardMix(config.reward, statistics, str(policy.device))
        self.engine = make_engine(config.sampling, policy, version, dtype, self.batch)
        self.pool: RenderPool | None = None
        if self.reward.needs_audio:
            self.pool = RenderPool(config.audio, self.batch, quarantine)

    def perform(
        self,
        prompts: TokenBatch,
        settings: SamplingSettings,
        seed: tuple[int, ...],
        progress: Callable[[str, int, int], None] | None = None,
        first: int = 0,
    ) -> Performance:
        """Sample, decode, render and score every prompt, at most `batch` completions.

        seed, first : completion i of this call draws from the random stream (seed, first + i)
        progress    : `progress(stage, done, total)` is called along the way
        """
        completions, pieces = [], {}
        total = len(prompts) * settings.group
        stream = self.engine.stream(prompts, settings, seed, first)
        while True:
            with self.clock("sample"):
                completion = next(stream, None)
            if completion is None:
                break
            with self.clock("decode"):
                i = completion.index - first
                prompt = prompts.row(i // settings.group)
                whole = TokenBatch.pack([np.concatenate([prompt, completion.ids])])
                piece = decode(whole, self.vocab, self.config.audio.max_seconds)
            if self.pool:
                with self.clock("render"):
                    self.pool.submit(i, piece)
            completions.append(completion)
            pieces[i] = piece
            if progress:
                progress("sample", len(completions), total)
        with self.clock("decode"):
            rollout = Rollout.gather(completions, prompts, settings.group, first)
            notes = NoteBatch.concat([pieces[i] for i in range(total)])
        audio = None
        if self.pool:
            with self.clock("render"):
                audio = self.pool.wait(lambda done: progress("render", done, total) if progress else None)
        with self.clock("score"):
            scores = self.reward(Clips(notes, audio))
        return Performance(rollout, notes, scores)

    def close(self) -> None:
        if self.pool:
            self.pool.close()
        self.engine.close()

    def __enter__(self) -> Stations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
