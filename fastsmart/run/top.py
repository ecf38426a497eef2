"""`fastsmart top`: a running or finished run as its files show it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastsmart.config import Config, read_config
from fastsmart.errors import UserError
from fastsmart.machine.files import parse_lines
from fastsmart.run.display import describe, held_out, summary
from fastsmart.run.folder import CONFIG_FILE, LIVE_FILE, METRICS_FILE
from fastsmart.run.line_check import whole_live, whole_metrics
from fastsmart.run.recorder import EVENTS
from fastsmart.words import counted, in_one_line

RECENT = 10  # steps that times and idle shares are means of
WIDTH = 60  # characters of a curve
SILENT_S = 15.0  # after which a run is said to be silent
_BLOCKS, _ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


class Top:
    """A view of a run folder; `render` reads what has been written since the last call.

    Raises UserError when there is no run in the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / CONFIG_FILE).is_file():
            raise UserError(f"no run in {path}; name the folder that was given to fastsmart train --out")
        self.config: Config = read_config(self.path / CONFIG_FILE)
        self.lines: list[dict[str, Any]] = []
        self._read = (0, 0)  # inode of the metrics and the bytes read of it
        self._damaged = 0  # lines of them that could not be read

    def render(self) -> Group:
        """The view as of now."""
        self._read_lines()
        steps = [line for line in self.lines if "reward" in line]
        parts: list[Any] = [_plain(f"{self.path}  {describe(self.config)}", "bold"), self._state(steps)]
        if steps:
            parts += [_plain(summary(steps[-1])), _curves(steps), _times(steps[-RECENT:])]
        evaluations = [line for line in self.lines if "eval" in line]
        parts += [
            _plain(f"step {line['step']:>5}  {held_out(line['eval'])}")
            for line in evaluations[:1] + evaluations[1:][-2:]
        ]
        return Group(*parts, *self._health(), *self._unreadable())

    @property
    def ended(self) -> bool:
        """Whether nothing will be added any more."""
        return self._live() is None

    def _state(self, steps: list[dict[str, Any]]) -> Text:
        done, total = steps[-1]["step"] if steps else 0, self.config.train.steps
        live = self._live()
        if live is None:
            return Text(f"step {done} of {total}: " + ("finished" if done >= total else "not running"))
        silent_s = time.time() - live["time"]
        if (
            live["host"] == socket.gethostname()
            and not Path(f"/proc/{live['pid']}").exists()
            and os.path.isdir("/proc")
        ):
            return Text(f"step {done} of {total}: process {live['pid']} has died; go on with --resume", style="red")
        now = f"{live['stage']} {live['done']}/{live['total']}" if "stage" in live else "starting"
        left = _left(steps, total)
        style = "red" if silent_s > SILENT_S else "green"
        return _plain(f"step {done} of {total}: {now}, {silent_s:.0f} s ago{left}", style)

    def _health(self) -> list[Any]:
        health = [line["health"] for line in self.lines if "health" in line]
        if not health:
            return []
        totals: Counter[str] = Counter()
        for entry in health:
            totals.update({name: entry.get(name, 0) for name in EVENTS})
        skipped = sum(bool(line.get("skipped")) for line in self.lines)
        said = [f"{name.replace('_', ' ')} {count}" for name, count in (*totals.items(), ("skipped", skipped)) if count]
        memory = f"memory {health[-1]['rss_mb']:.0f} MB (first {health[0]['rss_mb']:.0f}), {health[-1]['files']} files"
        parts: list[Any] = ["  ".join([memory, *said])]
        live = self._live() or {}
        workers = [f"{w['pid']}: {w['in_hand']} in hand, {w['silent_s']:.0f} s" for w in live.get("workers", [])]
        if workers:
            parts.append("render workers  " + "  ".join(workers))
        notes = [(line["step"], note) for line in self.lines for note in line.get("health", {}).get("notes", [])]
        return parts + [_plain(f"step {step:>5}  {note}", "yellow") for step, note in notes[-5:]]

    def _unreadable(self) -> list[Text]:
        """Report of the files that could not be read, in words."""
        said = []
        if self._damaged:
            said.append(f"{counted(self._damaged, 'line')} of {METRICS_FILE} could not be read")
        if (self.path / LIVE_FILE).exists() and self._live() is None:
            said.append(f"{LIVE_FILE} could not be read; whether the run is alive cannot be told")
        return [Text(text, style="yellow") for text in said]

    def _live(self) -> dict[str, Any] | None:
        try:
            live = json.loads((self.path / LIVE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return live if whole_live(live) else None

    def _read_lines(self) -> None:
        path = self.path / METRICS_FILE
        try:
            with open(path, "rb") as source:
                inode = os.fstat(source.fileno()).st_ino
                if self._read[0] != inode:  # a resumed run has written the file anew
                    self.lines, self._read, self._damaged = [], (inode, 0), 0
                source.seek(self._read[1])
                new = source.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; put back the file that was there") from error
        lines, damaged = parse_lines(new, whole_metrics)
        self.lines, self._damaged = self.lines + lines, self._damaged + len(damaged)
        self._read = (inode, self._read[1] + new.rfind(b"\n") + 1)


def curve(values: list[float | None], width: int = WIDTH) -> str:
    """The last `width` values as a row of blocks, from their lowest to their highest; a gap where there is none."""
    values = values[-width:]
    known = [v for v in values if v is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    blocks = _blocks()
    steps = len(blocks) - 2
    return "".join(
        " " if v is None else blocks[1 + round(steps * (v - low) / (high - low)) if high > low else 1] for v in values
    )


def _blocks() -> str:
    """Steps of height that the terminal can show, the first for a gap."""
    try:
        _BLOCKS.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return _ASCII_BLOCKS
    return _BLOCKS


def _plain(text: str, style: str = "") -> Text:
    """Text of a run's files as it stands there: no markup, and nothing that steers a terminal."""
    return Text(in_one_line(text), style=style)


def _curves(steps: list[dict[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = {"reward": [line["reward"] for line in steps]}
    rows |= {name: [line["terms"].get(name) for line in steps] for name in steps[-1]["terms"]}
    rows |= {name: [line.get(name) for line in steps] for name in ("kl", "kl_per_completion", "entropy", "notes")}
    for style in steps[-1].get("styles", {}):
        of_style = [line.get("styles", {}).get(style, {}) for line in steps]
        for key, said in (("reward", "reward"), ("kl_per_completion", "kl")):
            rows[f"{said} of {style}"] = [values.get(key) for values in of_style]
    for name, values in rows.items():
        last = "–" if values[-1] is None else f"{values[-1]:.3g}"
        table.add_row(_plain(name), curve(values), last)
    return table


def _times(steps: list[dict[str, Any]]) -> Table:
    """Seconds of each stage and busy share of each resource, means over the steps."""
    table = Table.grid(padding=(0, 2))
    stages: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    for line in steps:
        stages.update({k: v for k, v in line["time"].items() if isinstance(v, float) and not k.endswith("_per_s")})
        busy.update({name: 1.0 - idle for name, idle in line["time"].get("idle", {}).items()})
    stages.pop("evaluate", None)
    spent = "  ".join(f"{name} {seconds / len(steps):.3f}" for name, seconds in stages.items())
    table.add_row("seconds", _plain(spent))
    table.add_row("busy", _plain("  ".join(f"{name} {share / len(steps):.0%}" for name, share in busy.items())))
    return table


def _left(steps: list[dict[str, Any]], total: int) -> str:
    recent = [line["time"]["step"] + line["time"].get("evaluate", 0.0) for line in steps[-RECENT:]]
    return f", {sum(recent) / len(recent) * (total - steps[-1]['step']) / 60:.1f} min left" if recent else ""
