"""Decoding, rendering and scoring while others are still being sampled, and sampling while the policy learns.

Nothing here depends on time: clips are known by their number in the batch, and they are scored in chunks of numbers,
so every mode gives the same bits. Everything is bounded: completions by the batch, clips by the renderer's memory, and
audio that waits for the scorer by `DEPTH` chunks; what is rendered beyond that stays where the renderer has put it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
import torch

from fastsmart.audio import AudioBatch
from fastsmart.machine.cuda_graph import OwnStream
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, Scores
from fastsmart.run.trace import Trace
from fastsmart.sampling import Completion, Rollout
from fastsmart.tokens.token_batch import TokenBatch

DEPTH = 2  # chunks at the scorer: one at work, one that is ready when it has finished
POLL_S = 0.005  # how long to wait for the renderer before looking for new completions

Progress = Callable[[str, int, int], None]
Decode = Callable[[np.ndarray], NoteBatch]
Inbox = SimpleQueue  # of completions, of scores that are there, and of what has become of the sampling at last:
SAMPLED, GIVEN_UP = object(), object()


class Renderer(Protocol):
    """Renders up to a batch of clips at a time, in any order: a `RenderPool` or a `DeviceRenderer`."""

    def submit(self, index: int, notes: NoteBatch) -> None: ...
    def poll(self, timeout_s: float = 0.0) -> list[int]: ...
    def gather(self, indices: Sequence[int]) -> AudioBatch: ...
    def clear(self) -> None: ...


@dataclass(frozen=True)
class ScoredRollout:
    """N completions of a batch of prompts, their notes and their scores, in order of their number.

    sample_s  : how long sampling took, seconds
    gpu_mixed : clips that were mixed on the GPU
    """

    rollout: Rollout
    notes: NoteBatch
    scores: Scores
    sample_s: float
    gpu_mixed: int = 0

    @staticmethod
    def concat(parts: Sequence[ScoredRollout]) -> ScoredRollout:
        """The completions of all in order, whose prompts are different ones."""
        return ScoredRollout(
            Rollout.concat([part.rollout for part in parts]),
            NoteBatch.concat([part.notes for part in parts]),
            Scores.concat([part.scores for part in parts]),
            sum(part.sample_s for part in parts),
            sum(part.gpu_mixed for part in parts),
        )


class RolloutPipeline:
    """Decodes, renders and scores the completions of one batch at a time.

    decode   : int32 [L], prompt and completion -> the notes of the one piece
    renderer : None where no reward listens
    score    : Clips -> Scores
    overlap  : whether completions are decoded, rendered and scored in other threads while the rest is being sampled;
               else one stage begins when the one before has ended
    scorer   : a thread in which every chunk is scored, whatever the mode; None = as `overlap` says. For a GPU, on which
               the thread that has recorded a graph has to live as long as the graph
    own      : the stream on which a GPU mixes and scores clips; None = the default stream
    asked    : prompts -> the style that each asks for; nothing where no prompt of the run asks for any

    Owns a thread, and the scorer: call `close`. A batch that is being sampled in another thread then is given up at
    its next completion once `closing` is set.
    """

    def __init__(
        self,
        decode: Decode,
        renderer: Renderer | None,
        score: Callable[[Clips], Scores],
        overlap: bool,
        trace: Trace,
        scorer: ThreadPoolExecutor | None = None,
        own: OwnStream | None = None,
        asked: Callable[[TokenBatch], Sequence[str]] = lambda prompts: (),
    ) -> None:
        self.decode, self.renderer, self.score = decode, renderer, score
        self.overlap, self.trace = overlap, trace
        self.scorer, self.own = scorer, own or OwnStream(torch.device("cpu"))
        self.asked = asked
        self.closing = False
        self.rendering = started_thread("render")

    def run(
        self,
        completions: Iterable[Completion],
        prompts: TokenBatch,
        group: int,
        chunk: int,
        first: int = 0,
        progress: Progress | None = None,
    ) -> ScoredRollout:
        """Take in `group` completions of each prompt, whose index counts from `first`, in any order.

        chunk    : clips scored in one call: numbers 0 to chunk - 1, then the next
        progress : `progress(stage, done, total)` is called along the way, from any thread

        Raises what a stage raised.
        """
        batch = _Batch(self, prompts, group, first, chunk, progress or (lambda stage, done, total: None))
        stream = self._sampled(completions, batch)
        early = self._overlapped(stream, batch) if self.overlap else []
        sampled = list(stream)  # none that overlap has taken in
        with self.own.on():
            for completion in sampled:
                batch.add_completion(completion)
            while batch.rendering:
                batch.collect(timeout_s=1.0)
            late = [self._scored_now(batch.clips(number)) for number in range(len(early), len(batch.chunks))]
            return batch.result([score.result() for score in early] + late)

    def _sampled(self, completions: Iterable[Completion], batch: _Batch) -> Iterator[Completion]:
        source = iter(completions)
        for count in range(1, batch.total + 1):
            start_s = time.perf_counter()
            completion = next(source, None)
            end_s = time.perf_counter()
            self.trace.add("sample", start_s, end_s)
            batch.sample_s += end_s - start_s
            if self.closing:
                raise RuntimeError("the run has ended")
            if completion is None:
                raise ValueError(f"{count - 1} completions of {batch.total} came")
            batch.tell("sample", count, batch.total)
            yield completion

    def _overlapped(self, stream: Iterator[Completion], batch: _Batch) -> list[Future[Scores]]:
        """Sample while the rendering thread does the rest; gives the scores of the first chunks.

        Without a `scorer` those are the chunks that another thread scored during sampling, and this thread is to score
        the rest when it has sampled the last completion. For a thread that has computed with GNU OpenMP keeps helpers,
        and the helpers of two such threads on the same cores send each other to sleep between any two operators: a
        sampler on two cores takes a fifth longer, 8-bit scoring 6 %.
        """
        inbox: Inbox = SimpleQueue()
        beside = self.rendering.submit(self._render_and_score, batch, inbox)
        end = GIVEN_UP
        try:
            for completion in stream:
                inbox.put(completion)
                if beside.done():  # it has failed
                    break
            end = SAMPLED
        finally:
            inbox.put(end)
        return beside.result()

    def _render_and_score(self, batch: _Batch, inbox: Inbox) -> list[Future[Scores]]:
        """Decode and render what comes, and have each chunk scored once it is whole and the scorer has room.

        Ends with the last completion, or, where there is a `scorer`, when it has been given the last chunk.
        """
        scores: list[Future[Scores]] = []
        with nullcontext(self.scorer) if self.scorer else started_thread("score") as scorer, self.own.on():
            while len(scores) < len(batch.chunks):
                if batch.whole(len(scores)) and sum(not score.done() for score in scores) < DEPTH:
                    scores.append(scorer.submit(self._score, batch.clips(len(scores))))
                    scores[-1].add_done_callback(inbox.put)  # wakes this thread: there is room again
                    continue
                try:
                    item = inbox.get(block=not batch.rendering)
                except Empty:
                    batch.collect(POLL_S)
                    continue
                if isinstance(item, Completion):
                    batch.add_completion(item)
                elif isinstance(item, Future):
                    item.result()  # raises now what would else be found when all have been sampled
                elif item is GIVEN_UP or not self.scorer:
                    break
        return scores

    def _score(self, clips: Clips) -> Scores:
        with self.trace("score"), self.own.on():
            return self.score(clips)

    def _scored_now(self, clips: Clips) -> Scores:
        return self.scorer.submit(self._score, clips).result() if self.scorer else self._score(clips)

    def close(self) -> None:
        """End the threads."""
        self.rendering.shutdown()
        if self.scorer:
            self.scorer.shutdown()


def started_thread(name: str) -> ThreadPoolExecutor:
    """Start a thread at once, so that it gets the cores and the GPU of the thread that calls this."""
    executor = ThreadPoolExecutor(1, name)
    if torch.cuda.is_initialized():
        executor.submit(torch.cuda.set_device, torch.cuda.current_device())
    executor.submit(int).result()
    return executor


class _Batch:
    """Completions and clips of one batch on their way to their scores."""

    def __init__(
        self, pipeline: RolloutPipeline, prompts: TokenBatch, group: int, first: int, chunk: int, tell: Progress
    ) -> None:
        self.renderer, self.trace, self.decode = pipeline.renderer, pipeline.trace, pipeline.decode
        self.prompts, self.group, self.first, self.tell = prompts, group, first, tell
        self.asked = pipeline.asked(prompts)
        self.total = len(prompts) * group
        self.chunks = [range(at, min(at + chunk, self.total)) for at in range(0, self.total, chunk)]
        self.completions: list[Completion] = []
        self.pieces: dict[int, NoteBatch] = {}
        self.done: set[int] = set()  # clips that can be scored
        self.sample_s = 0.0
        self.since_s = 0.0  # since when the renderer has had something to do

    @property
    def rendering(self) -> bool:
        return len(self.done) < len(self.pieces)

    def add_completion(self, completion: Completion) -> None:
        i = completion.index - self.first
        with self.trace("decode"):
            piece = self.decode(np.concatenate([self.prompts.row(i // self.group), completion.ids]))
        if self.renderer is None:
            self.done.add(i)
        else:
            self.since_s = self.since_s if self.rendering else time.perf_counter()
            self.renderer.submit(i, piece)
        self.completions.append(completion)
        self.pieces[i] = piece

    def collect(self, timeout_s: float) -> None:
        """Note what has been rendered, waiting for news up to `timeout_s`."""
        assert self.renderer is not None
        new = self.renderer.poll(timeout_s)
        self.done.update(new)
        if new:
            start_s, self.since_s = self.since_s, time.perf_counter()
            self.trace.add("render", start_s, self.since_s)
            self.tell("render", len(self.done), self.total)

    def whole(self, number: int) -> bool:
        return self.done.issuperset(self.chunks[number])

    def clips(self, number: int) -> Clips:
        """The clips of a chunk, in order."""
        chunk = self.chunks[number]
        notes = NoteBatch.concat([self.pieces[i] for i in chunk])
        asked = tuple(self.asked[i // self.group] for i in chunk) if self.asked else ()
        if self.renderer is None:
            return Clips(notes, asked=asked)
        start_s = time.perf_counter()
        audio = self.renderer.gather(chunk)
        if not self.rendering:  # else it is within a span that has not ended
            self.trace.add("render", start_s, time.perf_counter())
        return Clips(notes, audio, asked)

    def result(self, scores: Sequence[Scores]) -> ScoredRollout:
        if self.renderer:
            self.renderer.clear()
        return ScoredRollout(
            Rollout.gather(self.completions, self.prompts, self.group, self.first),
            NoteBatch.concat([self.pieces[i] for i in range(self.total)]),
            Scores.concat(scores),
            self.sample_s,
        )
