"""Hours of a scripted listener at the page: memory, files and answers of the server.

    python bench/live_soak.py --hours 2 --out bench/results/live-soak-2core-xeon.json

A server in a process of its own, with training beside it. The listener hears both clips of a pair, prefers the one with
fewer notes, and now and then takes a choice back, skips, moves the boldness, hands in a phrase and chooses among its
answers, opens and closes the page's stream of events, and sends what no page sends. Every request must be answered:
what a page sends with 200, the rest with a refusal. Memory (resident) of the server and of the process that trains,
descriptors and files are written down every minute; their slopes are of the time after the first quarter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import psutil
from results import write_result
from scripted_listener import ScriptedListener, server


def measured(server: psutil.Process, folder: Path) -> dict[str, float]:
    """Memory in MiB, descriptors and files, now."""
    children = server.children(recursive=True)
    return {
        "server_mib": server.memory_info().rss / 2**20,
        "training_mib": sum(child.memory_info().rss for child in children) / 2**20,
        "descriptors": server.num_fds(),
        "threads": server.num_threads(),
        "clip_files": sum(1 for _ in (folder / "clips").glob("*")),
    }


def slopes(rows: list[dict[str, float]]) -> dict[str, float]:
    """Growth an hour of what was measured, by least squares after the first quarter of the time."""
    late = [row for row in rows if row["hours"] >= rows[-1]["hours"] / 4]
    hours = np.array([row["hours"] for row in late])
    if len(late) < 3:
        return {}
    return {
        name: round(float(np.polyfit(hours, [row[name] for row in late], 1)[0]), 3)
        for name in late[0]
        if name != "hours"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two choices, of listening")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two measurements")
    parser.add_argument("--policy", default="pop909-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("live-soak.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with server(options.policy, work / "taste") as (process, address):
            listener = ScriptedListener(address, work, options.seed)
            watched, rows = psutil.Process(process.pid), list[dict[str, float]]()
            begun = time.monotonic()
            while (hours := (time.monotonic() - begun) / 3600) < options.hours:
                listener.turn()
                time.sleep(options.pause)
                if not rows or hours - rows[-1]["hours"] >= options.every / 3600:
                    rows.append({"hours": round(hours, 4)} | measured(watched, work / "taste"))
                    state = json.loads(listener.asked("state"))
                    lessons = max(policy["version"] for policy in state["policies"])
                    result = {
                        "hours": hours,
                        "listener": dict(listener.counts),
                        "lessons": lessons,
                        "training": state["training"],
                    }
                    result |= {"an_hour": slopes(rows), "first": rows[0], "last": rows[-1], "rows": rows}
                    write_result(options.out, result)
                    print(json.dumps(rows[-1] | dict(listener.counts)), flush=True)
        assert process.wait(60) in (0, 143), process.returncode
    print(json.dumps({key: result[key] for key in ("hours", "listener", "an_hour", "first", "last")}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
