"""How long a listener waits for the first note of an answer: from the request to the event, over loopback.

    python bench/first_note.py --runs 20 --out bench/results/first-note.json

A server in a process of its own, as `fastsmart live` starts it, without training beside it (--training has it train). A
phrase of eight notes is sent again and again; the time runs from the first byte sent to the first note's event. The
result has the machine's load average: on a shared machine a time is others' as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request, urlopen

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result

from fastsmart.live.sound import notes_of

TUNE = [(0.5 * i, 0.45, pitch, 80) for i, pitch in enumerate((60, 62, 64, 65, 67, 65, 64, 62))]


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=20, help="answers that count, after two that do not (20)")
    options.add_argument("--training", action="store_true", help="have a policy trained meanwhile")
    options.add_argument("--policy", default="pop909-tiny")
    options.add_argument("--out", default="", help="JSON file for the result")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phrase.mid"
        notes_of(TUNE, 120.0).to_midi(0, path)
        command = [sys.executable, "-m", "fastsmart", "live", "--policy", given.policy, "--out", f"{folder}/taste"]
        command += ["--port", "0", *([] if given.training else ["--no-training"])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[1]
            try:
                waits_ms = measure(address, path.read_bytes(), given.runs)
            finally:
                server.terminate()
    result: dict[str, object] = {
        "median_ms": round(statistics.median(waits_ms), 1),
        "quartiles_ms": [round(float(x), 1) for x in np.quantile(waits_ms, [0.25, 0.75])],
        "most_ms": round(max(waits_ms), 1),
        "waits_ms": [round(wait, 1) for wait in waits_ms],
    }
    print(json.dumps(result))
    if given.out:
        write_result(given.out, result)
    return result


def measure(address: str, phrase: bytes, runs: int) -> list[float]:
    """Milliseconds from each request to its first note."""
    came, at = threading.Event(), [0.0]

    def listen() -> None:
        with urlopen(f"{address}events", timeout=600) as stream:
            for line in stream:
                if line.startswith(b"event: notes") and not came.is_set():
                    at[0] = time.perf_counter()
                    came.set()

    came.set()
    threading.Thread(target=listen, daemon=True).start()
    while json.load(urlopen(f"{address}state"))["pair"] is None:
        time.sleep(0.2)
    waits_ms = []
    for _ in range(runs + 2):
        came.clear()
        began = time.perf_counter()
        urlopen(Request(f"{address}phrase?name=tune.mid", phrase, method="POST")).close()
        came.wait(300)
        waits_ms.append((at[0] - began) * 1000)
        while not all(clip["whole"] for clip in json.load(urlopen(f"{address}state"))["pair"]):
            time.sleep(0.1)
    return waits_ms[2:]


if __name__ == "__main__":
    main()
