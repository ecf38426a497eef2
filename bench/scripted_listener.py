"""A scripted listener at the page of `fastsmart live`, who sends what a page sends, and sometimes what none does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fastsmart.live.sound import notes_of
from fastsmart.notes import read_midi

TUNE = [(0.5 * i, 0.45, pitch, 80) for i, pitch in enumerate((60, 62, 64, 65, 67, 65, 64, 62))]
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

    def __init__(self, address: str, work: Path, seed: int = 0) -> None:
        self.address, self.work = address, work
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

    def hand_in(self) -> None:
        """Hand in a phrase of eight notes, to be answered."""
        self.asked("phrase?name=tune.mid", notes_of(TUNE, 120.0).midi_bytes(0), True)

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
            self.hand_in()
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


@contextmanager
def server(policy: str, out: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, as `fastsmart live` starts it, and its address; ended at the end."""
    command = [
        sys.executable,
        "-m",
        "fastsmart",
        "live",
        "--policy",
        policy,
        "--out",
        str(out),
        "--port",
        "0",
        *options,
    ]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[1]
        try:
            yield process, address
        finally:
            process.terminate()
