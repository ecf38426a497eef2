"""The GPU suite and the first look: parts that fail, hang or say nothing to be understood take no other along, and all
of it runs where fastsmart is not installed and next to nothing else is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import gpu_first
import gpu_suite
import pytest
import synthetic_piano
from bare_python import bare_python
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
    *words, seconds, three, passed = capsys.readouterr().out.splitlines()[-1].split()
    assert (words, three, passed) == (["last", "words", "passed"], "3", "passed")
    assert float(seconds) < 40


def test_what_a_part_has_written_counts_whatever_became_of_it(tmp_path: Path) -> None:
    """A part that is ended after its first case, one that wrote half a result, one whose result has another shape."""
    case = {"ours": "a", "share_of_floor": 0.5, "contenders": {"a": {"median_s": 0.002}}}
    begins = f"import sys, time; open(sys.argv[1], 'w').write({json.dumps({'cases': {'fp32': case}})!r}); "
    half = "import sys; open(sys.argv[1], 'w').write('{')"
    other = "import sys; open(sys.argv[1], 'w').write('{\"cases\": {\"fp32\": 3}}')"
    outcomes = run_suite(
        [
            Part("ended", ("-c", begins + "print('begun', flush=True); time.sleep(60)", "{result}"), limit_s=2.0),
            Part("half", ("-c", half, "{result}")),
            Part("other", ("-c", other, "{result}")),
            Part("after", ("-c", "print('still here')")),
        ],
        tmp_path,
        limit_s=60.0,
        on_gpu=False,
    )
    assert [o.status for o in outcomes] == ["timed out", "failed", "failed", "passed"]
    assert (outcomes[0].figure, outcomes[0].floor) == ("after 2 s  fp32 2.00 ms", "50%")
    assert outcomes[0].result["cases"]["fp32"] == case
    assert outcomes[1].figure.startswith("its result cannot be read: JSONDecodeError")
    assert "begun" in (tmp_path / "gpu_suite.log").read_text()


def test_asked_to_end_it_ends_the_part_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = Part("synthetic_piano", ("-c", "import subprocess; subprocess.run(['sleep', '61.75'])"))
    monkeypatch.setattr(gpu_suite, "parts", lambda device, quick: [sleeper])
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(SystemExit):
            gpu_suite.main(["--out", str(tmp_path)])
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    until = time.monotonic() + 10.0  # a busy machine lets what was killed linger
    while "61.75" in (running := subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout):
        assert time.monotonic() < until, running


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    (outcome,) = run_suite([Part("late", ("-c", "1"))], tmp_path, limit_s=1.0, on_gpu=True)
    assert (outcome.status, outcome.figure) == ("skipped", "no time left")


def test_a_stage_is_told_by_its_median_and_its_share_of_the_floor() -> None:
    case = {"ours": "a", "share_of_floor": 0.5, "contenders": {"a": {"median_s": 0.002}, "b": {"median_s": 1.0}}}
    assert headline({"cases": {"bf16": case, "fp32": case}}) == ("bf16 2.00 ms, fp32 2.00 ms", "50%, 50%")
    assert headline(case) == ("2.00 ms", "50%")
    assert headline({}) == ("", "")


NOT_THERE = (
    *("fastsmart", "audiobox_aesthetics", "fluidsynth", "huggingface_hub", "matplotlib", "mido", "miditok", "muspy"),
    *("psutil", "rich", "scipy", "soundfile", "symusic", "tinysoundfont", "tomli_w", "transformers", "trl", "vllm"),
)
SMALL = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without fastsmart and without what only a development machine has."""
    python = bare_python(tmp_path_factory.mktemp("bare"))
    script = "import importlib.util as u; print([n for n in %r if u.find_spec(n)])" % (NOT_THERE,)  # noqa: UP031
    found = subprocess.run([python, "-P", "-c", script], capture_output=True, text=True, check=True, env=plain())
    assert found.stdout.strip() == "[]"
    return python


def plain() -> dict[str, str]:
    """This process's environment, without the paths it adds to a Python's."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def test_a_run_needs_only_torch_numpy_numba_and_safetensors(bare: Path, checkpoint: Path, tmp_path: Path) -> None:
    """From the first prompt to the last checkpoint, workers included, where nothing else can be imported."""
    make_random_weights(tmp_path / "ears.pt", size=SMALL)
    environment = surroundings(tmp_path) | {"OMP_NUM_THREADS": "1"}
    folders = [environment["PYTHONPATH"], str(ROOT / "bench")]
    done = subprocess.run(
        [bare, str(ROOT / "tests" / "helpers" / "bare_run.py"), str(tmp_path)],
        env=environment | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


WORKER = """
import json, os, sys, time
def tell(**line): print(json.dumps(line), flush=True)
for name in sys.argv[sys.argv.index("--only") + 1:]:
    tell(check=name, begins=True)
    if name == "dies": print("the GPU is lost", flush=True); os.abort()
    if name == "hangs": tell(check=name, case="first", us=1.0); time.sleep(63.5)
    tell(check=name, case="one", ok=name != "wrong")
    tell(check=name, ends=True)
"""


def test_a_check_that_dies_or_hangs_takes_no_other_along(tmp_path: Path) -> None:
    script, out = tmp_path / "worker.py", tmp_path / "first.jsonl"
    script.write_text(WORKER)
    with open(out, "w") as sink:
        checks = ["good", "dies", "wrong", "hangs", "last"]
        failed = gpu_first.look_at(checks, [str(script)], dict(os.environ), 1.5, sink)
    assert failed == ["dies", "wrong", "hangs"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["check"] for line in lines if line.get("ends")] == ["good", "wrong", "last"]
    errors = {line["check"]: line["error"] for line in lines if "error" in line}
    assert errors.keys() == {"dies", "hangs"}
    assert "the GPU is lost" in errors["dies"]
    assert {"check": "hangs", "case": "first", "us": 1.0} in lines
    assert "63.5" not in subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout


def test_the_font_has_the_name_that_its_writer_gives_it() -> None:
    assert gpu_suite.FONT == synthetic_piano.FONT


def in_the_bare(bare: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A script of bench/ as a machine without fastsmart calls it, from a folder that is not the checkout."""
    words = [str(bare), str(ROOT / "bench" / script), *options]
    return subprocess.run(words, capture_output=True, text=True, cwd=bare.parent, env=plain(), check=False)


@pytest.mark.slow
def test_every_part_of_the_suite_runs_without_a_gpu(bare: Path, tmp_path: Path) -> None:
    """In its quick form; none is skipped."""
    done = in_the_bare(bare, "gpu_suite.py", "--out", str(tmp_path), "--limit", "1200")
    parts = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]
    assert {part["name"]: part["status"] for part in parts} == dict.fromkeys((p["name"] for p in parts), "passed")
    assert len(parts) == len(gpu_suite.parts("cpu", quick=True))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_every_check_of_the_first_look_runs_without_a_gpu(bare: Path, tmp_path: Path) -> None:
    """Kernels in Triton's interpreter, each line with its verdict."""
    out = tmp_path / "first.jsonl"
    done = in_the_bare(bare, "gpu_first.py", "--out", str(out), "--silence", "600")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [line for line in lines if line.get("ok") is False or "error" in line]
    assert [line["check"] for line in lines if line.get("ends")] == list(gpu_first.CHECKS)
    assert all(any(line["check"] == name and "case" in line for line in lines) for name in gpu_first.CHECKS)
    assert done.returncode == 0, done.stdout
