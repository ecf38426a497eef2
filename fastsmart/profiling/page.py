"""A profile as one self-contained page: the largest costs, stages and idle gaps, operators, memory."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from fastsmart.machine.files import write_atomic
from fastsmart.machine.hardware import installed_version
from fastsmart.profiling.analysis import GPU
from fastsmart.run.trace import RESOURCES
from fastsmart.study.figures import RULE, SERIES, SOFT
from fastsmart.study.report import draw, render_page
from fastsmart.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPERATORS, GAPS, DRAWN_GAPS = 20, 12, 6
COLOURS = {"sample": 0, "update": 1, "render": 2, "score": 3, "sync": 4, "decode": 5, "clip": 2, "backward": 1,
           "forward": 0, "reference": 5, "optimizer": 3, GPU: 4}  # fmt: skip
NARROW = 0.07  # share of the step below which a span has no room for its name


def write_page(found: dict[str, Any], path: str | Path) -> Path:
    """Write the page about the figures of `fastsmart.profiling.profile`; raises UserError when it cannot be written."""
    path, seconds, shown = Path(path), found["step_s"], found["shown"]
    gaps = [gap for gap in found["gaps"] if gap["step"] == shown["name"]][:GAPS]
    idle, plain = found["idle"], found["unprofiled_step_s"]
    tables = [("The costliest operators", found["operators"]), ("The costliest kernels on the GPU", found["kernels"])]
    page = render_page(
        "profile.html",
        "",
        title="Where the time of a step goes",
        steps=f"{counted(len(found['steps']), 'step')} of {seconds:.3g} s each under torch's profiler",
        own_cost=f"The step before, without it, took {plain:.3g} s." if plain else "",
        costs=[{"what": c["what"], "share": _share(c), "seconds": _ms(c["share"] * seconds)} for c in found["costs"]],
        timeline=draw(partial(timeline, shown, gaps), "timeline", "What every stage did when, in one step"),
        shown=f"{shown['name'].capitalize()}, {shown['seconds']:.3g} s",
        stages=[
            {
                "stage": stage,
                "seconds": f"{row['seconds']:.4f}",
                "share": _share(row),
                "resource": row["resource"],
                "idle": f"{idle[row['resource']]:.0%}" if row["resource"] in idle else "–",
            }
            for stage, row in found["stages"].items()
        ],
        gap_step=shown["name"],
        gaps=[
            gap
            | {
                "ms": f"{1e3 * gap['seconds']:.1f}",
                "share": f"{gap['seconds'] / shown['seconds']:.1%}",
                "meanwhile": ", ".join(gap["meanwhile"]) or "–",
            }
            for gap in gaps
        ],
        operators=[
            {
                "title": title,
                "caption": "By time of their own, without that of the operators they call; mean over the steps.",
                "rows": [_operator(row) for row in rows[:OPERATORS]],
            }
            for title, rows in tables
            if rows
        ],
        memory=draw(partial(memory, found["memory"], found["steps"]), "memory", "Memory over the profiled steps"),
        memory_caption="Resident memory of this process (render workers have their own)"
        + (", and what torch holds on the GPU." if any(m[3] for m in found["memory"]) else "."),
        config=found["config"],
        provenance=json.dumps(found["provenance"], indent=1),
        version=installed_version("fastsmart"),
    )
    write_atomic(path, page)
    return path


def timeline(shown: dict[str, Any], gaps: list[dict[str, Any]]) -> Figure:
    """One step, a row for each lane that did something, with the longest gaps of the resources marked."""
    from matplotlib.figure import Figure

    lanes = shown["lanes"]
    figure = Figure(figsize=(11, 0.42 * len(lanes) + 0.9), layout="constrained")
    ax = figure.subplots()
    rows = {lane: len(lanes) - 1 - i for i, lane in enumerate(lanes)}
    for lane, spans in lanes.items():
        for name, start, length in spans:
            colour = SERIES[COLOURS[name]] if name in COLOURS else SOFT
            ax.broken_barh([(start, length)], (rows[lane] - 0.36, 0.72), color=colour, alpha=0.45, linewidth=0.6)
            if length > NARROW * shown["seconds"] and lane not in (name, GPU):
                ax.text(start + length / 2, rows[lane], name, ha="center", va="center", fontsize=9)
    drawn = [gap for gap in gaps if gap["resource"] in (*RESOURCES, GPU) and gap["resource"] in rows]
    for gap in drawn[:DRAWN_GAPS]:
        place = (gap["start_s"], rows[gap["resource"]] - 0.36)
        ax.add_patch(_dashed(place, gap["seconds"]))
        if gap["seconds"] > NARROW * shown["seconds"]:
            middle = gap["start_s"] + gap["seconds"] / 2
            ax.text(middle, rows[gap["resource"]], f"idle {_ms(gap['seconds'])}", ha="center", va="center", fontsize=9)
    ax.set_yticks(list(rows.values()), list(rows))
    ax.set(xlim=(0, shown["seconds"]), ylim=(-0.6, len(rows) - 0.4), xlabel="seconds of the step")
    ax.grid(axis="y", visible=False)
    return figure


def memory(samples: list[list[float]], steps: list[dict[str, Any]]) -> Figure:
    """Memory over time, with lines where steps end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    ax = figure.subplots()
    time_s, rss, allocated, reserved = zip(*samples, strict=True) if samples else ((), (), (), ())
    ax.plot(time_s, rss, label="resident")
    if any(reserved):
        ax.plot(time_s, allocated, label="CUDA allocated")
        ax.plot(time_s, reserved, label="CUDA reserved")
    end = 0.0
    for step in steps:
        end += step["seconds"]
        ax.axvline(end, color=RULE, linestyle="--")
    ax.set(xlabel="seconds since the first profiled step began", ylabel="MB", ylim=(0, None))
    ax.legend(loc="lower right")
    return figure


def _dashed(place: tuple[float, float], width: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(place, width, 0.72, fill=False, linestyle="--", edgecolor=SOFT, linewidth=0.8)


def _operator(row: dict[str, Any]) -> dict[str, str]:
    calls = row["calls"]
    return {
        "name": row["name"].removeprefix("aten::"),
        "place": f"{row['stage']}, {row['phase']}" if row["phase"] else row["stage"],
        "ms": f"{1e3 * row['seconds']:.1f}",
        "share": _share(row),
        "calls": f"{calls:,.0f}" if calls else "–",
        "each": f"{1e6 * row['seconds'] / calls:.1f}" if calls else "–",
        "shapes": shorten(row["shapes"][1:-1], 40, placeholder=" …") or "–",
    }


def _share(row: dict[str, Any]) -> str:
    return f"{row['share']:.1%}"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
