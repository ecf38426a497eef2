"""The stages of a batch: whatever the order and the timing, the same numbers; bounded; a failure is told at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from watched_stream import WatchedStream

from fastsmart.audio import AudioBatch
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, Scores
from fastsmart.run.trace import Trace
from fastsmart.sampling import Completion
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.rollout_pipeline import DEPTH, RolloutPipeline, started_thread

TOTAL, CHUNK, FIRST = 24, 4, 100
PROMPTS = TokenBatch.pack([[-i] for i in range(TOTAL)])


class SlowRenderer:
    """Finishes clips in a random order, a few at a time; clip i is a constant of value i."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.under_way: list[int] = []
        self.done: set[int] = set()
        self.gathered: list[list[int]] = []
        self.cleared = 0

    def submit(self, index: int, notes: NoteBatch) -> None:
        self.under_way.append(index)

    def poll(self, timeout_s: float = 0.0) -> list[int]:
        self.random.shuffle(self.under_way)
        count = int(self.random.integers(0, 4))
        new, self.under_way = self.under_way[:count], self.under_way[count:]
        self.done.update(new)
        return new

    def gather(self, indices: Sequence[int]) -> AudioBatch:
        assert self.done.issuperset(indices)
        self.gathered.append(list(indices))
        samples = np.repeat(np.array(indices, np.float32)[:, None], 10, axis=1)
        return AudioBatch(samples, np.full(len(indices), 10), 16000)

    def clear(self) -> None:
        assert not self.under_way
        self.cleared += 1


def completions(seed: int) -> Iterator[Completion]:
    for i in np.random.default_rng(seed).permutation(TOTAL):
        yield Completion(FIRST + int(i), np.full(3, i, np.int32), np.zeros(3, np.float32), 0)


def decode(ids: np.ndarray) -> NoteBatch:
    """Gives no notes; checks that a completion, three times its number, stands behind its own prompt, -number."""
    assert (ids[1:] == -ids[0]).all()
    return NoteBatch.empty(1)


def score(clips: Clips) -> Scores:
    """As a batched network would be, different in the last bits with the clips that are beside a clip."""
    assert clips.audio is not None
    values = clips.audio.samples[:, 0]
    total = (values + np.float32(1e-3) * values.sum()).astype(np.float32)
    return Scores({"value": values.copy()}, total)


@pytest.mark.parametrize("seed", range(5))
def test_order_and_mode_change_no_bit(seed: int) -> None:
    results = []
    for overlap in (False, True):
        renderer = SlowRenderer(seed)
        pipeline = RolloutPipeline(decode, renderer, score, overlap, Trace())
        for _ in range(2):  # and the stages can be used again
            made = pipeline.run(completions(seed), PROMPTS, 1, CHUNK, FIRST)
            assert made.rollout.ids[:, 0].tolist() == list(range(TOTAL))
            assert made.scores.terms["value"].tolist() == list(range(TOTAL))
            results.append(made.scores.total)
        assert renderer.gathered == 2 * [list(range(at, at + CHUNK)) for at in range(0, TOTAL, CHUNK)]
        assert renderer.cleared == 2
        pipeline.close()
    assert all(np.array_equal(r, results[0]) for r in results)


