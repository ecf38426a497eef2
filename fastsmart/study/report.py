"""A run or an evaluation as one self-contained page: findings, players, figures, tables, settings, provenance."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import JsonLines, write_atomic
from fastsmart.machine.hardware import installed_version
from fastsmart.music import diversity
from fastsmart.music.bootstrap import LEVEL, Estimate
from fastsmart.run.curves import curves
from fastsmart.run.folder import CONFIG_FILE, METRICS_FILE, PROVENANCE_FILE
from fastsmart.run.line_check import whole_metrics
from fastsmart.study import figures
from fastsmart.study.choosing import choosing_tables
from fastsmart.study.evaluation import Evaluation, Metric
from fastsmart.study.findings import findings
from fastsmart.study.frontier import Frontier, known_measures
from fastsmart.study.outputs import Progress
from fastsmart.study.sound import data_url, listen_to, mp3, note_rows
from fastsmart.tokens.prompts import describe

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

MOST_PLAYED = 3  # policies whose outputs can be heard side by side
WHOLE = "diversity of whole outputs"  # of the metrics' group "diversity" those that outputs' lengths move
GROUPS = {
    "reward": "Rewards",
    "feature": "Features of the music",
    "diversity": "Diversity",
    WHOLE: "Diversity of whole outputs, which depends on how much they hold",
    "style": "Styles",
    "share": "Faults",
}


def write_report(
    evaluation: Evaluation,
    path: str | Path,
    players: int | None = None,
    progress: Progress = lambda stage, done, total: None,
    drawn: Sequence[dict[str, Any]] | None = None,
) -> Path:
    """Write the page about an evaluation, with the runs its policies came from.

    players : held-out prompts that can be heard, 0 = none; None: six, or three of each style that prompts ask for
    drawn   : its `drawn_figures`, where somebody has drawn them already

    Raises UserError when the page cannot be written, or a player's audio cannot be rendered.
    """
    path = Path(path)
    if players is None:
        players = 3 * len(evaluation.config.prompts.styles) or 6
    pairs, notes = _players(evaluation, players, progress) if players else ([], {})
    page = render_page(
        "report.html",
        "report.js",
        title=f"{', '.join(evaluation.labels[1:2]) or evaluation.labels[0]}: what the training did",
        first=evaluation.labels[0],
        labels=evaluation.labels,
        basis=evaluation.basis,
        comparisons=(comparisons := sum(len(m.changes) for m in evaluation.metrics)),
        chance=round(comparisons * (1 - LEVEL)),
        findings=findings(evaluation),
        pairs=pairs,
        notes=notes,
        soundfont=f"played with {next(iter(evaluation.record['soundfonts']), 'the default soundfont')}, 48 kHz stereo",
        figures=drawn_figures(evaluation) if drawn is None else drawn,
        groups=_table(evaluation),
        choosing=choosing_tables(evaluation),
        confusions=_confusions(evaluation),
        transfer=_transfer(evaluation),
        runs=[_run(p.label, Path(p.run)) for p in evaluation.policies if p.run and Path(p.run).is_dir()],
        definitions=(diversity.__doc__ or "").strip(),
        config=(evaluation.path / CONFIG_FILE).read_text(encoding="utf-8"),
        record=json.dumps(_provenance(evaluation), indent=1),
        version=installed_version("fastsmart"),
    )
    write_atomic(path, page)
    return path


def render_page(template: str, script: str, **values: Any) -> str:
    """A page of `pages/` with its style and script inside, under a policy that lets it load nothing from elsewhere.

    script : "" for a page without
    A value called `notes` is put in as JSON that cannot end its script element.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    folder = resources.files("fastsmart.study") / "pages"
    code = (folder / script).read_text(encoding="utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; media-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    pages = Environment(loader=PackageLoader("fastsmart.study", "pages"), autoescape=True, undefined=StrictUndefined)
    if "notes" in values:
        values["notes"] = Markup(json.dumps(values["notes"], separators=(",", ":")).replace("<", "\\u003c"))
    css = (folder / "page.css").read_text(encoding="utf-8")
    return pages.get_template(template).render(policy=policy, css=Markup(css), script=Markup(code), **values)


def draw(make: Callable[[], Figure], name: str, description: str) -> Markup:
    """A figure in the style of reports, ready to stand in a page."""
    import matplotlib as mpl
    from markupsafe import Markup

    with mpl.rc_context(figures.style()):
        return Markup(figures.to_svg(make(), name, description))


def drawn_figures(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every figure about an evaluation: its `name`, `svg` and `caption`."""
    first, policies = evaluation.labels[0], [p.label for p in evaluation.policies]
    seconds = evaluation.config.audio.max_seconds
    heard = {p: evaluation.outputs(p).notes(evaluation.vocab, seconds) for p in policies}
    whole = {p: evaluation.outputs(p).notes(evaluation.vocab) for p in policies}
    drawn: list[tuple[str, Callable[[], Figure], str]] = []
    if len(evaluation.labels) > 1:
        drawn += [
            (
                "changes",
                partial(figures.changes, evaluation),
                f"Every reward and feature, as its change against {first}.",
            ),
            ("frontier", partial(figures.frontier, Frontier.of([evaluation], known_measures(evaluation))), _FRONTIER),
        ]
    drawn += [
        ("diversity", partial(figures.diversity_changes, evaluation), "Diversity; of self BLEU less is more diverse."),
        ("distributions", partial(figures.distributions, heard), "Distributions over outputs, or over notes."),
        ("rolls", partial(figures.average_rolls, whole), _ROLLS),
    ]
    return [{"name": name, "svg": draw(make, name, caption), "caption": caption} for name, make, caption in drawn]


def write_frontier(points: Frontier, path: Path) -> None:
    """Draw a frontier into an SVG or PNG file; raises UserError when it cannot be written."""
    if path.suffix == ".svg":
        write_atomic(path, standalone(draw(partial(figures.frontier, points), "frontier", _FRONTIER)))
    else:
        write_atomic(path, figures.to_png(lambda: figures.frontier(points, figures.ON_PAPER, figures.GREY)))


def standalone(svg: str) -> str:
    """A drawn figure as a file of its own, in the colours of the page, light and dark."""
    css = (resources.files("fastsmart.study") / "pages" / "page.css").read_text(encoding="utf-8")
    colours = css[: css.index("* {")] + "svg { color: var(--ink); background: var(--paper); font-family: sans-serif; }"
    return str(svg).replace(">", f"><style>{colours}</style>", 1)


def _players(evaluation: Evaluation, count: int, progress: Progress) -> tuple[list[dict], dict[str, Any]]:
    """Rows of the page for every clip it plays, by prompt; and the clips' notes."""
    labels = [p.label for p in evaluation.policies][:MOST_PLAYED]
    count = min(count, evaluation.record["prompts"])
    pairs: list[dict[str, Any]] = [{"number": i + 1, "clips": []} for i in range(count)]
    rolls: dict[str, Any] = {}
    for p, label in enumerate(labels):
        outputs = evaluation.outputs(label).select(np.arange(count))
        notes = outputs.notes(evaluation.vocab)
        reward = next(iter(outputs.scores.values())).total
        for i, samples in enumerate(listen_to(notes, evaluation.config.audio)):
            rolls[f"{i}-{p}"] = note_rows(notes, i)
            pairs[i]["prompt"] = describe(outputs.prompts.row(i), evaluation.vocab)
            pairs[i]["clips"].append(
                {
                    "id": f"{i}-{p}",
                    "label": label,
                    "reward": f"{reward[i]:.2f}",
                    "notes": int(notes.counts[i]),
                    "seconds": f"{notes.end_s[i]:.1f}",
                    "audio": data_url(mp3(samples)),
                }
            )
            progress("rendering players", p * count + i + 1, len(labels) * count)
    pitches = [note[2] for roll in rolls.values() for note in roll] or [60]
    return pairs, {"low": min(pitches) - 1, "high": max(pitches) + 1, "clips": rolls}


_FRONTIER = (
    "Reward against the effective number of distinct outputs, and that on embeddings by the first policy. Up is better "
    "by the reward, right is more diverse. Stars: the best of so many outputs of the first policy; dots: the most "
    "diverse weights of its outputs at each reward, which is what choosing alone can do. Between points nothing was "
    "measured."
)
_ROLLS = "Average piano rolls: how many outputs sound a pitch at a beat. Sharp patterns mean outputs that are alike."


def _table(evaluation: Evaluation) -> list[dict[str, Any]]:
    fonts = {m.soundfont for m in evaluation.metrics if m.soundfont}
    groups = []
    main = {m.name for m in evaluation.diversity()}
    for group, title in GROUPS.items():
        rows = []
        for m in evaluation.metrics:
            if group != (WHOLE if m.group == "diversity" and m.name not in main else m.group):
                continue
            name = m.name.replace("_", " ") + (f" ({m.soundfont})" if m.soundfont and len(fonts) > 1 else "")
            changed = [_change(m, e) for e in m.changes.values()]
            rows.append({"name": name, "cells": [_value(e) for e in m.values.values()], "changes": changed})
        if rows:
            groups.append({"title": title, "rows": rows})
    return groups


def _value(e: Estimate) -> dict[str, str]:
    return {"value": _number(e.value), "interval": _bracket(e, "")}


def _change(metric: Metric, e: Estimate) -> dict[str, str]:
    good = "" if metric.group == "feature" else "up" if (e.value > 0) == _more_is_better(metric) else "down"
    return {
        "value": _number(e.value, "+"),
        "interval": _bracket(e, "+"),
        "kind": f"sure {good}".strip() if e.is_sure else "",
    }


def _more_is_better(metric: Metric) -> bool:
    if metric.group == "style":
        return not metric.name.startswith("distance")
    return metric.group == "reward" or (metric.group == "diversity" and metric.name not in diversity.LESS_IS_MORE)


def _confusions(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A table for every policy and judge: of the styles asked for (down), the share heard as each (across)."""
    return [
        {
            "caption": f"{label}: styles asked for, down, and heard by the {judge}, across",
            "head": ["", *found["styles"]],
            "rows": [
                [style, *(f"{share:.2f}" for share in row)]
                for style, row in zip(found["styles"], found["confusion"], strict=True)
            ],
        }
        for label, judges in evaluation.record.get("styles", {}).items()
        for judge, found in judges.items()
    ]


def _transfer(evaluation: Evaluation) -> dict[str, Any] | None:
    """Mean reward of every policy on every soundfont; None with one soundfont only."""
    fonts = evaluation.record["soundfonts"]
    if len(fonts) < 2:
        return None
    trained = {p.label: p.soundfont for p in evaluation.policies}
    rows = []
    for label in evaluation.labels:
        cells = []
        for font, where in fonts.items():
            home = trained.get(label) == where["sha256"]
            cells.append(
                _value(evaluation.metric("reward", "reward", font).values[label]) | {"mark": " ●" if home else ""}
            )
        rows.append({"label": label, "cells": cells})
    return {"fonts": list(fonts), "rows": rows}


def _run(label: str, folder: Path) -> dict[str, Any]:
    def text(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""

    metrics = JsonLines(folder / METRICS_FILE, whole_metrics)
    lines = metrics.lines()
    caption = "Reward, notes, divergence, entropy, diversity and time over the steps of training."
    caption += f" {metrics.told}." if metrics.told else ""
    has_steps = any("reward" in line for line in lines)
    return {
        "label": label,
        "curves": draw(lambda: _curves(lines), f"curves {label}", caption) if has_steps else "",
        "caption": caption,
        "config": text(CONFIG_FILE),
        "provenance": text(PROVENANCE_FILE),
    }


def _curves(lines: list[dict[str, Any]]) -> Figure:
    figure = curves(lines)
    if figure is None:
        raise UserError("the run has no step to show yet")
    return figure


def _provenance(evaluation: Evaluation) -> dict[str, Any]:
    keys = ("seed", "level", "resamples", "soundfonts", "training_set", "gpu", "machine", "packages")
    policies = [vars(p) for p in evaluation.policies]
    return {"policies": policies} | {key: evaluation.record[key] for key in keys}


def _number(value: float, sign: str = "") -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign}.1f}"


def _bracket(e: Estimate, sign: str) -> str:
    return f"[{_number(e.low, sign)}, {_number(e.high, sign)}]" if np.isfinite(e.low) else ""
