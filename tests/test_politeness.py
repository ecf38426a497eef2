"""Whether threads sleep sooner beside other programs, and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsmart.machine.politeness import STAT, Judge, Usage


def heard(*shares: tuple[float, float], seconds: float = 0.2) -> list[bool]:
    """What a judge of two cores says after intervals in which this process and others had so many cores."""
    judge, before, said = Judge(2), Usage(100.0, 50.0, 30.0), []
    for own, others in shares:
        now = Usage(before.at + seconds, before.busy + seconds * (own + others), before.own + seconds * own)
        said.append(judge.hear(before, now))
        before = now
    return said


@pytest.mark.parametrize(
    ("own", "others", "wanted"),
    [
        (2.0, 0.0, False),  # alone
        (1.5, 0.5, True),  # one process on one of two cores
        (1.0, 1.0, True),  # so may this be
        (1.0, 0.5, False),  # as much, and half a core idle
        (1.9, 0.1, False),  # hardly anything
    ],
)
def test_who_wants_cores_is_in_the_way_where_none_is_idle(own: float, others: float, wanted: bool) -> None:
    assert heard((own, others)) == heard((own, others), seconds=3.0) == [wanted]


def test_threads_sleep_soon_as_long_as_another_process_has_up_to_a_core() -> None:
    assert heard((1.4, 0.6), (0.9, 1.0), (0.9, 0.5), (1.0, 0.05), (2.0, 0.0)) == [True, True, True, False, False]


def test_a_moment_of_many_others_changes_nothing() -> None:
    assert heard((1.4, 0.6), *[(0.9, 1.0)] * 4, (0.5, 1.5), *[(0.9, 1.0)] * 9) == [True] * 15


def test_where_others_are_on_every_core_it_looks_again_later() -> None:
    assert heard((1.0, 1.0), *[(0.75, 1.25)] * 5) == [True] * 5 + [False]
    tries = heard(*[(1.0, 1.0)] + [(0.75, 1.25)] * 400)
    assert 0.05 < sum(tries) / len(tries) < 0.12


def test_time_of_the_cores_that_are_used_is_added_up(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 999 999 4 6 8 0 0\ncpu1 1 1 1 1 1 1 1 1 0 0\n"
        "cpu10 10 0 0 0 0 0 0 0 0 0\nintr 1 2 3\n"
    )
    tick = os.sysconf("SC_CLK_TCK")
    assert Usage.now(frozenset({0}), stat).busy == pytest.approx(160 / tick)
    assert Usage.now(frozenset({0, 10}), stat).busy == pytest.approx(170 / tick)


def said(script: str, **environment: str) -> dict:
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = subprocess.run(
        [sys.executable, "-c", script], env=own | environment, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(told.stdout)


@pytest.mark.skipif(not STAT.is_file(), reason="needs Linux")
def test_a_crowd_is_more_threads_of_openmp_and_goes_whole() -> None:
    script = """
import fastsmart, json, os, time, torch
from fastsmart.machine.politeness import Crowd
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
torch.zeros(1 << 18).add_(1)
crowd, counts = Crowd(3), [count()]
for _ in range(2):
    crowd.come()
    counts.append(count())
crowd.go()
until = time.monotonic() + 30  # the kernel takes its time over threads that end
while count() > counts[0] and time.monotonic() < until:
    time.sleep(0.01)
counts.append(count())
print(json.dumps(counts))
"""
    before, there, still, after = said(script)
    assert there - before == 4  # two keepers with a team of two each, since one team would not be more than three cores
    assert still == there
    assert after == before


BEGUN = """
import fastsmart, json, os, threading
from fastsmart.machine import politeness
from fastsmart.machine.hardware import waiting
politeness.begin()
politeness.begin()
names = [thread.name for thread in threading.enumerate()]
print(json.dumps([waiting(), os.environ.get("GOMP_SPINCOUNT"), names.count("politeness")]))
"""


@pytest.mark.skipif(not STAT.is_file() or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores")
def test_commands_watch_and_leave_a_setting_of_the_users_alone() -> None:
    assert said(BEGUN) == [{"set_by": "fastsmart", "watched": "yes"}, None, 1]
    assert said(BEGUN, GOMP_SPINCOUNT="7") == [{"GOMP_SPINCOUNT": "7", "set_by": "environment"}, "7", 0]
    assert said("import torch\n" + BEGUN) == [{"set_by": "nobody"}, None, 0]
