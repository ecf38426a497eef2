"""Analysis of a profile: seconds of stages and of operators within them, the largest costs, idle gaps, memory.

All times are seconds after the first profiled step began. An operator belongs to the stage that its thread was in; its
own time is what it does not spend in operators that it calls. What a stage spends in none is a row too, so that the
rows of a stage add up to the time its thread gave to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastsmart.run.trace import LANES, RESOURCES

Key = tuple[str, str, str]  # stage, phase, operator or kind of operator
UPDATE, RENDER, ELSEWHERE, GPU, NOBODY = "update", "render", "between stages", "GPU", "all"
OUTSIDE = "outside of torch's operators"  # Python, numpy, numba
NOT_HERE = {RENDER: "render worker processes", "wait": "waiting for the batch"}
SHORTEST_GAP_S = 1e-3
LARGEST = 3  # costs that are named
# Kinds of operators, by what their names contain; the first that fits. What fits none computes element by element.
KINDS = {
    "attention": ("scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "matrix products": ("mm", "matmul", "linear", "gemm", "einsum"),
    "convolutions": ("conv",),
    "soft-max": ("softmax", "logsumexp"),
    "norms": ("norm",),
    "AdamW": ("adam", "Optimizer."),
    "waiting for the GPU": ("item", "_local_scalar_dense"),
    "copies and look-ups": ("copy", "clone", "cat", "index", "gather", "embedding", "contiguous", "scatter"),
}


@dataclass(frozen=True)
class Interval:
    name: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def later(self, by_s: float) -> Interval:
        return replace(self, start_s=self.start_s + by_s, end_s=self.end_s + by_s)

    def within(self, frame: Interval) -> Interval:
        """The part inside the frame; without length where there is none."""
        start = min(max(self.start_s, frame.start_s), frame.end_s)
        return replace(self, start_s=start, end_s=max(start, min(self.end_s, frame.end_s)))


@dataclass(frozen=True)
class Memory:
    """Megabytes at a time: of the process, and of torch's allocator on the GPU."""

    time_s: float
    rss_mb: float
    cuda_mb: float = 0.0
    cuda_reserved_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class Operator:
    """One call of an operator or what an annotation encloses.

    thread : the system's number of it; -1 = on the GPU
    number : of a call; of what runs on the GPU, that of the call that launched it
    """

    name: str
    start_s: float
    end_s: float
    thread: int
    annotation: bool = False
    shapes: str = ""
    number: int = -1


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps that follow one another, as the profiler saw them.

    spans        : of the stages, each with its lane and the thread that was in it
    unprofiled_s : seconds of a step without the profiler, where there was one to compare
    """

    steps: list[Interval]
    spans: list[tuple[Interval, str, int]]
    operators: list[Operator]
    memory: list[Memory]
    unprofiled_s: float | None = None

    @property
    def whole(self) -> Interval:
        return Interval("all steps", self.steps[0].start_s, self.steps[-1].end_s)

    def lane(self, lane: str) -> list[Interval]:
        """Intervals of a lane, or of the GPU, in order of time."""
        if lane == GPU:
            found = [Interval(GPU, o.start_s, o.end_s) for o in self.operators if o.thread < 0]
        else:
            found = [span for span, name, _ in self.spans if name == lane]
        return sorted(found, key=lambda i: i.start_s)


@dataclass
class Row:
    """Operators of one name in one phase of a stage: own seconds, calls, and how often they had which shapes."""

    seconds: float = 0.0
    calls: int = 0
    shapes: Counter[str] = field(default_factory=Counter)


@dataclass
class Tally:
    """The rows of the host's threads, those of the GPU, and when the trainer was in which phase of the update."""

    host: dict[Key, Row] = field(default_factory=lambda: defaultdict(Row))
    gpu: dict[Key, Row] = field(default_factory=lambda: defaultdict(Row))
    phases: list[Interval] = field(default_factory=list)


