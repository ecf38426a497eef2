"""Everything that needs a GPU, in one command and less than ten minutes: tests, kernels, stages, the whole step, a run.

    python bench/gpu_suite.py --out runs/gpu-suite

Needs torch, numpy, numba, safetensors and triton; what else is missing costs the parts that use it, each with its
reason (the tests: pytest and hypothesis, and for those of the note bank FluidSynth). Nothing need be installed of this
repository: the checkout is what is measured. Notes come from a synthetic piano (bench/synthetic_piano.py), Audiobox has
random weights, and the policy plays real music at the paper's size.

Each part is a process of its own with its own limit; they run in order of importance, and what does not fit into
--limit is named. --out gets gpu_suite.json, with the result of every part, and gpu_suite.log, with what they said. A
machine without a GPU does what it can, in the sizes of --quick. The exit code is 1 when a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import fastsmart  # noqa: F401  # isort: skip  # before torch: OpenMP's threads then wait politely

import torch
from synthetic_piano import FONT

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
NAME = "gpu_suite"
TESTS = (  # those that use a GPU where there is one
    *(ROOT / "tests" / name for name in ("kernels", "grpo/test_fused.py", "audio/test_device.py")),
    ROOT / "tests" / "sampling" / "test_fixed.py",
    f"{ROOT / 'tests/trainer/test_modes.py'}::test_on_a_gpu_clips_are_mixed_there",
)
LEAST_S = 10.0  # what a part needs to be worth starting
MIB = 2**20  # of what a part says are kept


@dataclass(frozen=True)
class Part:
    """One process of the suite.

    command : after `python`; "{result}" stands for the JSON file that it writes, if it does
    limit_s : when it is ended
    gpu     : whether it says nothing without one
    needs   : modules it cannot do without
    """

    name: str
    command: tuple[str, ...]
    limit_s: float = 60.0
    gpu: bool = False
    needs: tuple[str, ...] = ()

    def hindrance(self, on_gpu: bool) -> str:
        """Why it cannot run here; empty where it can."""
        if self.gpu and not on_gpu:
            return "no GPU"
        missing = [module for module in self.needs if not find_spec(module)]
        script = next((Path(word) for word in self.command if word.endswith(".py")), None)
        if script and not script.exists():
            missing.append(script.name)
        return f"no {', '.join(missing)}" if missing else ""


@dataclass
class Outcome:
    """How a part went: "passed", "failed", "timed out" or "skipped"; what to say of it; the JSON that it wrote."""

    name: str
    status: str
    seconds: float = 0.0
    figure: str = ""
    floor: str = ""
    result: dict[str, Any] = field(default_factory=dict)


def parts(device: str, quick: bool) -> list[Part]:
    """The suite, what matters most first."""

    def script(name: str, limit_s: float, *options: str, gpu: bool = False, needs: tuple[str, ...] = ()) -> Part:
        words = (str(BENCH / f"{name}.py"), "--device", device, "--out", "{result}", *options)
        return Part(name, words + ("--quick",) * quick, limit_s, gpu, needs)

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability()) if device != "cpu" else "sm_90"
    tests = ("-P", "-m", "pytest", "-q", "-m", "gpu or not slow", "-p", "no:cacheprovider", *map(str, TESTS))
    return [
        Part("synthetic_piano", (str(BENCH / "synthetic_piano.py"), "{piano}")),
        Part("gpu tests", tests, 150.0, gpu=True, needs=("pytest", "hypothesis")),
        script("paper_run", 150.0),
        script("mixdown", 60.0),
        script("sampling", 90.0),
        script("score", 90.0),
        script("logprob", 90.0),
        script("update", 60.0),
        script("sync", 30.0),
        Part("step", script("step", 120.0).command[:5], 120.0, gpu=True),  # it has no quick size
        Part("kernels compiled", ("-P", "-m", "fastsmart.kernels.aot", architecture), 90.0, needs=("triton",)),
        script("decode", 30.0),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder for gpu_suite.json and gpu_suite.log")
    options.add_argument("--limit", type=float, default=570.0, help="seconds of the whole (570)")
    options.add_argument("--quick", action="store_true", help="small sizes; implied without a GPU")
    options.add_argument("--only", nargs="+", default=[], metavar="PART", help="these, and the notes they play")
    given = options.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    chosen = parts("cuda" if on_gpu else "cpu", given.quick or not on_gpu)
    unknown = sorted(set(given.only) - {part.name for part in chosen})
    if unknown:
        options.error(f"no part {', '.join(unknown)}; there are {', '.join(part.name for part in chosen)}")
    wanted = [part for part in chosen if not given.only or part.name in (*given.only, chosen[0].name)]
    outcomes = run_suite(wanted, given.out, given.limit, on_gpu)
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


def run_suite(suite: Sequence[Part], out: Path, limit_s: float, on_gpu: bool) -> list[Outcome]:
    """Run the parts one after the other, write what came of them after each, print the table."""
    out.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + limit_s
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, open(out / f"{NAME}.log", "w", encoding="utf-8") as log:
        environment = surroundings(Path(folder))
        for part in suite:
            left_s = end_s - time.monotonic()
            hindrance = part.hindrance(on_gpu)
            if hindrance or left_s < LEAST_S:
                outcomes.append(Outcome(part.name, "skipped", figure=hindrance or "no time left"))
            else:
                outcomes.append(run_part(part, min(part.limit_s, left_s), Path(folder), environment, log))
            last = outcomes[-1]
            print(f"{last.name}: {last.status}, {last.seconds:.0f} s  {last.figure}", flush=True)
            write(out, outcomes)
    print(table(outcomes))
    return outcomes


def run_part(part: Part, limit_s: float, folder: Path, environment: Mapping[str, str], log: TextIO) -> Outcome:
    """Run one part to its end or its limit; it and all it has started are gone afterwards."""
    result, said = folder / f"{part.name.replace(' ', '-')}.json", folder / "said.txt"
    places = {"{result}": str(result), "{piano}": str(folder)}
    words = [places.get(word, word) for word in part.command]
    start_s = time.monotonic()
    with open(said, "w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_all(process)
    seconds = time.monotonic() - start_s
    text = said.read_text(encoding="utf-8", errors="replace")
    log.write(f"\n===== {part.name}: python {' '.join(words)}\n{text[-MIB:]}\n")
    log.flush()
    if code is None:
        return Outcome(part.name, "timed out", seconds, f"after {limit_s:.0f} s")
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    passed = code == 0 and found.get("passed", True)
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    figure, floor = headline(found)
    status = "passed" if passed else "failed"
    return Outcome(part.name, status, seconds, figure or last, floor, found)


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a part's group of processes, whatever of it is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def headline(result: Mapping[str, Any]) -> tuple[str, str]:
    """What a table says of a result: the figure, and the share of the floor that was reached."""
    cases = result.get("cases") or result.get("stages") or ({"": result} if "contenders" in result else {})
    medians = {name: case["contenders"][case["ours"]]["median_s"] for name, case in cases.items()}
    figure = result.get("figure") or ", ".join(f"{name} {1e3 * s:.2f} ms".strip() for name, s in medians.items())
    return figure, ", ".join(f"{case['share_of_floor']:.0%}" for case in cases.values())


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a part: this checkout's packages, installed or not, a cache and a soundfont of its own."""
    package = folder / "src" / "fastsmart"
    package.mkdir(parents=True)
    for entry in [*(ROOT / "fastsmart").iterdir(), ROOT / "kernels"]:
        if not (package / entry.name).exists():
            (package / entry.name).symlink_to(entry)
    paths = [str(package.parent), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "FASTSMART_CACHE": str(folder / "cache"),
        "FASTSMART_SOUNDFONT": str(folder / FONT),
    }


def write(out: Path, outcomes: Sequence[Outcome]) -> None:
    record = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "notes": "a synthetic piano: decaying partials, no soundfont",
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    (out / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a part."""
    rows = [("part", "", "s", "of floor", "")]
    rows += [(o.name, o.status, f"{o.seconds:.0f}", o.floor, o.figure) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[4]] for row in rows)
    return "\n".join("  ".join(line).rstrip()[:160] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
