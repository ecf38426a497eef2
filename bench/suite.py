"""All stages on the CPU in their quick sizes, one table, and a check against what this processor did before.

    make bench                                  # python bench/suite.py; some minutes on two cores
    python bench/suite.py --accept              # and take this run as what to compare the next ones with

A stage is compared by its time over that of the reference kernel measured beside it, so a machine that is slower in
everything passes. What may be lost before that counts, --tolerance, is generous because shared machines are noisy:
neighbours take cache and memory bandwidth from a stage and not from the reference kernel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import as_commands  # noqa: F401  # isort: skip  # before torch

from stages import run

from fastsmart.errors import UserError
from fastsmart.machine.files import cpu_cores, make_folder, processor, write_atomic
from fastsmart.machine.hardware import cpu_family, instruction_sets, library_limits

BENCH = Path(__file__).parent
STAGES = ("sampling", "decode", "render", "score", "logprob", "update", "sync")
BASELINES = BENCH / "results" / "baselines.json"
TOLERANCE = 1.5


@dataclass(frozen=True)
class Row:
    """A case of a stage: the median of our time, our share of the floor, and our time over the reference kernel's."""

    median_s: float
    share_of_floor: float
    over_reference: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results (runs/bench)")
    options.add_argument("--baselines", type=Path, default=BASELINES, help="JSON file; default: the committed one")
    options.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"times the baseline ({TOLERANCE})")
    options.add_argument("--accept", action="store_true", help="write this run into the baselines")
    given = options.parse_args(arguments)
    known = read_baselines(given.baselines)  # before minutes of work
    failed = [stage for stage in STAGES if not measure(stage, make_folder(given.out))]
    rows = read_rows(given.out)
    entry = known.get(machine())
    print_table(rows, entry or {})
    for stage in failed:
        print(f"{stage} did not run; what it said is above")
    if failed:
        return 1
    if given.accept:
        ratios = {name: row.over_reference for name, row in rows.items()}
        write_atomic(given.baselines, json.dumps(known | {machine(): ratios}, indent=1, sort_keys=True) + "\n")
        print(f"{given.baselines} has this run for {machine()} now; commit it")
        return 0
    if entry is None:
        if old := of_unknown_chip(known):
            print(f"the baselines of {old!r} do not say of which chip they are; they are kept, and not compared with")
        print(
            f"{given.baselines} has nothing for {machine()}, so nothing was compared; on a quiet machine, "
            "`python bench/suite.py --accept` writes this run there"
        )
        return 0
    found = regressions(rows, entry, given.tolerance)
    print(*found or ["no stage has become slower"], sep="\n")
    return 1 if found else 0


def machine() -> str:
    """The name of an entry: of the chip, since chips of one name differ, what holds its libraries back, and the number
    of cores, because not every stage gains from them as the reference kernel does."""
    limits = "".join(f", {name}={value}" for name, value in library_limits().items())
    return f"{processor()}, {cpu_family()}, {' '.join(instruction_sets())}{limits}, {cpu_cores()} cores"


def of_unknown_chip(known: Mapping[str, object]) -> str:
    """The entry of this processor's name that does not say which chip it is from; "" where there is none."""
    name = f"{processor()}, {cpu_cores()} cores"
    return name if name in known else ""


def measure(stage: str, folder: Path) -> bool:
    """Run the script of a stage; its result is FOLDER/STAGE.json."""
    result = folder / f"{stage}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(BENCH / f"{stage}.py"), "--quick", "--device", "cpu", "--out", str(result)]
    print(f"--- {stage}", flush=True)
    return subprocess.run(command, check=False).returncode == 0


def read_rows(folder: Path) -> dict[str, Row]:
    """ "STAGE CASE" -> its row, of all results in a folder."""
    rows = {}
    for path in (folder / f"{stage}.json" for stage in STAGES):
        if path.is_file():
            for case, r in json.loads(path.read_text(encoding="utf-8"))["cases"].items():
                median = r["contenders"][r["ours"]]["median_s"]
                rows[f"{path.stem} {case}"] = Row(median, r["share_of_floor"], r["over_reference_kernel"])
    return rows


def read_baselines(path: Path) -> dict[str, dict[str, float]]:
    """Machine -> "STAGE CASE" -> time over the reference kernel's; nothing where there is no file.

    Raises UserError for a file that holds anything else.
    """
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: {case: float(ratio) for case, ratio in entry.items()} for name, entry in known.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a file of baselines ({error}); restore it or delete it") from error


def regressions(rows: Mapping[str, Row], entry: Mapping[str, float], tolerance: float) -> list[str]:
    """A sentence for every case that takes more than `tolerance` times its baseline, or is missing."""
    found = [f"{name} has a baseline but was not measured" for name in entry if name not in rows]
    for name, row in rows.items():
        if name not in entry:
            print(f"{name} has no baseline yet; --accept writes one")
        elif row.over_reference > tolerance * entry[name]:
            found.append(
                f"{name} has become slower: {row.over_reference:.3g} times as long as the reference kernel, "
                f"{row.over_reference / entry[name]:.2f} x its baseline of {entry[name]:.3g}; up to {tolerance:g} x "
                "passes for noise"
            )
    return found


def print_table(rows: Mapping[str, Row], entry: Mapping[str, float]) -> None:
    print(f"\n{machine()}\n{'stage':24}{'median':>11}{'of floor':>10}{'/ reference':>13}{'/ baseline':>12}")
    for name, row in rows.items():
        change = f"{row.over_reference / entry[name]:.2f}" if name in entry else "-"
        print(f"{name:24}{row.median_s:9.4f} s{row.share_of_floor:10.0%}{row.over_reference:13.3f}{change:>12}")


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