def summary(profiled: ProfiledSteps) -> dict[str, Any]:
    """All figures of a profile, ready for JSON; seconds are means over the steps unless they say otherwise."""
    whole, count = profiled.whole, len(profiled.steps)
    step_s = whole.seconds / count
    tally = tallied(profiled)
    lanes = [lane for lane in (*RESOURCES, GPU) if profiled.lane(lane)]
    shown = sorted(profiled.steps, key=lambda step: step.seconds)[count // 2]
    stages = {}
    for stage in LANES:
        spans = [span for span, lane, _ in profiled.spans if span.name == stage and lane == LANES[stage]]
        if spans:
            seconds = covered_s(spans, whole) / count
            stages[stage] = {"seconds": seconds, "share": seconds / step_s, "resource": LANES[stage]}
    return {
        "step_s": step_s,
        "steps": [{"name": step.name, "seconds": step.seconds} for step in profiled.steps],
        "unprofiled_step_s": profiled.unprofiled_s,
        "stages": stages,
        "idle": {lane: 1.0 - covered_s(profiled.lane(lane), whole) / whole.seconds for lane in lanes},
        "costs": costs(tally.host, whole.seconds)[:LARGEST],
        "operators": rows(tally.host, count, step_s),
        "kernels": rows(tally.gpu, count, step_s),
        "gaps": [gap for step in profiled.steps for gap in gaps(profiled, step, lanes)],
        "memory": [[m.time_s, m.rss_mb, m.cuda_mb, m.cuda_reserved_mb] for m in profiled.memory],
        "shown": {"name": shown.name, "start_s": shown.start_s, "seconds": shown.seconds}
        | {"lanes": timeline(profiled, tally, shown)},
    }


def tallied(profiled: ProfiledSteps) -> Tally:
    """Own time of every operator, by stage and phase, within the steps."""
    tally, whole = Tally(), profiled.whole
    launched_by: dict[int, tuple[str, str]] = {}
    by_thread: dict[int, list[Operator]] = defaultdict(list)
    for operator in profiled.operators:
        if whole.start_s <= operator.start_s < whole.end_s:
            by_thread[operator.thread].append(operator)
    on_gpu = by_thread.pop(-1, [])
    spans: dict[int, list[Interval]] = defaultdict(list)
    for span, lane, thread in profiled.spans:
        if lane in LANES.values() and (inside := span.within(whole)).seconds > 0:
            spans[thread].append(inside)
    updates = [span for each in spans.values() for span in each if span.name == UPDATE]
    for thread in by_thread.keys() | spans.keys():
        # autograd works for a GPU in threads of its own
        place = Places(spans.get(thread, updates))
        left = place.seconds if thread in spans else defaultdict(float)
        for operator, own_s, phase in own_times(by_thread.get(thread, []), tally.phases):
            stage = place.at(operator.start_s)
            launched_by[operator.number] = (stage, phase)
            _add(tally.host, (stage, phase, OUTSIDE if operator.annotation else operator.name), own_s, operator)
            left[stage] -= own_s
        for stage, seconds in left.items():
            if stage != ELSEWHERE and seconds > 0:
                tally.host[stage, "", NOT_HERE.get(stage, OUTSIDE)].seconds += seconds
    for operator in on_gpu:
        stage, phase = launched_by.get(operator.number, (ELSEWHERE, ""))
        _add(tally.gpu, (stage, phase, operator.name), operator.end_s - operator.start_s, operator)
    return tally


class Places:
    """Stage of a thread at any time: of spans that overlap, the one that began last. `seconds` spent in each.

    Rendering is the pool's work, and its span may begin while the thread that will collect the clips still samples:
    there the thread is in what it does itself.
    """

    def __init__(self, spans: Sequence[Interval]) -> None:
        cuts = sorted({time for span in spans for time in (span.start_s, span.end_s)})
        self.starts, self.stages = cuts, list[str]()
        self.seconds: dict[str, float] = defaultdict(float)
        ordered = sorted(spans, key=lambda span: span.start_s)
        opened: list[Interval] = []
        for start, end in zip(cuts, [*cuts[1:], float("inf")], strict=True):
            while ordered and ordered[0].start_s <= start:
                opened.append(ordered.pop(0))
            opened = [span for span in opened if span.end_s > start]
            own = [span for span in opened if span.name != RENDER] or opened
            self.stages.append(own[-1].name if own else ELSEWHERE)
            if own:
                self.seconds[own[-1].name] += end - start

    def at(self, time_s: float) -> str:
        found = bisect_right(self.starts, time_s) - 1
        return self.stages[found] if found >= 0 else ELSEWHERE


def own_times(operators: list[Operator], phases: list[Interval]) -> Iterable[tuple[Operator, float, str]]:
    """Every call of a thread with its own seconds and its phase, which is that of the outermost call that has one.

    Phases that begin are added to `phases`.
    """
    stack: list[tuple[Operator, str]] = []
    own: list[float] = []
    for operator in sorted(operators, key=lambda o: (o.start_s, -o.end_s)):
        while stack and stack[-1][0].end_s <= operator.start_s:
            called, phase = stack.pop()
            yield called, own.pop(), phase
        seconds = operator.end_s - operator.start_s
        phase = stack[-1][1] if stack else ""
        if not phase and (phase := phase_of(operator)):
            phases.append(Interval(phase, operator.start_s, operator.end_s))
        if own:
            own[-1] -= seconds
        stack.append((operator, phase))
        own.append(seconds)
    while stack:
        called, phase = stack.pop()
        yield called, own.pop(), phase


def phase_of(operator: Operator) -> str:
    """The part of the update that a call stands for: annotated by us, by autograd or by the optimizer."""
    if operator.name.startswith("autograd::engine::evaluate_function"):
        return "backward"
    if operator.name.startswith("Optimizer.step"):
        return "optimizer"
    return operator.name if operator.annotation and operator.name in ("reference", "forward") else ""


def kind_of(name: str) -> str:
    """Sort of work that an operator does."""
    if name == OUTSIDE or name in NOT_HERE.values():
        return name
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "element by element")