@pytest.mark.parametrize("overlap", [False, True])
def test_clips_are_mixed_and_scored_on_the_stages_own_stream(overlap: bool) -> None:
    """In whichever thread; sampling is not on it, which has one of its own."""
    own, seen = WatchedStream(), []

    class Renderer(SlowRenderer):
        def gather(self, indices: Sequence[int]) -> AudioBatch:
            seen.append(own.entered)
            return super().gather(indices)

    def watched(clips: Clips) -> Scores:
        seen.append(own.entered)
        return score(clips)

    def sampled() -> Iterator[Completion]:
        for completion in completions(0):
            assert not own.entered
            yield completion

    for scorer in (None, started_thread("score")):
        pipeline = RolloutPipeline(decode, Renderer(0), watched, overlap, Trace(), scorer, own)
        pipeline.run(sampled(), PROMPTS, 1, CHUNK, FIRST)
        pipeline.close()
        assert not own.entered
    assert seen == [True] * (2 * 2 * TOTAL // CHUNK)


@pytest.mark.parametrize("overlap", [False, True])
def test_one_thread_scores_for_the_whole_run(overlap: bool) -> None:
    """As on a GPU: the thread that has prepared a reward scores every chunk of every batch, to the same bits."""
    threads: set[int] = set()

    def telling(clips: Clips) -> Scores:
        threads.add(threading.get_ident())
        return score(clips)

    scorer = started_thread("score")
    prepared_in = scorer.submit(threading.get_ident).result()
    pipeline = RolloutPipeline(decode, SlowRenderer(0), telling, overlap, Trace(), scorer)
    kept = [pipeline.run(completions(seed), PROMPTS, 1, CHUNK, FIRST).scores.total for seed in range(2)]
    pipeline.close()
    assert threads == {prepared_in}
    assert scorer._shutdown
    plain = RolloutPipeline(decode, SlowRenderer(0), score, False, Trace())
    assert np.array_equal(kept, [plain.run(completions(0), PROMPTS, 1, CHUNK, FIRST).scores.total] * 2)
    plain.close()


def test_scoring_begins_before_sampling_has_ended() -> None:
    scored = threading.Event()

    def patient() -> Iterator[Completion]:
        for i in range(TOTAL):
            if i == TOTAL - 1:
                assert scored.wait(10)
            yield Completion(FIRST + i, np.full(3, i, np.int32), np.zeros(3, np.float32), 0)

    def telling(clips: Clips) -> Scores:
        scored.set()
        return score(clips)

    pipeline = RolloutPipeline(decode, SlowRenderer(0), telling, True, Trace())
    pipeline.run(patient(), PROMPTS, 1, CHUNK, FIRST)
    pipeline.close()


@pytest.mark.parametrize("scored_while_sampling", [0, 1, 3])
def test_who_has_sampled_scores_the_rest_and_never_two_at_once(scored_while_sampling: int) -> None:
    """A slow chunk that another thread began while there was sampling to do is waited for."""
    at_work, threads, begun = threading.Lock(), [], threading.Semaphore(0)

    def sampled() -> Iterator[Completion]:
        for i in range(TOTAL):
            if i == scored_while_sampling * CHUNK:
                for _ in range(scored_while_sampling):
                    assert begun.acquire(timeout=10)
            yield Completion(FIRST + i, np.full(3, i, np.int32), np.zeros(3, np.float32), 0)

    def scored(clips: Clips) -> Scores:
        assert at_work.acquire(blocking=False), "two score at once"
        begun.release()
        time.sleep(0.05)
        threads.append(threading.get_ident())
        at_work.release()
        return score(clips)

    pipeline = RolloutPipeline(decode, SlowRenderer(0), scored, True, Trace())
    made = pipeline.run(sampled(), PROMPTS, 1, CHUNK, FIRST)
    pipeline.close()
    assert made.scores.terms["value"].tolist() == list(range(TOTAL))
    mine = [thread == threading.get_ident() for thread in threads]
    assert len(mine) == TOTAL // CHUNK
    assert mine == sorted(mine)  # first the other, then this one
    assert not any(mine[:scored_while_sampling])
    assert mine[-1]


def test_an_interrupt_while_scoring_ends_the_batch() -> None:
    def interrupted(clips: Clips) -> Scores:
        raise KeyboardInterrupt

    pipeline = RolloutPipeline(decode, SlowRenderer(0), interrupted, True, Trace())
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(iter(list(completions(0))), PROMPTS, 1, TOTAL, FIRST)
    pipeline.close()  # nobody waits for what will not come


@pytest.mark.parametrize("own_scorer", [False, True])
def test_audio_that_waits_for_the_scorer_is_bounded(own_scorer: bool) -> None:
    renderer, finished, most = SlowRenderer(0), 0, 0
    scorer = started_thread("score") if own_scorer else None

    def slow(clips: Clips) -> Scores:
        nonlocal finished, most
        time.sleep(0.01)
        most = max(most, len(renderer.gathered) - finished)
        finished += 1
        return score(clips)

    pipeline = RolloutPipeline(decode, renderer, slow, True, Trace(), scorer)
    pipeline.run(completions(0), PROMPTS, 1, CHUNK, FIRST)
    pipeline.close()
    assert own_scorer < most <= DEPTH + 1  # the future is done a moment after the scorer has counted


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["sampling", "decoding", "scoring", "too few"])
def test_a_stage_that_fails_ends_the_batch_with_its_own_error(where: str, overlap: bool) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError(where)

    def sampled() -> Iterator[Completion]:
        yield from list(completions(0))[:7]
        if where == "sampling":
            failing()

    source = sampled() if where in ("sampling", "too few") else completions(0)
    decoding, scoring = failing if where == "decoding" else decode, failing if where == "scoring" else score
    pipeline = RolloutPipeline(decoding, SlowRenderer(0), scoring, overlap, Trace())  # type: ignore[arg-type]
    with pytest.raises((RuntimeError, ValueError), match="7 completions of 24" if where == "too few" else where):
        pipeline.run(source, PROMPTS, 1, CHUNK, FIRST)
    pipeline.close()


