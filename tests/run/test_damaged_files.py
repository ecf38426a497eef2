"""Files of a run that a power cut or an editor has damaged: readers skip what is broken and say how much."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastsmart.cli import main
from fastsmart.errors import UserError
from fastsmart.machine.files import JsonLines
from fastsmart.run.curves import curves
from fastsmart.run.folder import LIVE_FILE, RunFolder
from fastsmart.run.line_check import whole_live, whole_metrics
from fastsmart.run.top import Top

OLD = Path(__file__).parent / "old_run" / "run"  # three lines, with times and health
NASTY = [None, "x", [], {}, [1], {"a": "b"}, True, -1, float("nan"), 10**400]
DAMAGED = [
    b'{"step": 1, "rew\n',
    b"\0" * 512 + b"\n",
    b'{"step": 1, "reward": 2}\n',
    b'{"step": 1, "reward": 0.5, "terms": {}, "notes": 1, "time": {}}\n',
    b'\xff\xfe{"step": 1}\n',
    b"[" * 5000 + b"\n",
    b'{"step": ' + b"9" * 5000 + b"}\n",
    b"[]\n",
    b'{"step": "1"}\n',
    b'{"step": 1, "eval": {}}\n',
    b'{"step": 1, "health": {"rss_mb": "much"}}\n',
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def shown(view: Top) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(view.render(), highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_left_out_and_counted(run, damage):
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    whole = JsonLines(path, whole_metrics).lines()
    path.write_bytes(damage + content + damage)
    metrics = JsonLines(path, whole_metrics)
    assert metrics.lines() == whole
    assert len(whole) == 3
    assert metrics.told == "2 lines of metrics.jsonl could not be read"
    assert metrics.told in shown(Top(run))
    metrics.forget_after(1)
    assert [line["step"] for line in metrics.lines()] == [0, 1]
    assert (run / "metrics.damaged").read_bytes() == damage + damage  # nothing is lost


def test_nuls_behind_the_last_line_are_a_line_cut_short(run):
    with open(run / "metrics.jsonl", "ab") as sink:
        sink.write(b"\0" * 4096)
    metrics = RunFolder.read(run).metrics
    assert len(metrics.lines()) == 3
    assert not metrics.damaged
    metrics.forget_after(2)
    assert b"\0" not in (run / "metrics.jsonl").read_bytes()


def test_a_file_of_nothing_but_damage_is_a_run_all_the_same(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\0\0\n")
    assert RunFolder.begun(tmp_path)


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all values of nested tables."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


def test_whatever_stands_in_place_of_a_value_top_shows_the_run(run):
    view = Top(run)
    shown(view)
    whole, skipped, kept = view.lines, 0, 0
    assert len(whole) == 3
    for number, line in enumerate(whole):
        for path in places(line):
            for value in (None, "x", {}, float("nan"), 10**400):
                mutated = copy.deepcopy(line)
                table = mutated
                for key in path[:-1]:
                    table = table[key]
                table[path[-1]] = value
                (run / "line.jsonl").write_text(json.dumps(mutated) + "\n")
                found = JsonLines(run / "line.jsonl", whole_metrics).lines()
                skipped, kept = skipped + (not found), kept + len(found)
                if found:
                    view.lines = [*whole[:number], *found, *whole[number + 1 :]]
                    view.render()
    assert skipped > 100
    assert kept > 100


def test_the_curves_are_drawn_of_what_is_left(run):
    with open(run / "metrics.jsonl", "ab") as sink:
        sink.writelines(DAMAGED)
    assert curves(RunFolder.read(run).metrics.lines()) is not None


LIVE = {"pid": 2**22 + 1, "host": os.uname().nodename, "time": 1.0, "steps": 4, "stage": "sample", "done": 1,
        "total": 2, "workers": [{"pid": 1, "in_hand": 0, "silent_s": 0.1}]}  # fmt: skip


def test_a_live_file_with_anything_in_it_is_shown_or_said_to_be_unreadable(run):
    (run / LIVE_FILE).write_text(json.dumps(LIVE))
    assert whole_live(LIVE)
    assert "has died; go on with --resume" in shown(Top(run))
    texts = ["{}", "[]", "", "3", '"x"', "[" * 5000, "\0" * 100]
    texts += [json.dumps({**LIVE, key: value}) for key in LIVE for value in NASTY]
    texts += [json.dumps({key: value for key, value in LIVE.items() if key != left}) for left in LIVE]
    unreadable = 0
    for text in texts:
        (run / LIVE_FILE).write_text(text)
        unreadable += "live.json could not be read" in shown(Top(run))
    assert unreadable > 30
    (run / LIVE_FILE).unlink()
    (run / LIVE_FILE).mkdir()
    assert "live.json could not be read" in shown(Top(run))


def test_a_folder_in_place_of_the_metrics_is_named(run, capsys):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert main(["top", str(run)]) == 2
    error = capsys.readouterr().err
    assert "cannot read" in error
    assert "metrics.jsonl: Is a directory" in error
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl"):
        RunFolder.begun(run)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"inputs": 3}', '{"inputs": {"policy": null}}', "[" * 5000])
def test_a_damaged_run_json_is_named_with_the_way_out(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is damaged .* put back a copy of it"):
        RunFolder.read(run).write_provenance({"inputs": {}})


def test_a_report_says_how_many_lines_it_could_not_read(run):
    from fastsmart.study.report import _run

    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + DAMAGED[0])
    assert "1 line of metrics.jsonl could not be read." in _run("label", run)["caption"]
