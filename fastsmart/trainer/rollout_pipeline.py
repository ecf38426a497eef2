"""Decoding, rendering and scoring while others are still being sampled, and sampling while the policy learns.

Nothing here depends on time: clips are known by their number in the batch, and they are scored in chunks of numbers,
so every mode gives the same bits. Everything is bounded: completions by the batch, clips by the renderer's memory, and
audio that waits for the scorer by `DEPTH` chunks; what is rendered beyond that stays where the renderer has put it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from fastsmart.audio import AudioBatch
from fastsmart.machine.cuda_graph import OwnStream
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, Scores
from fastsmart.run.trace import Trace
from fastsmart.sampling import Completion

DEPTH = 2  # chunks at the scorer: one at work, one that is ready when it has finished
POLL_S = 0.005  # how long to wait for the renderer before looking for new completions

Progress = Callable[[str, int, int], None]
Decode = Callable[[int, Completion], NoteBatch]
Inbox = SimpleQueue  # of completions, of scores that are there, and of what has become of the sampling at last:
SAMPLED, GIVEN_UP = object(), object()


class Renderer(Protocol):
    """Renders up to a batch of clips at a time, in any order: a `RenderPool` or a `DeviceRenderer`."""

    def submit(self, index: int, notes: NoteBatch) -> None: ...
    def poll(self, timeout_s: float = 0.0) -> list[int]: ...
    def gather(self, indices: Sequence[int]) -> AudioBatch: ...
    def clear(self) -> None: ...


@dataclass(frozen=True)
class ScoredCompletions:
    """What the stages made of N sampled completions, in order of their number, and the seconds sampling took."""

    completions: list[Completion]
    notes: NoteBatch
    scores: Scores
    sample_s: float


class RolloutPipeline:
    """Decodes, renders and scores the completions of one batch at a time.

    renderer : None where no reward listens
    score    : Clips -> Scores
    overlap  : completions are decoded and rendered in a thread of their own as they come, and chunks scored as soon as
               they are whole, in another while there is sampling to do; else one stage begins when the one before has
               ended
    scorer   : a thread in which every chunk is scored, whatever the mode; None = as `overlap` says. For a GPU, on which
               the thread that has recorded a graph has to live as long as the graph
    own      : the stream on which a GPU mixes and scores clips; None = the default stream

    Owns a thread, and the scorer: call `close`. A batch that is being sampled in another thread then is given up at
    its next completion once `closing` is set.
    """

    def __init__(
        self,
        renderer: Renderer | None,
        score: Callable[[Clips], Scores],
        overlap: bool,
        trace: Trace,
        scorer: ThreadPoolExecutor | None = None,
        own: OwnStream | None = None,
    ) -> None:
        self.renderer, self.score, self.overlap, self.trace = renderer, score, overlap, trace
        self.scorer, self.own = scorer, own or OwnStream(torch.device("cpu"))
        self.closing = False
        self.rendering = started_thread("render")

    def run(
        self,
        completions: Iterable[Completion],
        decode: Decode,
        total: int,
        chunk: int,
        first: int = 0,
        progress: Progress | None = None,
    ) -> ScoredCompletions:
        """Take in `total` completions, whose index counts from `first`, in any order.

        decode   : number in the batch and completion -> its notes
        chunk    : clips scored in one call: numbers 0 to chunk - 1, then the next
        progress : `progress(stage, done, total)` is called along the way, from any thread

        Raises what a stage raised.
        """
        tell = progress or (lambda stage, done, total: None)
        batch = _Batch(self, decode, first, total, chunk, tell)
        stream = self._sampled(completions, batch)
        if not self.overlap:
            drawn = list(stream)
            with self.own.on():
                for completion in drawn:
                    batch.add_completion(completion)
                while batch.rendering:
                    batch.collect(timeout_s=1.0)
                return batch.result([self._scored_now(batch.clips(c)) for c in batch.chunks])
        inbox: Inbox = SimpleQueue()
        errands = _Errands()
        rest = self.rendering.submit(self._render_and_score, batch, inbox, errands)
        try:
            for completion in stream:
                inbox.put(completion)
                if rest.done():
                    break
        except BaseException:
            inbox.put(GIVEN_UP)
            raise
        inbox.put(SAMPLED)
        errands.run()
        return rest.result()

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

    def _render_and_score(self, batch: _Batch, inbox: Inbox, errands: _Errands) -> ScoredCompletions:
        """The rendering thread: from the inbox to the renderer, from there to whoever scores."""
        with ExitStack() as stack, self.own.on():
            stack.callback(errands.end)
            scores = self._scored(batch, inbox, errands, stack)
        return batch.result(scores)

    def _scored(self, batch: _Batch, inbox: Inbox, errands: _Errands, stack: ExitStack) -> list[Scores]:
        """The scores of every chunk, made as soon as the chunk is whole and there is room.

        The scorer does if there is one. Else, while there is sampling to do, a thread scores, which begins with the
        first chunk and ends with the batch; then the thread that has sampled does. A thread that has computed with GNU
        OpenMP keeps helpers, and where all threads have more of them than there are cores, every helper goes to sleep
        between two operators: a sampler on two cores then takes a fifth longer, and 8-bit scoring 6 %.
        """
        scores: list[Future[Scores]] = []
        thread: ThreadPoolExecutor | None = None
        sampled = False
        while len(scores) < len(batch.chunks):
            waiting = sum(not score.done() for score in scores)
            ready = batch.whole(len(scores)) and waiting < DEPTH
            if ready and not (sampled and thread and waiting):  # never two that score at once
                job = partial(self._score, batch.clips(batch.chunks[len(scores)]))
                if self.scorer:
                    scores.append(self.scorer.submit(job))
                elif sampled:
                    if thread:
                        thread.shutdown()
                        thread = None
                    scores.append(errands.submit(job))
                else:
                    thread = thread or stack.enter_context(started_thread("score"))
                    scores.append(thread.submit(job))
                scores[-1].add_done_callback(inbox.put)  # wakes this thread: there is room again
                continue
            try:
                item = inbox.get(block=not batch.rendering)
            except Empty:
                batch.collect(POLL_S)
                continue
            sampled |= item is SAMPLED
            if item is GIVEN_UP or (sampled and len(batch.pieces) < batch.total):
                raise RuntimeError("sampling has failed")  # and says so itself
            if isinstance(item, Completion):
                batch.add_completion(item)
            elif isinstance(item, Future):
                item.result()  # raises now what would else be found when all have been sampled
        return [score.result() for score in scores]

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
    """One thread that is there already, on the cores and the GPU of the thread that calls this."""
    on_gpu = torch.cuda.is_initialized()
    executor = (
        ThreadPoolExecutor(1, name, torch.cuda.set_device, (torch.cuda.current_device(),))
        if on_gpu
        else ThreadPoolExecutor(1, name)
    )
    executor.submit(int).result()
    return executor


class _Errands:
    """What one thread does for another until that one has no more of them."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._left = False

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.put((future, job))
        if self._left:  # nobody will come for it
            self._refuse()
        return future

    def end(self) -> None:
        """There will be no more."""
        self._queue.put(None)

    def run(self) -> None:
        """Do errands until `end`. What a job raises is its future's; what interrupts the thread fails all of them."""
        try:
            while errand := self._queue.get():
                future, job = errand
                try:
                    future.set_result(job())
                except Exception as error:
                    future.set_exception(error)
                except BaseException:
                    future.set_exception(RuntimeError("the run has ended"))
                    raise
        finally:
            self._left = True
            self._refuse()

    def _refuse(self) -> None:
        with suppress(Empty):
            while True:
                if errand := self._queue.get_nowait():
                    errand[0].set_exception(RuntimeError("the run has ended"))