def test_without_audio_nothing_is_rendered() -> None:
    def symbolic(clips: Clips) -> Scores:
        assert clips.audio is None
        return Scores({}, np.zeros(len(clips), np.float32))

    for overlap in (False, True):
        trace = Trace()
        pipeline = RolloutPipeline(decode, None, symbolic, overlap, trace)
        assert len(pipeline.run(completions(1), PROMPTS, 1, 7, FIRST).scores) == TOTAL
        pipeline.close()
        assert "render" not in trace.pop_times()[0]


def test_the_trace_is_one_that_chrome_reads(tmp_path) -> None:
    trace = Trace(rank=3)
    pipeline = RolloutPipeline(decode, SlowRenderer(0), score, True, trace)
    pipeline.run(completions(0), PROMPTS, 1, CHUNK, FIRST)
    pipeline.close()
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    assert {(e["name"], lanes[e["tid"]]) for e in spans} == {
        ("sample", "sampler"), ("decode", "decoder"), ("render", "renderer"), ("score", "scorer")
    }  # fmt: skip
    assert all(e["pid"] == 3 and e["dur"] >= 0 for e in spans)
    assert sum(e["name"] == "score" for e in spans) <= TOTAL // CHUNK


def test_times_of_a_step_leave_out_what_is_apart_and_are_bounded() -> None:
    trace = Trace(capacity=5)
    now = time.perf_counter()
    for i in range(20):
        trace.add("score", now + i, now + i + 0.5)
    assert [(s.start_s - now, s.end_s - now) for s in trace.spans] == [
        (pytest.approx(i), pytest.approx(i + 0.5)) for i in range(15, 20)
    ]
    with trace.excluding("evaluate"), trace("sample"):
        time.sleep(0.01)
    seconds, idle = trace.pop_times()
    assert seconds == {"score": pytest.approx(10.0)}
    assert idle == {"scorer": 0.0}
    assert trace.pop_excluded_s() >= 0.01
    assert trace.pop_excluded_s() == 0.0
    with trace("sample"):
        pass
    assert trace.pop_times()[1]["scorer"] == 1.0  # a resource that has worked before is idle now


def test_what_follows_at_once_is_one_span_even_when_the_span_has_left_the_trace() -> None:
    trace = Trace(capacity=2)
    trace.add("sample", 0.0, 1.0)
    trace.add("sample", 1.0, 2.0)
    assert [(s.stage, s.start_s, s.end_s) for s in trace.spans] == [("sample", 0.0, 2.0)]
    trace.add("score", 1.0, 2.0)
    trace.add("update", 1.0, 2.0)
    trace.add("sample", 2.0, 3.0)
    assert [(s.stage, s.start_s, s.end_s) for s in trace.spans] == [("score", 1.0, 2.0), ("update", 1.0, 2.0)]
    assert trace.pop_times()[0] == {"sample": 3.0, "score": 1.0, "update": 1.0}
