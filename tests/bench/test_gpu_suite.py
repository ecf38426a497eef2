"""The GPU suite's conductor, with parts that do nothing, fail, hang, or have no time left; and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_suite import Part, headline, run_suite, surroundings

from fastsmart.reward.audiobox import make_random_weights
from fastsmart.reward.audiobox.architecture import Size

ROOT = Path(__file__).resolve().parents[2]
WRITES = "import json, sys; json.dump({'figure': '7 ms', 'passed': %s}, open(sys.argv[1], 'w'))"


def test_each_part_has_its_own_fate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sleeper = "import subprocess, sys; subprocess.run(['sleep', '60.25'])"
    start = time.monotonic()
    outcomes = run_suite(
        [
            Part("good", ("-c", WRITES % True, "{result}")),
            Part("slow", ("-c", "1"), gpu=True),
            Part("missed", ("-c", WRITES % False, "{result}")),
            Part("broken", ("-c", "print('before'); raise SystemExit('no luck')")),
            Part("hangs", ("-c", sleeper), limit_s=1.0),
            Part("lacks", ("-c", "1"), needs=("no_such_module",)),
            Part("last words", ("-c", "print('3 passed')")),
        ],
        tmp_path / "out",
        limit_s=60.0,
        on_gpu=False,
    )
    assert time.monotonic() - start < 40
    assert [(o.name, o.status, o.figure) for o in outcomes] == [
        ("good", "passed", "7 ms"),
        ("slow", "skipped", "no GPU"),
        ("missed", "failed", "7 ms"),
        ("broken", "failed", "no luck"),
        ("hangs", "timed out", "after 1 s"),
        ("lacks", "skipped", "no no_such_module"),
        ("last words", "passed", "3 passed"),
    ]
    assert "60.25" not in subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
    written = json.loads((tmp_path / "out" / "gpu_suite.json").read_text())
    assert [part["status"] for part in written["parts"]] == [o.status for o in outcomes]
    assert written["parts"][0]["result"] == {"figure": "7 ms", "passed": True}
    assert "before\nno luck" in (tmp_path / "out" / "gpu_suite.log").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gpu_suite.json", "gpu_suite.log"]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["last", "words", "passed", "0", "3", "passed"]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    (outcome,) = run_suite([Part("late", ("-c", "1"))], tmp_path, limit_s=1.0, on_gpu=True)
    assert (outcome.status, outcome.figure) == ("skipped", "no time left")


def test_a_stage_is_told_by_its_median_and_its_share_of_the_floor() -> None:
    case = {"ours": "a", "share_of_floor": 0.5, "contenders": {"a": {"median_s": 0.002}, "b": {"median_s": 1.0}}}
    assert headline({"cases": {"bf16": case, "fp32": case}}) == ("bf16 2.00 ms, fp32 2.00 ms", "50%, 50%")
    assert headline(case) == ("2.00 ms", "50%")
    assert headline({}) == ("", "")


HIDES = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
"""
NOT_THERE = (
    *("audiobox_aesthetics", "fluidsynth", "huggingface_hub", "jinja2", "matplotlib", "mido", "miditok", "muspy"),
    *("packaging", "psutil", "rich", "scipy", "soundfile", "symusic", "tinysoundfont", "tomli_w", "trl", "vllm"),
)
SMALL = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)


def test_a_run_needs_only_torch_numpy_numba_and_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    """From the first prompt to the last checkpoint, on a machine where nothing else can be imported."""
    (tmp_path / "sitecustomize.py").write_text(HIDES.format(names=NOT_THERE))  # read when Python starts, in workers too
    make_random_weights(tmp_path / "ears.pt", size=SMALL)
    environment = surroundings(tmp_path) | {"OMP_NUM_THREADS": "1"}
    folders = [str(tmp_path), environment["PYTHONPATH"], str(ROOT / "bench")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "bare_run.py"), str(tmp_path)],
        env=environment | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
