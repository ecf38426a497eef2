"""The figures of a report, as SVG that takes its colours from the page and so follows its light or dark theme.

matplotlib draws with placeholder colours, which are replaced by CSS variables; text stays text. The page's own font is
used, so a figure needs nothing from outside it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmart.music.diversity import ROLL_BEATS, ROLL_TICKS, average_roll
from fastsmart.music.features import features
from fastsmart.study.evaluation import Evaluation, Metric
from fastsmart.study.frontier import Frontier, Kind, words
from fastsmart.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastsmart.notes import NoteBatch

TEXT, RULE, SOFT = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{i:02x}" for i in range(1, 7))
_VARIABLES = {TEXT: "currentColor", RULE: "var(--rule)", SOFT: "var(--soft)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, 1)
}
# the light colours of the page, for pictures that stand alone
ON_PAPER = ("#0b62c4", "#c2410c", "#15803d", "#7e22ce", "#be185d", "#0f766e")
GREY, PALE = "#6b7280", "#dfe3e8"
MARKERS = "osD^vP"  # so that a policy is known without its colour
PIANO = (21, 108)
ROLL_COLOUR = (0.23, 0.51, 0.86)  # reads on white and on black; the share of outputs is its opacity
_CHOSEN: tuple[tuple[Kind, str, str], ...] = (
    ("blend", "x", "blends of weights"),
    ("best of n", "*", "best of n of the first"),
    ("re-weighting", ".", "re-weighting: choosing alone"),
)
# title, feature, and bins; pitch and velocity are over notes, the others over outputs
DISTRIBUTIONS = (
    ("notes per output", "notes"),
    ("polyphony rate", "polyphony_rate"),
    ("empty-beat rate", "empty_beat_rate"),
    ("scale consistency", "scale_consistency"),
    ("pitch of notes", "pitch"),
    ("pitch range, semitones", "pitch_range"),
    ("velocity of notes", "velocity"),
    ("velocity range", "velocity_range"),
)


def style() -> Any:
    """matplotlib settings of every figure, for `matplotlib.rc_context`."""
    from cycler import cycler

    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "grid.color": RULE,
        "axes.edgecolor": SOFT,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), TEXT),
        **dict.fromkeys(("xtick.color", "ytick.color"), SOFT),
    }


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline <svg> that a screen reader announces by its description.

    name : unique in the page; it keeps the ids of several figures apart
    """
    import matplotlib as mpl

    sink = io.StringIO()
    with mpl.rc_context({**style(), "svg.hashsalt": name}):
        figure.savefig(sink, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # every figure would have its own "axes_1"
    svg = re.sub(r"""font(?:-family)?: [^;"]*?(\d+)px [^;"]*""", r"font-size: \1px", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{escape(description)}"', svg, count=1)
    return svg.strip()


def to_png(make: Callable[[], Figure]) -> bytes:
    """A figure drawn in colours for white paper, as the content of a PNG file."""
    import matplotlib as mpl

    sink, paper = io.BytesIO(), style() | {"grid.color": PALE}
    paper |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    paper |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "white")
    with mpl.rc_context(paper):
        make().savefig(sink, format="png", dpi=150)
    return sink.getvalue()


def changes(evaluation: Evaluation) -> Figure:
    """Change of every reward and feature against the first policy, in its standard deviations, with intervals."""
    first, *others = evaluation.labels
    metrics = [m for m in evaluation.metrics if m.group in ("reward", "feature") and m.spread[first]]
    fonts = {m.soundfont for m in metrics if m.soundfont}
    names = [_axis_name(m, len(fonts) > 1) for m in metrics]
    figure = _figure(9, 0.28 * len(metrics) + 1.2)
    ax = figure.subplots()
    for k, label in enumerate(others):
        scaled = [_scaled(m, label, m.spread[first] or 1.0) for m in metrics]
        _intervals(ax, scaled, k, len(others), label, colour=k + 1)
    _finish_intervals(ax, names, f"change against {first}, in its standard deviations over outputs")
    return figure


def diversity_changes(evaluation: Evaluation) -> Figure:
    """Every diversity metric that is a share, of every policy, with intervals."""
    metrics = [m for m in evaluation.diversity() if "effective" not in m.name]
    metrics = [m for m in metrics if np.isfinite(m.values[evaluation.labels[0]].value)]
    figure = _figure(9, 0.3 * len(metrics) * max(1, len(evaluation.labels) / 3) + 1.2)
    ax = figure.subplots()
    for k, label in enumerate(evaluation.labels):
        values = [(e.value, e.low, e.high) for e in (m.values[label] for m in metrics)]
        _intervals(ax, values, k, len(evaluation.labels), label, colour=k)
    _finish_intervals(ax, [m.name.replace("_", " ") for m in metrics], "", zero=False)
    ax.set_xlim(0, 1.02)
    return figure


def distributions(notes: dict[str, NoteBatch]) -> Figure:
    """The paper's eight histograms, a line for each policy: outputs, and for pitch and velocity notes."""
    figure = _figure(11, 5)
    tables = {label: features(batch) for label, batch in notes.items()}
    for ax, (title, name) in zip(figure.subplots(2, 4).ravel(), DISTRIBUTIONS, strict=True):
        values = {
            label: getattr(notes[label], name) if name in ("pitch", "velocity") else table[name]
            for label, table in tables.items()
        }
        values = {label: v[np.isfinite(v)].astype(float) for label, v in values.items()}
        everything = np.concatenate(list(values.values()))
        if not len(everything):
            continue
        low, high = everything.min(), everything.max()
        edges = np.linspace(low, high if high > low else low + 1, 25)
        for k, (label, v) in enumerate(values.items()):
            share = np.histogram(v, edges)[0] / max(len(v), 1)
            ax.stairs(share, edges, color=SERIES[k % len(SERIES)], label=label, linewidth=1.6, linestyle=_dash(k))
        ax.set_title(title)
        ax.set_ylim(0, None)
        ax.yaxis.set_major_formatter(_percent())
    _legend_on_top(figure, len(notes))
    return figure


def average_rolls(notes: dict[str, NoteBatch]) -> Figure:
    """The paper's average piano rolls, one above the other, with one scale."""
    from matplotlib.colors import LinearSegmentedColormap

    rolls = {label: average_roll(batch) for label, batch in notes.items()}
    most = max((roll.max() for roll, _ in rolls.values()), default=0) or 1.0
    colours = LinearSegmentedColormap.from_list("roll", [(*ROLL_COLOUR, 0.0), (*ROLL_COLOUR, 1.0)])
    figure = _figure(11, 1.9 * len(rolls) + 0.5)
    axes = figure.subplots(len(rolls), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (label, (roll, outputs)) in zip(axes, rolls.items(), strict=True):
        area = (0, ROLL_BEATS, PIANO[0] - 0.5, PIANO[1] + 0.5)
        picture = ax.imshow(
            roll[PIANO[0] : PIANO[1] + 1] / most,
            cmap=colours, vmin=0, vmax=1, aspect="auto", origin="lower", extent=area, interpolation="nearest",
        )  # fmt: skip
        ax.set_title(f"{label}: {counted(outputs, 'output')} of at least {ROLL_BEATS} beats", loc="left")
        if not outputs:
            ax.text(ROLL_BEATS / 2, sum(PIANO) / 2, f"no output lasts {ROLL_BEATS} beats", ha="center", va="center")
        ax.set(
            yticks=[36, 48, 60, 72, 84], yticklabels=["C2", "C3", "C4", "C5", "C6"], xticks=range(0, ROLL_BEATS + 1, 4)
        )
        picture.set_rasterized(True)
    darkest = f"; darkest: {most:.0%} of the outputs" if any(n for _, n in rolls.values()) else ""
    axes[-1].set_xlabel(f"beats (in steps of 1/{ROLL_TICKS}){darkest}")
    return figure


def frontier(frontier: Frontier, series: Sequence[str] = SERIES, soft: str = SOFT) -> Figure:
    """Reward against each measure of diversity: a point for everything there is, none joined to another.

    series, soft : colours of the policies, and of what comes without training
    """
    figure = _figure(5.5 * len(frontier.measures), 4.6)
    for ax, measure in zip(
        figure.subplots(1, len(frontier.measures), squeeze=False)[0], frontier.measures, strict=True
    ):
        for k, point in enumerate(frontier.of_kind("base", "policy")):
            mark, colour = MARKERS[k % len(MARKERS)], series[k % len(series)]
            d, r = point.diversity[measure], point.reward
            ax.errorbar(d.value, r.value, _error(r), _error(d), mark, color=colour, label=point.label, elinewidth=1)
        for kind, mark, title in _CHOSEN:
            points = frontier.of_kind(kind)
            x, y = [p.diversity[measure].value for p in points], [p.reward.value for p in points]
            if np.isfinite(x).any() or (points and kind == "re-weighting"):  # one legend for all panels
                ax.plot(x, y, mark, color=soft, label=title, markersize=5)
            for point in points if kind != "re-weighting" else ():
                at = point.diversity[measure].value, point.reward.value
                name = point.label.removeprefix("best of ")
                ax.annotate(name, at, (4, 3), textcoords="offset points", fontsize=7)
        ax.set(xlabel=words(measure), ylabel=f"reward on {frontier.openings} held-out openings")
    _legend_on_top(figure, 4)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axis_name(metric: Metric, with_font: bool) -> str:
    name = metric.name.replace("_", " ")
    name = f"reward: {name}" if metric.group == "reward" and not name.startswith("reward") else name
    return f"{name} ({metric.soundfont})" if with_font and metric.soundfont else name


def _scaled(metric: Metric, label: str, unit: float) -> tuple[float, float, float]:
    change = metric.changes[label]
    return change.value / unit, change.low / unit, change.high / unit


def _intervals(ax: Any, values: Sequence[tuple[float, float, float]], k: int, of: int, label: str, colour: int) -> None:
    """Points with intervals in row k of `of` beside each name; the colour is that of the policy in every figure."""
    at = np.arange(len(values)) + (k - (of - 1) / 2) * 0.7 / max(of, 2)
    value, low, high = np.array(values).reshape(-1, 3).T
    bars = np.abs(np.nan_to_num(np.stack([value - low, high - value])))
    mark, ink = MARKERS[colour % len(MARKERS)], SERIES[colour % len(SERIES)]
    ax.errorbar(value, at, xerr=bars, fmt=mark, color=ink, ms=4, elinewidth=1.4, label=label)


def _finish_intervals(ax: Any, names: list[str], x_label: str, zero: bool = True) -> None:
    if zero:
        ax.axvline(0, color=TEXT, linewidth=1)
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel=x_label, ylim=(len(names) - 0.4, -0.6))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def _error(e: Any) -> np.ndarray:
    return np.abs(np.nan_to_num(np.array([[e.value - e.low], [e.high - e.value]])))


def _dash(k: int) -> Any:
    return ("-", (0, (4, 1.5)), (0, (1, 1)), "-.")[k % 4]


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0)


def _legend_on_top(figure: Figure, columns: int) -> None:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
