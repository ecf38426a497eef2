"""Count hostile inputs: `python -m tests.fuzz --count 100000 --seed 1 --out counts.json`.

Prints what broke the invariant, writes each such case to OUT's folder as a line for the corpus, and keeps the counts in
OUT, which an interrupted count goes on from.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import fastsmart  # noqa: F401  # isort: skip  # before torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

import torch  # noqa: E402
from kinds import KINDS, make  # noqa: E402
from stand import Stand  # noqa: E402
from whole import write_whole  # noqa: E402

HANG_S = 600  # of the clock, where not even a signal is answered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--out", default="fuzz/counts.json")
    options = parser.parse_args()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = json.loads(out.read_text()) if out.exists() else {"seed": options.seed, "inputs": {}, "broken": {}}
    inputs, broken = Counter(found["inputs"]), Counter(found["broken"])
    kinds = options.kind or list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTSMART_CACHE"] = os.environ["HOME"] = folder
        stand = Stand(Path(folder))
        write_whole(stand.base)
        stand.seal()
        began = written = time.monotonic()
        while sum(inputs[kind] for kind in kinds) < options.count:
            kind = min(kinds, key=lambda k: inputs[k] / KINDS[k][1])  # who is furthest behind its share
            case = make(kind, found["seed"], inputs[kind], stand.base)
            (out.parent / "current.jsonl").write_text(case.to_json() + "\n")  # what to look at after a crash
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            wrong = stand.wrong(case)
            faulthandler.cancel_dump_traceback_later()
            inputs[kind] += 1
            if wrong:
                broken[kind] += 1
                print(f"{kind} {inputs[kind] - 1}: {case.arguments}\n{wrong}\n", flush=True)
                with open(out.parent / "broken.jsonl", "a") as sink:
                    sink.write(case.to_json() + "\n")
                stand.seal()
            if time.monotonic() - written > 10:
                written = time.monotonic()
                out.write_text(json.dumps(found | {"inputs": inputs, "broken": broken}))
        out.write_text(json.dumps(found | {"inputs": inputs, "broken": broken}))
        print(f"{sum(inputs.values()):,} inputs, {sum(broken.values())} broke the invariant", end=", ")
        print(f"{time.monotonic() - began:.0f} s, peak {_peak_mb()} MB: {json.dumps(inputs)}")
    return 1 if broken else 0


def _peak_mb() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    sys.exit(main())