class _Batch:
    """Where the clips of one batch are."""

    def __init__(
        self, pipeline: RolloutPipeline, decode: Decode, first: int, total: int, chunk: int, tell: Progress
    ) -> None:
        self.renderer, self.trace = pipeline.renderer, pipeline.trace
        self.decode, self.first, self.total, self.tell = decode, first, total, tell
        self.chunks = [range(at, min(at + chunk, total)) for at in range(0, total, chunk)]
        self.completions: dict[int, Completion] = {}
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
            piece = self.decode(i, completion)
        if self.renderer is None:
            self.done.add(i)
        else:
            self.since_s = self.since_s if self.rendering else time.perf_counter()
            self.renderer.submit(i, piece)
        self.completions[i], self.pieces[i] = completion, piece

    def collect(self, timeout_s: float) -> None:
        """Note what has been rendered, waiting for news up to `timeout_s`."""
        assert self.renderer is not None
        new = self.renderer.poll(timeout_s)
        self.done.update(new)
        if new:
            start_s, self.since_s = self.since_s, time.perf_counter()
            self.trace.add("render", start_s, self.since_s)
            self.tell("render", len(self.done), self.total)

    def whole(self, chunk: int) -> bool:
        return self.done.issuperset(self.chunks[chunk])

    def clips(self, chunk: range) -> Clips:
        notes = NoteBatch.concat([self.pieces[i] for i in chunk])
        if self.renderer is None:
            return Clips(notes)
        start_s = time.perf_counter()
        audio = self.renderer.gather(chunk)
        if not self.rendering:  # else it is within a span that has not ended
            self.trace.add("render", start_s, time.perf_counter())
        return Clips(notes, audio)

    def result(self, scores: Sequence[Scores]) -> ScoredCompletions:
        if self.renderer:
            self.renderer.clear()
        terms = {name: np.concatenate([s.terms[name] for s in scores]) for name in scores[0].terms}
        completions = [self.completions[i] for i in range(self.total)]
        notes = NoteBatch.concat([self.pieces[i] for i in range(self.total)])
        totals = np.concatenate([s.total for s in scores])
        return ScoredCompletions(completions, notes, Scores(terms, totals), self.sample_s)
