"""How long a listener waits for the first note of an answer: from the request to the event, over loopback.

    python bench/first_note.py --runs 20 --out bench/results/first-note.json

A server in a process of its own, as `fastsmart live` starts it, without training beside it; with --training a listener
chooses, until there is a lesson that trains, and times count while it does. A phrase of eight notes is sent again and
again; the time runs from the first byte sent to the first note's event. The result has the machine's load average: on a
shared machine a time is others' as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result
from scripted_listener import ScriptedListener, server

CHOICES = 25  # after so many of a clear taste a lesson has something to train
BEGUN_S = 20.0  # a lesson with nothing to train ends sooner


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=20, help="answers that count, after two that do not (20)")
    options.add_argument("--training", action="store_true", help="while a lesson trains")
    options.add_argument("--policy", default="pop909-tiny")
    options.add_argument("--out", default="", help="JSON file for the result")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        beside = [] if given.training else ["--no-training"]
        with server(given.policy, Path(folder) / "taste", *beside) as (_, address):
            listener = ScriptedListener(address, Path(folder))
            if given.training:
                have_trained(listener)
            waits_ms = measure(listener, given.runs, given.training)
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


def have_trained(listener: ScriptedListener) -> None:
    """Choose clips of few notes until a lesson trains."""
    for _ in range(CHOICES):
        listener.choose()
    since = time.monotonic()
    while time.monotonic() - since < BEGUN_S:
        if listener.state()["training"]["doing"] != "training":
            since = time.monotonic()


def measure(listener: ScriptedListener, runs: int, training: bool) -> list[float]:
    """Milliseconds from each request to its first note."""
    came, at = threading.Event(), [0.0]

    def listen() -> None:
        with urlopen(f"{listener.address}events", timeout=600) as stream:
            for line in stream:
                if line.startswith(b"event: notes") and not came.is_set():
                    at[0] = time.perf_counter()
                    came.set()

    came.set()
    threading.Thread(target=listen, daemon=True).start()
    listener.state()
    waits_ms = []
    for _ in range(runs + 2):
        came.clear()
        began = time.perf_counter()
        listener.hand_in()
        assert came.wait(300), "no note came"
        waits_ms.append((at[0] - began) * 1000)
        doing = listener.state()["training"]["doing"]
        assert not training or doing == "training", f"the lesson ended after {len(waits_ms)} phrases; fewer --runs"
    return waits_ms[2:]


if __name__ == "__main__":
    main()
