"""A run begun by an earlier fastsmart goes on as if nothing had changed.

`old_run/` was made at commit edcfa06, before modules were moved and renamed: a policy of 8,960 parameters, a run of
four steps stopped by SIGTERM after the second, and the metrics of the same run left alone, without `time` and `health`.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from small_run import comparable

from fastsmart import train
from fastsmart.config import Config, read_config

OLD = Path(__file__).parent / "old_run"
# Another processor rounds otherwise; on the one that made the run the numbers are equal to the last digit
ROUNDING = {"rel": 1e-3, "abs": 1e-6}


def numbers(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested tables under its path."""
    found: dict[str, Any] = {}
    for key, value in line.items():
        found |= numbers(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_an_old_run_goes_on_with_the_numbers_of_one_never_stopped(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # the old config names its policy by a relative path
    result = train(Config(), "run", resume=True)
    assert result.step == 4
    resumed = comparable(tmp_path / "run")
    expected = [json.loads(line) for line in (OLD / "expected.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed] == [0, 1, 2, 3, 4]
    for now, before in zip(map(numbers, resumed), map(numbers, expected), strict=True):
        for key, value in before.items():
            assert now[key] == (None if value is None else pytest.approx(value, **ROUNDING)), (before["step"], key)


def test_every_key_of_an_old_config_keeps_its_name_and_its_value():
    path = OLD / "run" / "config.toml"
    now = json.loads(json.dumps(asdict(read_config(path))))
    old = numbers(tomllib.loads(path.read_text()))
    assert len(old) > 70
    assert {key: numbers(now)[key] for key in old} == old
