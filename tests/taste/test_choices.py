"""choices.jsonl: on the disk before it is used, and read whatever a crash has left of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsmart.errors import UserError
from fastsmart.taste import Choice, append_choice, read_choices, standing
from fastsmart.taste.choices import of_listener


def choice(id: str, answer: str = "left", listener: str = "ann", undo: str = "") -> Choice:
    return Choice(id, 1.0, listener, f"{id}a", f"{id}b", answer, undo)


def undo(id: str, of: str) -> Choice:
    return Choice(id, 2.0, "ann", undo=of)


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    assert read_choices(path).choices == ()
    written = [choice("a"), choice("b", "both_bad", "Jürgen 🎹"), choice("c", "equal", ""), undo("d", "a")]
    for one in written:
        append_choice(path, one)
    assert read_choices(path).choices == tuple(written)
    assert read_choices(path).damaged == ()
    assert of_listener(written, "ann") == [written[0], written[3]]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"id": "a", "time": 1.0, "listener": "ann", "left": "aa", "right": "ab", "choice": "left"}
    assert lines[3] == {"id": "d", "time": 2.0, "listener": "ann", "undo": "a"}


@pytest.mark.parametrize("cut", [1, 5, 40, 80])
def test_a_line_that_a_crash_cut_costs_itself_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "choices.jsonl"
    append_choice(path, choice("a"))
    whole = path.read_bytes()
    append_choice(path, choice("b"))
    path.write_bytes(path.read_bytes()[: len(whole) + cut])
    append_choice(path, choice("c"))
    found = read_choices(path)
    assert [c.id for c in found.choices] == ["a", "c"]
    assert found.damaged == (f"line 2 of {path.name} is cut short or no JSON",)


def test_damaged_lines_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    good = json.dumps(vars(choice("a")))
    lines = [
        "[]",
        "nonsense",
        good,
        good,
        good.replace('"a"', '"n1"').replace('"left"', '"loud"', 2).replace('"loud"', '"left"', 1),
        good.replace('"a"', '"n2"').replace('"ab"', '"../etc"'),
        good.replace('"a"', '"n3"').replace('"ab"', '"aa"'),
        good.replace("1.0", '"now"').replace('"a"', '"n4"'),
        good.replace('"ann"', "7").replace('"a"', '"n5"'),
        "{}",
        '{"id": "' + "x" * 3000 + '"}',
        "\xff",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    found = read_choices(path)
    assert [c.id for c in found.choices] == ["a"]
    assert [text.split(" of ")[0] for text in found.damaged] == [
        f"line {n}" for n in (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    ]
    assert "has the id of an earlier line" in found.damaged[2]
    assert 'has no "id"' in found.damaged[8]


def test_an_undo_takes_back_and_an_undo_of_it_brings_back() -> None:
    a, b = choice("a"), choice("b")
    assert standing([a, b, undo("u", "a")]) == [b]
    assert standing([a, b, undo("u", "a"), undo("v", "u")]) == [a, b]
    assert standing([a, b, undo("u", "a"), undo("v", "u"), undo("w", "v")]) == [b]
    assert standing([a, undo("u", "nothing"), b]) == [a, b]
    instead = choice("c", "right", undo="a")
    assert standing([a, b, instead]) == [b, instead]


def test_a_choice_that_is_none_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    for wrong in (choice("a", "loud"), choice("../a"), Choice("a", 1.0, "x", "c", "c", "left"), Choice("a", 1.0, "\n")):
        with pytest.raises(UserError, match="a choice "):
            append_choice(path, wrong)
    assert not path.exists()
    with pytest.raises(UserError, match="a choice "):
        Choice.new("ann", "a", "b", "loud")
    with pytest.raises(UserError, match="cannot write"):
        append_choice(tmp_path / "none" / "choices.jsonl", choice("a"))


def test_a_process_killed_while_it_writes_loses_no_choice_it_told_of(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    code = (
        "import sys\n"
        "from fastsmart.taste.choices import Choice, append_choice\n"
        "for k in range(100_000):\n"
        f"    append_choice({str(path)!r}, Choice(f'n{{k}}', 0.0, 'ann', 'a', 'b', 'left'))\n"
        "    print(k, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(20)]
        process.kill()
        told += process.stdout.readlines()
    whole = [int(line) for line in told if line.endswith("\n")]
    found = read_choices(path)
    assert [c.id for c in found.choices][: len(whole)] == [f"n{k}" for k in whole]
    assert os.path.getsize(path) > 0