def costs(tally: dict[Key, Row], whole_s: float) -> list[dict[str, Any]]:
    """Kinds of work within phases of stages, the costliest first, in words; waiting is none."""
    seconds: dict[Key, float] = defaultdict(float)
    for (stage, phase, name), row in tally.items():
        if stage not in ("wait", ELSEWHERE):
            seconds[stage, phase, kind_of(name)] += row.seconds
    return [
        {
            "what": f"{stage}{', ' if phase else ''}{phase}: {kind}",
            "stage": stage, "phase": phase, "kind": kind, "share": spent / whole_s,
        }
        for (stage, phase, kind), spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]  # fmt: skip


def rows(tally: dict[Key, Row], steps: int, step_s: float) -> list[dict[str, Any]]:
    """The operators of a tally, the costliest first, a step."""
    ordered = sorted(tally.items(), key=lambda item: -item[1].seconds)
    return [
        {
            "name": name,
            "stage": stage,
            "phase": phase,
            "kind": kind_of(name),
            "seconds": row.seconds / steps,
            "share": row.seconds / steps / step_s,
            "calls": row.calls / steps,
            "shapes": row.shapes.most_common(1)[0][0] if row.shapes else "",
        }
        for (stage, phase, name), row in ordered
    ]


def gaps(profiled: ProfiledSteps, step: Interval, lanes: Sequence[str]) -> list[dict[str, Any]]:
    """Gaps of a step in which a resource, or all at once, had nothing to do; with the stages around and meanwhile."""
    everyone = [span for span, lane, _ in profiled.spans if lane in LANES.values() and lane != LANES["wait"]]
    busy = {lane: profiled.lane(lane) for lane in lanes} | {NOBODY: sorted(everyone, key=lambda s: s.start_s)}
    found = []
    for lane, spans in busy.items():
        until_s, after = step.start_s, "begin of the step"
        inside = [span for span in spans if span.start_s < step.end_s and span.end_s > step.start_s]
        for span in [*inside, Interval("end of the step", step.end_s, step.end_s)]:
            gap = Interval(lane, until_s, span.start_s)
            if gap.seconds >= SHORTEST_GAP_S:
                work = {stage: covered_s([s for s in everyone if s.name == stage], gap) for stage in LANES}
                busiest = sorted(LANES, key=lambda stage: -work[stage])[:2]
                found.append(
                    {
                        "resource": lane,
                        "step": step.name,
                        "start_s": gap.start_s - step.start_s,
                        "seconds": gap.seconds,
                        "after": after,
                        "before": span.name,
                        "meanwhile": [stage for stage in busiest if work[stage] > 0.1 * gap.seconds],
                    }
                )
            if span.end_s > until_s:
                until_s, after = span.end_s, span.name
    return sorted(found, key=lambda gap: -gap["seconds"])


def timeline(profiled: ProfiledSteps, tally: Tally, step: Interval) -> dict[str, list[list[Any]]]:
    """Lane -> [stage, start, seconds] of what it did in a step, start counted from that of the step."""
    names = list(dict.fromkeys([*LANES.values(), *sorted({lane for _, lane, _ in profiled.spans}), GPU]))
    lanes = {lane: profiled.lane(lane) for lane in names}
    lanes["phases of the update"] = sorted(tally.phases, key=lambda phase: phase.start_s)
    return {
        lane: [[i.name, i.start_s - step.start_s, i.seconds] for i in done]
        for lane, spans in lanes.items()
        if (done := joined(spans, step))
    }


def joined(spans: Sequence[Interval], frame: Interval) -> list[Interval]:
    """The spans inside a frame, in order; those of one name without a gap worth naming between them are one."""
    found: list[Interval] = []
    for span in sorted((s.within(frame) for s in spans), key=lambda s: s.start_s):
        if span.seconds <= 0:
            continue
        if found and span.start_s - found[-1].end_s < SHORTEST_GAP_S and span.name == found[-1].name:
            found[-1] = replace(found[-1], end_s=max(found[-1].end_s, span.end_s))
        else:
            found.append(span)
    return found


def covered_s(spans: Sequence[Interval], frame: Interval) -> float:
    """Seconds of the frame in which there is a span."""
    total, until = 0.0, frame.start_s
    for span in sorted((s.within(frame) for s in spans), key=lambda s: s.start_s):
        total += max(0.0, span.end_s - max(span.start_s, until))
        until = max(until, span.end_s)
    return total


def _add(tally: dict[Key, Row], key: Key, seconds: float, operator: Operator) -> None:
    row = tally[key]
    row.seconds += seconds
    row.calls += 1
    row.shapes[operator.shapes] += 1
