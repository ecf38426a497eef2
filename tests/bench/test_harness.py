"""Contenders take turns, and a time is held against a floor by plain arithmetic."""

import argparse
import sys
from pathlib import Path

import harness
import pytest
from harness import REFERENCE, Ceilings, Work, chosen_peers, interleaved, report

ROOT = Path(__file__).parents[2]


def test_contenders_take_turns_the_reference_kernel_among_them(monkeypatch):
    turns: list[str] = []

    def taking(name):
        return lambda: turns.append(name)

    monkeypatch.setattr(harness, "reference_kernel", lambda device: taking("reference"))
    seconds = interleaved({"a": taking("a"), "b": taking("b")}, runs=2, warmup=1)
    assert turns == ["a", "b", "reference"] * 3
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2, REFERENCE: 2}


def test_the_floor_is_the_longer_of_arithmetic_and_bytes_piece_by_piece():
    ceilings = Ceilings(gemm_gflop_per_s=100.0, copy_gb_per_s=10.0)
    assert ceilings.floor_s([Work("", gflop=50.0, gbyte=1.0)]) == pytest.approx(0.5)
    assert ceilings.floor_s([Work("", gflop=50.0, gbyte=20.0)]) == pytest.approx(2.0)
    assert ceilings.floor_s([Work("", gflop=50.0), Work("", gbyte=20.0)]) == pytest.approx(2.5)


def test_a_report_compares_pair_by_pair(capsys):
    seconds = {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 4.0, 8.0], REFERENCE: [0.5, 0.5, 0.1]}
    figures = report("stage", seconds, "ours", [Work("", gflop=100.0)], Ceilings(100.0, 10.0))
    assert figures["floor_s"] == pytest.approx(1.0)
    assert figures["share_of_floor"] == pytest.approx(0.5)  # of the median, 2 s
    assert figures["over_reference_kernel"] == pytest.approx(4.0)
    theirs = figures["contenders"]["theirs"]
    assert theirs["over_ours"] == [2.0, 2.0, 3.0]  # median, least, most of 3, 2, 2
    assert (theirs["median_s"], theirs["min_s"], theirs["max_s"]) == (4.0, 3.0, 8.0)
    printed = capsys.readouterr().out
    assert "50%" in printed
    assert "theirs" in printed


@pytest.mark.parametrize(
    ("asked", "chosen"), [([], []), (["b"], ["b"]), (["b", "a", "b"], ["a", "b"]), (["all"], ["a", "b", "c"])]
)
def test_chosen_peers(asked, chosen):
    assert chosen_peers(argparse.Namespace(peer=asked), ["a", "b", "c"]) == chosen


def test_no_benchmark_has_the_name_of_another_module():
    """A script's folder comes first where Python looks for modules."""
    names = {path.stem for path in (ROOT / "bench").glob("*.py")}
    assert "harness" in names
    assert not names & set(sys.stdlib_module_names)
    assert not names & {path.stem for path in (ROOT / "tests").rglob("*.py")}
