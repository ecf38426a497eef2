"""Commands that are killed, find the disk full or meet themselves lose nothing: `bench/kills.py`, a few of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parents[2] / "bench" / "kills.py"


def disturb(kills: int, *jobs: str) -> str:
    words = [word for job in jobs for word in ("--job", job)]
    command = [sys.executable, str(KILLS), "--kills", str(kills), "--seed", "1", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_scores_and_songs_survive_kills_full_disks_and_each_other():
    said = disturb(6, "score", "sample")
    assert "nothing lost" in said
    assert "'kills': " in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", ["train off", "train overlap", "train one-step-off", "pretrain", "evaluate", "sweep"])
def test_long_jobs_survive(job):
    assert "nothing lost" in disturb(10, job)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", ["render", "bank build", "listen make", "score", "sample"])
def test_short_jobs_survive(job):
    assert "nothing lost" in disturb(10, job)
