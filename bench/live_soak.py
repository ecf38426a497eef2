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
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import psutil
from first_note import TUNE
from results import write_result

from fastsmart.live.sound import notes_of
from fastsmart.notes import read_midi

PATIENCE_S = 120.0
WRONG = (  # address, body: none of them is a page's
    ("choose", b"{"),
    ("choose", b'{"left": "nobody", "right": "no one", "choice": "left"}'),
    ("choose", b'{"left": 1, "right": [], "choice": null}'),
    ("back", b'{"version": -7}'),
    ("settings", b'{"boldness": 1e9}'),
    ("phrase?name=../../x.mid", b"MThd" + bytes(200)),
    ("phrase?bars=many", b""),
    ("played", b'{"notes": [[0, 0, 0, 0]], "tempo": -1}'),
    ("clips/..%2f..%2fetc%2fpasswd.flac", None),
    ("nothing", None),
)


class ScriptedListener:
    """Sends what a page sends, and counts what comes back."""

    def __init__(self, address: str, phrase: bytes, work: Path, seed: int) -> None:
        self.address, self.phrase, self.work = address, phrase, work
        self.random, self.counts = random.Random(seed), Counter[str]()

    def send(self, path: str, content: bytes | None = None, post: bool = False) -> tuple[int, bytes]:
        """Status and body of a request; a refusal is an answer too."""
        request = Request(f"{self.address}{path}", content, method="POST" if post else "GET")
        try:
            with urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read()
        except HTTPError as error:
            return error.code, error.read()

    def asked(self, path: str, content: bytes | None = None, post: bool = False) -> bytes:
        """Body of a request that must be met."""
        status, found = self.send(path, content, post)
        assert status == 200, (path, status, found[:300])
        return found

    def state(self) -> dict[str, Any]:
        """What the page shows, once there is a pair that has been played to its end."""
        until = time.monotonic() + PATIENCE_S * 5
        while True:
            state: dict[str, Any] = json.loads(self.asked("state"))
            if state["pair"] and all(clip["whole"] for clip in state["pair"]):
                return state
            assert time.monotonic() < until, "no pair to choose from"
            time.sleep(0.5)

    def notes(self, id: str) -> int:
        """Hear a clip and count its notes."""
        assert self.asked(f"clips/{id}.flac")[:4] == b"fLaC"
        path = self.work / "heard.mid"
        path.write_bytes(self.asked(f"clips/{id}.mid"))
        return int(read_midi(path).counts[0])

    def choose(self) -> None:
        """Hear the pair and choose the clip with fewer notes."""
        ids = [clip["id"] for clip in self.state()["pair"]]
        left, right = map(self.notes, ids)
        choice = "equal" if left == right else "left" if left < right else "right"
        content = json.dumps({"left": ids[0], "right": ids[1], "choice": choice}).encode()
        status, found = self.send("choose", content, post=True)
        assert status in (200, 409), (status, found[:300])  # a new pair may have come: then it is another's turn
        self.counts["choices" if status == 200 else "choices that came late"] += 1

    def turn(self) -> None:
        """One of the things that listeners do."""
        self.choose()
        dice = self.random.random()
        if dice < 0.05:
            self.asked("undo", b"{}", True)
            self.counts["undone"] += 1
        elif dice < 0.10:
            self.state()
            status, _ = self.send("skip", b"{}", True)
            assert status in (200, 409, 422)
            self.counts["skipped"] += 1
        elif dice < 0.15:
            self.asked("settings", json.dumps({"boldness": self.random.randint(0, 10)}).encode(), True)
            self.counts["boldness moved"] += 1
        elif dice < 0.20:
            self.asked("phrase?name=tune.mid", self.phrase, True)
            self.choose()
            self.asked("drop", b"{}", True)
            self.counts["phrases answered"] += 1
        elif dice < 0.25:
            with urlopen(f"{self.address}events", timeout=PATIENCE_S) as stream:
                stream.readline()
            self.counts["pages opened"] += 1
        elif dice < 0.35:
            path, content = self.random.choice(WRONG)
            status, found = self.send(path, content, content is not None)
            assert 400 <= status < 500, (path, status, found[:300])
            assert len(found) < 2000
            self.counts["refused"] += 1


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
        notes_of(TUNE, 120.0).to_midi(0, work / "phrase.mid")
        command = [sys.executable, "-m", "fastsmart", "live", "--policy", options.policy, "--out", f"{folder}/taste"]
        with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[1]
            listener = ScriptedListener(address, (work / "phrase.mid").read_bytes(), work, options.seed)
            watched, rows = psutil.Process(server.pid), list[dict[str, float]]()
            begun = time.monotonic()
            try:
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
            finally:
                server.terminate()
            assert server.wait(60) in (0, 143), server.returncode
    print(json.dumps({key: result[key] for key in ("hours", "listener", "an_hour", "first", "last")}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
