"""The way through a training step stays as short as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "step_path.py"
LINES, FILES = 2004, 33  # docs/log.md has what it was


@pytest.mark.slow
def test_a_reader_follows_a_step_of_the_demo_through_no_more_lines_than_this() -> None:
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *table, total = done.stdout.splitlines()
    found = json.loads(total)
    for file in ("sampling/native", "tokens/decode", "audio/mixdown", "reward/descriptors", "trainer/update"):
        assert any(f"fastsmart/{file}.py: " in row for row in table), file  # it has followed all threads
    assert found["lines"] <= LINES, done.stdout
    assert found["files"] <= FILES, done.stdout
