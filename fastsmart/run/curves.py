"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmart.machine.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LEGEND_ROOM = 1.6  # height of the axis above the highest stack of stages, which the legend would hide


def plot_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Write the picture of `curves`, where there is a step to show and matplotlib to draw it.

    Raises UserError if it cannot be written.
    """
    try:
        figure = curves(lines)
    except ImportError:
        return
    if figure:
        with atomic_file(path) as part:
            figure.savefig(part, format="png", dpi=110)


def curves(lines: list[dict[str, Any]]) -> Figure | None:
    """Reward, its terms, notes, KL, entropy, diversity, and the time of each stage, over steps; None without a step.

    lines : of metrics.jsonl
    """
    from matplotlib.figure import Figure

    steps = [line for line in lines if "reward" in line]
    held_out = [line for line in lines if "eval" in line]
    if not steps:
        return None
    figure = Figure(figsize=(12, 7), layout="constrained")
    places = ("reward", "terms", "notes", "kl"), ("entropy", "diversity", "time", "kl per completion")
    axes = list(figure.subplot_mosaic([list(row) for row in places]).values())
    x = [line["step"] for line in steps]
    x_held_out = [line["step"] for line in held_out]
    openings = held_out[0]["eval"].get("openings") if held_out else None
    label = f"{openings} held-out openings" if openings else "held-out openings"

    def held_out_band(ax: Any, moments: list[dict[str, float]], colour: str) -> None:
        mean = [m["mean"] for m in moments]
        ax.plot(x_held_out, mean, "o-", color=colour, label=label)

    axes[0].plot(x, [line["reward"] for line in steps], alpha=0.5, label="training prompts")
    held_out_band(axes[0], [line["eval"]["reward"] for line in held_out], "C1")
    axes[0].set(title="reward", xlabel="step")
    axes[0].legend()
    for i, name in enumerate(held_out[0]["eval"]["terms"] if held_out else []):
        change = _change([line["eval"]["terms"][name] for line in held_out])
        axes[1].plot(x_held_out, change, "o-", color=f"C{i}", label=name)
    axes[1].set(title="reward terms, held-out", xlabel="step", ylabel="change in standard deviations at step 0")
    axes[1].yaxis.label.set_fontsize("small")
    if held_out:
        axes[1].legend(fontsize="small")
    axes[2].plot(x, [line["notes"] for line in steps], alpha=0.5, label="training prompts")
    held_out_band(axes[2], [line["eval"]["features"]["notes"] for line in held_out], "C1")
    axes[2].set(title="notes per clip", xlabel="step", ylim=(0, None))
    axes[2].legend()
    axes[3].plot(x, [_number(line.get("kl")) for line in steps])
    axes[3].set(title="KL to the base policy", xlabel="step", ylabel="nats per token")
    axes[4].plot(x, [_number(line.get("entropy")) for line in steps])
    axes[4].set(title="entropy", xlabel="step", ylabel="nats per token")
    for i, name in enumerate(_distances(held_out[0]["eval"].get("diversity", ())) if held_out else ()):
        measured = [_number(line["eval"].get("diversity", {}).get(name)) for line in held_out]
        axes[5].plot(x_held_out, measured, "o-", color=f"C{i}", label=_kind(name))
    axes[5].set(title="diversity, held-out", xlabel="step", ylabel="distance", ylim=(0, 1.05))
    if axes[5].lines:
        axes[5].legend(fontsize="small")
    stages = [s for s in ("sample", "decode", "render", "score", "update", "sync") if s in steps[-1]["time"]]
    axes[6].stackplot(x, *[[line["time"].get(s, 0.0) for line in steps] for s in stages], labels=stages)
    most = max(sum(line["time"].get(s, 0.0) for s in stages) for line in steps)
    axes[6].set(title="seconds per step", xlabel="step", ylim=(0, LEGEND_ROOM * most or 1))
    axes[6].legend(fontsize="small", loc="upper right", ncols=2)
    axes[7].plot(x, [_number(line.get("kl_per_completion")) for line in steps])
    axes[7].set(title="KL to the base policy", xlabel="step", ylabel="nats per clip")
    return figure


def _change(moments: list[dict[str, float]]) -> list[float]:
    """Differences of the means from the first, in standard deviations of the first; NaN where one is missing."""
    first, scale = moments[0]["mean"], moments[0]["std"] or 1.0
    known = [m["mean"] is not None and first is not None for m in moments]
    return [(m["mean"] - first) / scale if k else float("nan") for m, k in zip(moments, known, strict=True)]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _kind(distance: str) -> str:
    return distance.removeprefix("rarefied_").replace("_distance", "").replace("_", " ")


def _distances(measured: Iterable[str]) -> list[str]:
    """The metrics of diversity to draw: distances at equal size where a run has them, else those of whole clips."""
    names = [name for name in measured if "_distance" in name]
    for wanted in ("_distance_across", "_distance_within"):
        if found := [name for name in names if name.startswith("rarefied_") and name.endswith(wanted)]:
            return found
    return names
