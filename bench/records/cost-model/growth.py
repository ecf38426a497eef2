"""How the time of each stage grows with the batch, the length, the layers and the render workers.

    python bench/growth.py --out bench/results/growth.json --picture docs/growth.svg

From one base point, the shape of the shipped policy (4 layers, 256 wide) with 32 completions of 128 tokens, one thing
at a time is varied; all points take turns, and a point's time is the median of its runs. Clips are not cut at 10 s
here, so that they grow with their tokens. Scoring is by the demo's formula rewards.

An exponent is the slope of log time over log size, by least squares over the whole axis or between two neighbours. The
model is that of docs/scaling.md with its constants fitted to these very points; where a local slope is more than 0.15
away from proportional growth, the term is named to which the model owes most of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

import numpy as np
import torch
from harness import Job as Timed
from harness import interleaved, parser
from results import write_result
from scaling import (
    PROMPT,
    AudioRun,
    Job,
    PolicyRun,
    audio_terms,
    fit_constants,
    sampling_terms,
    shipped_pieces,
    update_terms,
)  # fmt: skip

from fastsmart.audio import RenderPool, RenderSettings
from fastsmart.machine.files import cpu_cores
from fastsmart.study.figures import MARKERS, SERIES, SOFT
from fastsmart.study.report import draw, standalone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = Job(width=256, layers=4, clips=32, tokens=128)
AXES = {
    "clips": (8, 16, 32, 64, 128, 256, 512),
    "tokens": (64, 128, 256, 512, 1024),
    "layers": (4, 6, 8, 12),
}
SMALL_BASE = Job(width=64, layers=2, clips=16, tokens=32)
SMALL_AXES = {"clips": (8, 16, 32), "tokens": (16, 32, 64), "layers": (1, 2, 4)}
LABELS = {
    "clips": "completions", "tokens": "tokens of a completion", "layers": "layers", "workers": "render workers",
}  # fmt: skip
STAGES = ("sample", "update", "decode", "render", "score", "FluidSynth")  # the last is "render" by the other backend
TERMS = {
    "sample": ("calls", "matrix products", "keys and values", "draws"),
    "update": ("matrix products", "attention", "AdamW"),
    "decode": ("clips", "tokens"),
    "render": ("clips", "seconds of audio", "copies by one process"),
    "score": ("clips", "seconds of audio"),
}
TERMS["FluidSynth"] = TERMS["render"]
LINEAR = 0.15  # how far from proportional a local slope may be
MOST_SECONDS = 55.0  # of a clip, near what the note bank holds
PIECES = 64  # different ones; larger batches repeat them


@dataclass
class Sweep:
    """What is measured. Points on several axes are measured once.

    jobs  : by name, "sample Job(…)"
    terms : of the model, by the same names; some are known only after the job has run
    lines : (axis, stage) -> sizes and names
    """

    jobs: dict[str, Timed] = field(default_factory=dict)
    terms: dict[str, Callable[[], list[float]]] = field(default_factory=dict)
    lines: dict[tuple[str, str], list[tuple[int, str]]] = field(default_factory=dict)

    def add(self, axis: str, size: int, stage: str, point: object) -> None:
        self.lines.setdefault((axis, stage), []).append((size, f"{stage} {point}"))

    def measure_policy(self, job: Job, device: str) -> None:
        run = PolicyRun(job, device)
        self.jobs |= {f"sample {job}": run.sample, f"update {job}": run.update}
        self.terms |= {f"sample {job}": lambda: sampling_terms(job), f"update {job}": lambda: update_terms(job)}

    def measure_audio(self, point: AudioPoint, pool: RenderPool, pieces: list[np.ndarray]) -> None:
        cut = [pieces[i % len(pieces)][: PROMPT + point.tokens] for i in range(point.clips)]
        run = AudioRun(pool, cut, MOST_SECONDS)

        def heard() -> list[float]:
            return audio_terms((point.clips, float(run.audio.lengths.mean()) / run.audio.sample_rate))

        def rendered() -> list[float]:
            shared = min(point.workers, cpu_cores())
            return [*(term / shared for term in heard()), heard()[1]]

        render = "render" if point.backend == "bank" else "FluidSynth"
        self.jobs |= {f"decode {point}": run.decode, f"{render} {point}": run.render, f"score {point}": run.score}
        self.terms |= {
            f"decode {point}": lambda: [point.clips, point.clips * point.tokens],
            f"{render} {point}": rendered,
            f"score {point}": heard,
        }


@dataclass(frozen=True)
class AudioPoint:
    clips: int
    tokens: int
    workers: int
    backend: str = "bank"


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--small", action="store_true", help="short axes, to see that it works")
    arguments.add_argument("--picture", default="", help="SVG file for the figure")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    base, axes = (SMALL_BASE, SMALL_AXES) if options.small else (BASE, AXES)
    with ExitStack() as pools:
        sweep = prepared(base, axes, options.device, pools)
        seconds = interleaved(sweep.jobs, options.runs, options.device)
        terms = {name: make() for name, make in sweep.terms.items()}
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    cache_mb = last_cache_mb() if options.device == "cpu" else None
    lines = []
    for stage in STAGES:
        names = [name for name in sweep.jobs if name.startswith(f"{stage} ")]
        constants = fit_constants([terms[n] for n in names], [medians[n] for n in names])
        for (axis, of), points in sweep.lines.items():
            if of == stage:
                sizes, keys = zip(*points, strict=True)
                grown = growth(axis, stage, sizes, [medians[k] for k in keys], [terms[k] for k in keys], constants)
                lines.append({"axis": axis, "stage": stage, **grown, "each_s": [seconds[k] for k in keys]})
    lines.sort(key=lambda line: (list(LABELS).index(line["axis"]), STAGES.index(line["stage"])))
    show(lines)
    crossings = {axis: outgrows(base, axis, cache_mb) for axis in ("clips", "tokens") if cache_mb}
    if crossings:
        print(f"all keys and values outgrow the {cache_mb:.0f} MB of the last cache at {crossings}")
    if options.picture:
        svg = draw(
            lambda: picture(lines, crossings), "growth", "Time of each stage over batch, length, layers, workers"
        )
        Path(options.picture).write_text(standalone(svg) + "\n", encoding="utf-8")
    if options.out:
        cache = {"last_cache_mb": cache_mb, "outgrown_at": crossings}
        write_result(
            options.out, {"base": repr(base), "lines": lines, **cache, "reference": seconds["reference kernel"]}
        )


def prepared(base: Job, axes: dict[str, Sequence[int]], device: str, pools: ExitStack) -> Sweep:
    sweep, cores = Sweep(), cpu_cores()
    sound = AudioPoint(base.clips, base.tokens, cores)
    policies: dict[Job, None] = {}
    sounds: dict[AudioPoint, None] = {}
    for axis, sizes in axes.items():
        for size in sizes:
            job = replace(base, **{axis: size})
            policies[job] = None
            for stage in ("sample", "update"):
                sweep.add(axis, size, stage, job)
            if axis != "layers":  # the policy is all that has layers
                point = replace(sound, **{axis: size})
                sounds[point] = None
                for stage in ("decode", "render", "score"):
                    sweep.add(axis, size, stage, point)
    for backend, stage in (("bank", "render"), ("fluidsynth", "FluidSynth")):
        for workers in sorted({2**i for i in range((2 * cores).bit_length())} | {cores, 2 * cores}):
            point = replace(sound, workers=workers, backend=backend)
            sounds[point] = None
            sweep.add("workers", workers, stage, point)
    for job in policies:
        sweep.measure_policy(job, device)
    pieces = shipped_pieces(min(PIECES, max(p.clips for p in sounds)), max(p.tokens for p in sounds))
    held: dict[tuple[int, str], RenderPool] = {}
    for point in sounds:
        key = point.workers, point.backend
        if key not in held:
            capacity = max(p.clips for p in sounds if (p.workers, p.backend) == key)
            settings = RenderSettings(max_seconds=MOST_SECONDS, workers=point.workers, backend=point.backend)
            held[key] = pools.enter_context(RenderPool(settings, capacity))
        sweep.measure_audio(point, held[key], pieces)
    return sweep


def growth(
    axis: str, stage: str, sizes: Sequence[int], seconds: Sequence[float], terms: list[list[float]], units: np.ndarray
) -> dict[str, Any]:
    """Exponents of a line, measured and the model's, how far it is proportional, and what the model says of the rest.

    terms : of the model at each size; units : seconds of a unit of each term
    """
    target = -1.0 if axis == "workers" else 1.0  # work that is shared is proportional when twice the workers halve it
    parts = np.array(terms) * units  # [sizes, terms], seconds
    model, step, log = parts.sum(1), np.diff(np.log(sizes)), np.log(seconds)
    local, said = np.diff(log) / step, np.diff(np.log(model)) / step
    first, last = longest_run((abs(local - target) <= LINEAR).tolist())
    return {
        "sizes": list(sizes),
        "seconds": list(seconds),
        "model_s": model.tolist(),
        "model_shares": [dict(zip(TERMS[stage], row, strict=True)) for row in (parts / model[:, None]).tolist()],
        "exponent": float(np.polyfit(np.log(sizes), log, 1)[0]),
        "local": local.tolist(),
        "model_local": said.tolist(),
        "proportional": [sizes[first], sizes[last]] if last > first else None,
        "why_not": {
            f"{sizes[i]} to {sizes[i + 1]}": reason(TERMS[stage], parts[i : i + 2], step[i], slope - target, target)
            for i, slope in enumerate(local.tolist())
            if abs(slope - target) > LINEAR
        },
    }


def longest_run(true: Sequence[bool]) -> tuple[int, int]:
    """Start and end of the longest run of true values, (0, 0) where there are none."""
    runs, start = [(0, 0)], 0
    for i, value in enumerate(true):
        start = start if value else i + 1
        runs.append((start, i + 1))
    return max(runs, key=lambda run: run[1] - run[0])


def reason(names: Sequence[str], parts: np.ndarray, step: float, departure: float, target: float) -> str:
    """The term to which the model owes most of a departure from proportional growth between two neighbours.

    The model's local slope is the mean of its terms' own exponents, each weighed by the term's share of the time.
    """
    share = (parts / parts.sum(1, keepdims=True)).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.nan_to_num(np.log(parts[1] / parts[0]) / step)
    owed = share * (exponent - target) * np.sign(departure)
    if owed.sum() < abs(departure) / 2:
        return "not in the model"
    most = int(owed.argmax())
    return f"{names[most]}: {share[most]:.0%} of the model's time, exponent {exponent[most]:.1f}"


def last_cache_mb() -> float | None:
    """Size of the largest cache of the first core, where Linux tells."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024e-6 for size in sizes if size.endswith("K")), default=None)


