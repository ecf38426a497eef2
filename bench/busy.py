"""A step beside other processes: how long it takes on an idle machine, and while one or two others compute.

    python bench/busy.py --out bench/results/busy.json
    python bench/busy.py --quick --jobs score

Threads of GNU OpenMP that wait hold their core for a while before they sleep; beside another process that can cost many
times the work. Each way of waiting has a process of its own (OpenMP reads it once, when it is loaded) that stays up and
takes a step when it is told to: in every round each way takes its turn idle, with one process pinned to the last core,
and with a second on the core before. "fastsmart" is a process that nothing was set for; "OpenMP's own" are the 300,000
turns of GNU OpenMP itself; other --spins have their number.

Beside each time stands what others used of the machine meanwhile, in cores: on a shared machine "idle" may not be.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch
import numpy as np
import torch
from harness import timed
from results import write_result
from stages import played, run

import fastsmart
from fastsmart.errors import UserError
from fastsmart.machine.files import cpu_cores
from fastsmart.machine.hardware import WAITING, load_average, waiting

OURS, OWN = "fastsmart", "OpenMP's own"
OWN_SPINS = 300_000  # libgomp's default, where nobody says anything
BURN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
Step = Callable[[], float]  # takes a step, or some; gives seconds of one


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="default: all")
    options.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2], help="processes beside it (0 1 2)")
    options.add_argument("--spins", nargs="*", type=int, default=[], help="further ways: turns a thread looks for work")
    options.add_argument("--rounds", type=int, default=5, help="turns of each way (5)")
    options.add_argument("--quick", action="store_true", help="toy sizes")
    options.add_argument("--out", default="", help="JSON file for the result")
    options.add_argument("--worker", choices=list(JOBS), help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    if given.worker:
        serve(given.worker, given.quick)
        return None
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("bench/busy.py pins processes to cores, which this system does not let it; run it on Linux")
    torch.set_num_threads(cpu_cores())  # as every worker does, and as the result says
    before = load_average()
    ways = {OURS: None, OWN: OWN_SPINS} | {f"{spins} turns": spins for spins in given.spins}
    found = {job: compare(job, ways, given.busy, given.rounds, given.quick) for job in given.jobs}
    figures = {"quick": given.quick, "load_average_before": before, "jobs": found}
    if given.out:
        write_result(given.out, figures)
    return figures


def compare(job: str, ways: dict[str, int | None], busy: Sequence[int], rounds: int, quick: bool) -> dict[str, Any]:
    """Seconds of a step by way and number of busy processes, one of each round; ratios, and a table printed."""
    seconds: dict[str, dict[str, list[float]]] = {way: {str(n): [] for n in busy} for way in ways}
    others: dict[str, dict[str, list[float]]] = {way: {str(n): [] for n in busy} for way in ways}
    with ExitStack() as stack:
        workers = {way: stack.enter_context(worker(job, spins, quick)) for way, spins in ways.items()}
        says = {way: started.stdout.readline().strip() for way, started in workers.items()}  # type: ignore[union-attr]
        for _ in range(rounds):
            for beside in busy:
                for way, started in workers.items():
                    with burning(beside):
                        elapsed, used = step_of(started, beside)
                    seconds[way][str(beside)].append(elapsed)
                    others[way][str(beside)].append(used)
    figures: dict[str, Any] = {"waits": says, "step_s": seconds, "cores_used_by_others": others, "over_idle": {}}
    first = str(busy[0])
    print(f"{job}: seconds of a step, over that beside {first}, cores that others used")
    for way, each in seconds.items():
        ratios = {n: [s / idle for s, idle in zip(each[n], each[first], strict=True)] for n in each}
        figures["over_idle"][way] = {n: statistics.median(r) for n, r in ratios.items()}
        cells = [
            f"{n}: {statistics.median(each[n]):8.3f} s {figures['over_idle'][way][n]:6.2f} x "
            f"({statistics.median(others[way][n]):.1f})"
            for n in each
        ]
        print(f"  {way:14}" + "   ".join(cells), flush=True)
    figures["own_over_ours"] = {
        n: statistics.median(own / ours for own, ours in zip(seconds[OWN][n], seconds[OURS][n], strict=True))
        for n in seconds[OURS]
    }
    print(f"  {OWN} over {OURS}: " + ", ".join(f"{n}: {ratio:.2f}" for n, ratio in figures["own_over_ours"].items()))
    return figures


@contextmanager
def worker(job: str, spins: int | None, quick: bool) -> Iterator[subprocess.Popen[str]]:
    """A process that waits in this way and takes a step of the job for every line it is given; ended with the block."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = str(spins)
    command = [sys.executable, __file__, "--worker", job, *(["--quick"] if quick else [])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def burning(count: int) -> Iterator[None]:
    """So many processes that compute all the time, pinned to the last cores, one each."""
    cores = sorted(os.sched_getaffinity(0))[::-1]
    burners = []
    try:
        for i in range(count):
            command = [sys.executable, "-c", BURN, str(cores[i % len(cores)])]
            burners.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            burners[-1].stdout.readline()  # type: ignore[union-attr]  # it burns
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.communicate()


def step_of(started: subprocess.Popen[str], beside: int) -> tuple[float, float]:
    """Seconds of a step of this worker, and the cores that neither it, nor its children, nor the burners used then."""
    assert started.stdin
    assert started.stdout
    start, machine = time.perf_counter(), machine_s()
    started.stdin.write("step\n")
    started.stdin.flush()
    answer = started.stdout.readline().split()
    elapsed = time.perf_counter() - start
    if len(answer) != 2:
        raise UserError(f"a step of bench/busy.py ended its process (exit code {started.wait()}); its words are above")
    own_s = float(answer[1])
    return float(answer[0]), max(0.0, (machine_s() - machine - own_s) / elapsed - beside)


def machine_s() -> float:
    """Seconds all cores together have worked since the machine started."""
    user, nice, system, *_ = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    return TICK_S * (int(user) + int(nice) + int(system))


def serve(job: str, quick: bool) -> None:
    """Be a worker: say how threads wait here, then answer every line with the seconds of a step and of its cores."""
    torch.set_num_threads(cpu_cores())
    with tempfile.TemporaryDirectory() as folder:
        step = JOBS[job](Path(folder), quick)
        step()  # compiles, fills caches
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the job prints is no answer
        print(waiting(), file=answers, flush=True)
        for _ in sys.stdin:
            before = family_s()
            seconds = step()
            print(seconds, family_s() - before, file=answers, flush=True)


def family_s() -> float:
    """Seconds of a core that this process and the children running now have used."""
    total = sum(os.times()[:4])
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text(encoding="utf-8").split():
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            total += TICK_S * (int(fields[11]) + int(fields[12]))
    return total


def train_step(folder: Path, quick: bool) -> Step:
    """A step of the preset demo: 64 completions of 250 tokens, rendered, scored and learnt from."""
    from step import OwnStep

    config = fastsmart.presets.demo()
    if quick:
        config = replace(
            config,
            sampling=replace(config.sampling, group=2, max_tokens=16),
            train=replace(config.train, prompts=1),
        )
    return partial(timed, OwnStep(config, folder).step)


def pretrain_step(folder: Path, quick: bool) -> Step:
    """A step of `fastsmart pretrain` as it is by default: 12 rows of pieces that the shipped policy made up."""
    from fastsmart.policy.pretrain import PretrainSettings, pretrain
    from fastsmart.policy.transformer import PolicySize
    from fastsmart.tokens.dataset import TokenDataset

    rollout, vocab = played(40, 64 if quick else 500)
    pieces = rollout.sequences()
    offsets = np.cumsum([0, *map(len, pieces)])
    names = tuple(map(str, range(len(pieces))))
    dataset = TokenDataset(np.concatenate(list(pieces)).astype(np.uint16), offsets, names, (), vocab, "")
    size = PolicySize(len(vocab), *((32, 64, 1, 2, 2) if quick else (256, 768, 4, 4, 4)))
    settings = replace(PretrainSettings(), steps=3 if quick else 8, valid_rows=2, eval_every=1_000)

    def step() -> float:
        ends: list[float] = []
        with tempfile.TemporaryDirectory(dir=folder) as out:
            pretrain(dataset, size, settings, out, report=lambda line: ends.append(time.perf_counter()))
        return (ends[-2] - ends[0]) / (len(ends) - 2)  # the last has an evaluation in it

    return step


def evaluation(folder: Path, quick: bool) -> Step:
    """`fastsmart evaluate` of the shipped policy on 64 prompts, with the rewards of the preset demo."""
    from fastsmart.study.evaluate import evaluate

    config = fastsmart.presets.demo()
    if quick:
        config = replace(config, sampling=replace(config.sampling, max_tokens=16))

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            evaluate(["pop909-tiny"], Path(out, "evaluation"), config, 8 if quick else 64, best_of=0)

    return partial(timed, whole)


def scoring(folder: Path, quick: bool) -> Step:
    """Audiobox of the published size, random weights, float32, on four windows of 10 s."""
    from score import RATE_HZ, WINDOW, clips

    from fastsmart.audio import AudioBatch
    from fastsmart.reward import Clips
    from fastsmart.reward.audiobox import AudioboxReward, make_random_weights
    from fastsmart.reward.audiobox.architecture import Size

    small = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)
    reward = AudioboxReward(make_random_weights(folder / "checkpoint.pt", size=small if quick else None))
    windows = clips(1 if quick else 4)
    audio = AudioBatch(windows, np.full(len(windows), WINDOW), RATE_HZ)
    return partial(timed, lambda: reward(Clips(range(len(windows)), audio)))  # type: ignore[arg-type]


JOBS: dict[str, Callable[[Path, bool], Step]] = {
    "train": train_step,
    "pretrain": pretrain_step,
    "evaluate": evaluation,
    "score": scoring,
}

if __name__ == "__main__":
    run(main)
