"""Everything that needs a GPU, in one command and less than ten minutes: tests, kernels, stages, the whole step, a run.

    python bench/gpu_suite.py --out runs/gpu-suite

Needs torch, numpy, numba and safetensors; what else is missing costs the parts that use it, each with its reason
(triton for the kernels; pytest and hypothesis for the tests, which pytest-xdist spreads over the cores). Nothing need
be installed of this repository: the checkout is what is measured. Notes come from a synthetic piano
(bench/synthetic_piano.py), Audiobox has random weights, and the policy plays real music at the paper's size.

Each part is a process of its own with its own limit, so that one that crashes or overruns takes no other along; they
run in order of importance, and what does not fit into --limit is named. --out gets gpu_suite.json, rewritten after
every part with the results so far, and gpu_suite.log, into which the parts write as they run. A machine without a GPU
runs every part in its quick form with ten times the limit; of the tests that need a GPU it can only see whether they
would be found. The exit code is 1 when a part failed.
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
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
NAME = "gpu_suite"
FONT = "synthetic-piano.sf2"  # as bench/synthetic_piano.py has it, which needs fastsmart and so runs as a part
TESTS = ROOT / "tests"
MARKED = (
    "sampling/test_cuda_graph_batch.py",
    "trainer/test_modes.py",
    "kernels/test_logprob.py",
)  # that have tests marked `gpu`
KERNEL_TESTS = (  # every kernel beside its twin; of the objective the variants that say most, each is a kernel
    *(
        f"kernels/test_{name}.py"
        for name in ("decode_step", "decode_product", "sample", "attention", "encoder_kernels")
    ),
    *(f"kernels/test_{name}.py" for name in ("layer", "logprob", "moments", "mixdown")),
    "policy/test_cast.py",
    "trainer/test_recorded.py",
    "reward/test_descriptors.py",
    "sampling/test_cuda_graph_batch.py",
    "audio/test_gpu_mixdown.py",
    "grpo/test_fused.py::test_every_loss_with_every_kl_and_mask",
    "grpo/test_fused.py::test_completions_longer_than_a_block",
    "grpo/test_fused.py::test_dropped_and_broken_tokens",
)
QUICK_TESTS = ("kernels/test_sample.py",)
AT_ONCE, EACH_TEST_S = 12, 120  # tests side by side, and seconds of each
LEAST_S = 10.0  # what a part needs to be worth starting
PATIENCE = 10  # times its limit that a part may take without a GPU
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
        words += ("--quick",) * quick + ("--runs", "1") * (device == "cpu")
        return Part(name, words, limit_s, gpu, needs)

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability()) if device != "cpu" else "sm_90"
    marked = tests("gpu", MARKED) + ("--collect-only",) * (device == "cpu")
    beside_twins = tests("not gpu and not slow", QUICK_TESTS if quick else KERNEL_TESTS)
    return [
        Part("synthetic_piano", (str(BENCH / "synthetic_piano.py"), "{piano}")),
        Part("gpu tests", marked, 90.0, needs=("pytest",)),
        Part("kernel tests", beside_twins, 150.0, needs=("pytest", "hypothesis", "triton")),
        script("paper_run", 150.0),
        script("mixdown", 60.0),
        script("sampling", 90.0),
        script("score", 90.0, "--no-memory"),
        script("logprob", 90.0, "--no-memory"),
        script("update", 60.0),
        script("sync", 30.0),
        script("step", 120.0),
        Part("kernels compiled", ("-P", "-m", "fastsmart.kernels.aot", architecture), 90.0, needs=("triton",)),
        script("decode", 30.0),
    ]


def tests(marked: str, which: Sequence[str]) -> tuple[str, ...]:
    """What pytest is called with: names as they pass, one that cannot be imported stops no other.

    A warning is an error where the versions are ours; here they are the machine's, and an option of a plugin may be
    unknown (pytest-timeout's is).
    """
    words = ["-P", "-m", "pytest", "-v", "-rfE", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    words += ["--continue-on-collection-errors", "-m", marked]
    if find_spec("xdist"):
        words += ["-n", str(min(AT_ONCE, os.cpu_count() or 1)), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        words += ["--timeout", str(EACH_TEST_S)]
    return (*words, *(str(TESTS / name) for name in which))


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder for gpu_suite.json and gpu_suite.log")
    options.add_argument("--limit", type=float, default=500.0, help="seconds of the whole (500)")
    options.add_argument("--quick", action="store_true", help="small sizes; implied without a GPU")
    options.add_argument("--only", nargs="+", default=[], metavar="PART", help="these, and the notes they play")
    given = options.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part under way ends too
    on_gpu = torch.cuda.is_available()
    chosen = parts("cuda" if on_gpu else "cpu", given.quick or not on_gpu)
    unknown = sorted(set(given.only) - {part.name for part in chosen})
    if unknown:
        options.error(f"no part {', '.join(unknown)}; there are {', '.join(part.name for part in chosen)}")
    wanted = [part for part in chosen if not given.only or part.name in (*given.only, chosen[0].name)]
    if not on_gpu:  # where its time says nothing, and the machine may have other things to do
        wanted = [replace(part, limit_s=PATIENCE * part.limit_s) for part in wanted]
    outcomes = run_suite(wanted, given.out, given.limit, on_gpu)
    return int(any(outcome.status in ("failed", "timed out") for outcome in outcomes))


def run_suite(suite: Sequence[Part], out: Path, limit_s: float, on_gpu: bool) -> list[Outcome]:
    """Run the parts one after the other, write what came of them after each, print the table."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{NAME}.log"
    log.write_bytes(b"")
    end_s = time.monotonic() + limit_s
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
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


def run_part(part: Part, limit_s: float, folder: Path, environment: Mapping[str, str], log: Path) -> Outcome:
    """Run one part to its end or its limit; it and all it has started are gone afterwards."""
    result = folder / f"{part.name.replace(' ', '-')}.json"
    places = {"{result}": str(result), "{piano}": str(folder)}
    words = [places.get(word, word) for word in part.command]
    start_s = time.monotonic()
    with open(log, "ab") as sink:
        sink.write(f"\n===== {part.name}: python {' '.join(words)}\n".encode())
        sink.flush()
        begin = sink.tell()
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
    text = shortened(log, begin)
    try:  # what a part has written by then counts, whatever became of it
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        figure, floor = headline(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found, figure, floor = {"passed": False}, f"its result cannot be read: {error!r}", ""
    if code is None:
        return Outcome(part.name, "timed out", seconds, f"after {limit_s:.0f} s  {figure}".strip(), floor, found)
    status = "passed" if code == 0 and found.get("passed", True) else "failed"
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return Outcome(part.name, status, seconds, figure or last, floor, found)


def shortened(log: Path, begin: int) -> str:
    """What a part has written into the log from byte `begin` on, of which the last MiB stays there."""
    with open(log, "rb+") as file:
        file.seek(begin)
        said = file.read()
        if len(said) > MIB:
            file.seek(begin)
            file.write(said[-MIB:])
            file.truncate()
    return said.decode("utf-8", errors="replace")


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
        "PYTHONUNBUFFERED": "1",
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
    widths = [max(len(row[i]) for row in rows) for i in range(4)]  # not text_table: fastsmart may not be installed
    lines = ([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[4]] for row in rows)
    return "\n".join("  ".join(line).rstrip()[:160] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