def outgrows(base: Job, axis: str, cache_mb: float) -> float:
    """Size at which the keys and values of all layers, float32, are as large as a cache at the end of a completion."""
    bytes_a_token = 8.0 * base.layers * base.width
    if axis == "clips":
        return 1e6 * cache_mb / bytes_a_token / (PROMPT + base.tokens)
    return 1e6 * cache_mb / bytes_a_token / base.clips - PROMPT


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table, as it stands in docs/scaling.md."""
    print("| axis | stage | s, first to last | exponent | between neighbours (model) | proportional | elsewhere |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        sizes, seconds = line["sizes"], line["seconds"]
        local = ", ".join(f"{m:.2f} ({s:.2f})" for m, s in zip(line["local"], line["model_local"], strict=True))
        good = "{} to {}".format(*line["proportional"]) if line["proportional"] else "nowhere"
        why = "; ".join(f"{where}: {what}" for where, what in line["why_not"].items()) or "-"
        print(
            f"| {LABELS[line['axis']]} {sizes[0]} to {sizes[-1]} | {line['stage']} | {seconds[0]:.3g} to "
            f"{seconds[-1]:.3g} | {line['exponent']:.2f} | {local} | {good} | {why} |"
        )


def picture(lines: Sequence[dict[str, Any]], crossings: dict[str, float]) -> Figure:
    """A panel for each axis: what was measured as points, the model as lines, proportional growth dotted."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(10, 8.2), layout="constrained")
    figure.suptitle("points: measured;  lines: the model;  numbers: exponent fitted to the points", fontsize=10)
    for ax, axis in zip(figure.subplots(2, 2).ravel(), LABELS, strict=True):
        here = [line for line in lines if line["axis"] == axis]
        sizes = max((line["sizes"] for line in here), key=len)
        low = 0.4 * min(line["seconds"][0] for line in here if line["stage"] != "decode")
        guide = [low * (size / sizes[0]) ** (-1 if axis == "workers" else 1) for size in sizes]
        ax.plot(sizes, guide, color=SOFT, linewidth=1, linestyle=(0, (1, 2)))
        ends = [(guide[-1], "proportional", SOFT)]
        for line in here:
            k = STAGES.index(line["stage"])
            ax.plot(line["sizes"], line["model_s"], "-", color=SERIES[k], linewidth=1.3)
            ax.plot(line["sizes"], line["seconds"], MARKERS[k], color=SERIES[k], markersize=5.5)
            ends.append((line["seconds"][-1], f"{line['stage']} {line['exponent']:.2f}", SERIES[k]))
        ax.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="seconds")
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.xaxis.set_minor_locator(NullLocator())
        bottom, top = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top > 100 * bottom else (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        label_ends(ax, sizes[-1], ends)
        if axis in crossings and sizes[0] < crossings[axis] < sizes[-1]:
            ax.axvline(crossings[axis], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
            ax.annotate(
                "keys and values leave the last cache", (crossings[axis], 0.02), xycoords=ax.get_xaxis_transform(),
                xytext=(4, 0), textcoords="offset points", color=SOFT, fontsize=8,
            )  # fmt: skip
    return figure


def label_ends(ax: Any, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names of lines to the right of their last points, moved apart where they would cover each other."""
    low, high = np.log(ax.get_ylim())
    places: list[float] = []
    for y, text, colour in sorted(ends):
        place = (math.log(y) - low) / (high - low)
        places.append(max(place, places[-1] + 0.055) if places else place)
        ax.annotate(
            text, (x, places[-1]), xycoords=ax.get_xaxis_transform(), xytext=(10, 0), textcoords="offset points",
            color=colour, va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
