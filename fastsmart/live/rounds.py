"""Training beside the page: a process of its own, of the least priority, that takes some steps each time it is asked.

It has as many steps as the choices are worth, so a page that is left open does not drift. Killed at any instant, or
with the server, it leaves whole checkpoints, and goes on from the newest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastsmart.errors import UserError
from fastsmart.live.session import EARLIER, Session
from fastsmart.live.settings import kl_weight
from fastsmart.machine.files import os_errors_as_user_errors, write_atomic
from fastsmart.policy.hf_format import step_folders, step_of
from fastsmart.taste.replay import ROUNDS_FILE, Round, TasteFolder

FIRST_CHOICES = 6  # before anything is trained on them
STEPS_A_ROUND = 1
STEPS_A_CHOICE = 2  # at most, of all rounds together
LOG_FILE = "training.log"
TRAINED_ON = "training.json"  # the taste of the present round
LOOK_EVERY_S = 1.0
AFTER_A_FAILURE_S = 30.0


class Rounds(threading.Thread):
    """A thread that has a process train while there are choices to train on.

    doing : "waiting", "training", "paused" or "off"
    error : why the last round came to nothing, in a sentence; "" where it did not
    """

    def __init__(self, session: Session) -> None:
        super().__init__(name="rounds", daemon=True)
        self.session = session
        self.doing, self.error = "waiting", ""
        self._wake, self._stopped = threading.Event(), False
        self._process: subprocess.Popen[str] | None = None
        self._guard = threading.RLock()  # held while the run's folder is changed

    def newest(self) -> tuple[int, str]:
        """Version and place of the policy that is to play."""
        found = step_folders(self._checkpoints())
        return (step_of(found[-1]), str(found[-1])) if found else (0, self.session.settings.policy)

    def versions(self) -> list[int]:
        """Policies one can go back to, oldest first; 0 is the first."""
        return [0, *map(step_of, step_folders(self._checkpoints()))]

    def look(self) -> None:
        """Look now whether there is something to train on."""
        self._wake.set()

    def go_back(self, version: int) -> None:
        """Play, and train on, from an earlier policy; raises UserError for one that is not there. What was trained
        since is put aside in the folder, not removed."""
        from fastsmart.taste.training import go_back

        with self._guard:
            if version not in self.versions():
                raise UserError("there is no such policy to go back to")
            self.session.configure(paused=True)
            self.end_process()
            if version:
                go_back(self.session.folder.run, version)
            elif self.session.folder.run.is_dir():
                aside = self.session.folder.path / EARLIER
                aside.mkdir(exist_ok=True)
                number = sum(1 for _ in aside.iterdir())
                self.session.folder.run.rename(aside / f"run-{number:04d}")
            keep_rounds(self.session.folder, version)
        self.session.forget_after(version)

    def reset(self) -> Path:
        """Begin again, as `Session.reset` does."""
        with self._guard:
            self.end_process()
            return self.session.reset()

    def stop(self) -> None:
        """End the process and the thread; a round that has begun is lost, and begun anew by the next server."""
        self._stopped = True
        self._wake.set()
        self.end_process()

    def end_process(self) -> None:
        """End the process at once."""
        with self._guard:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    with suppress(OSError):  # of an order that was not taken
                        pipe.close()  # type: ignore[union-attr]

    def run(self) -> None:
        while not self._stopped:
            wait_s = LOOK_EVERY_S
            try:
                if self._is_due():
                    wait_s = 0.0 if self._round() else AFTER_A_FAILURE_S
            except UserError as error:  # a full disk, a damaged file
                wait_s = AFTER_A_FAILURE_S
                self._tell(str(error))
            if wait_s and not self._stopped:
                self._wake.wait(wait_s)
                self._wake.clear()

    def _is_due(self) -> bool:
        """Whether the choices are worth another round."""
        if self.session.place.paused:
            self._say("paused")
            return False
        count = len(self.session.judgements())
        done = sum(r.steps for r in self.session.folder.rounds() if r.listener == self.session.listener)
        due = count >= FIRST_CHOICES and done < STEPS_A_CHOICE * count
        if not due:
            self._say("waiting")
        return due

    def _round(self) -> bool:
        """Have one round trained; False where it came to nothing.

        It is written down before it begins. One that was not finished is struck out before the next.
        """
        session, folder = self.session, self.session.folder
        taste = (folder.path / TRAINED_ON).resolve()
        if (known := session.taste_to_train_on(taste)) is None:
            return False
        beta = kl_weight(session.place.boldness)
        order = {
            "policy": session.settings.policy,
            "max_tokens": session.settings.max_tokens,
            "seconds": session.settings.seconds,
            "taste": str(taste),
            "steps": STEPS_A_ROUND,
            "beta": beta,
        }
        self._say("training")
        with self._guard:
            if self._stopped or session.place.paused:
                return True
            keep_rounds(folder, self.newest()[0])
            folder.append_round(Round(known[0], STEPS_A_ROUND, beta, session.listener))
            if self._process is None:
                self._process = _start(folder.run.resolve(), folder.path / LOG_FILE)
            process = self._process
        error = self._error_of(process, order)
        if error is not None:
            self._tell(error)
        return not error

    def _error_of(self, process: subprocess.Popen[str], order: dict[str, Any]) -> str | None:
        """Why the process did not do as ordered; "" = it did, None = it was ended by `end_process`."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            if line := process.stdout.readline():
                return str(json.loads(line).get("error", ""))
        except (OSError, ValueError):
            pass  # it has died, or its pipes were closed
        with self._guard:
            if self._process is not process:
                return None
            self.end_process()
        log = self.session.folder.path / LOG_FILE
        return f"the training process has died (exit code {process.returncode}, see {log}); it is started again soon"

    def _tell(self, error: str) -> None:
        self.error = error
        self.session.changed()

    def _say(self, doing: str) -> None:
        if doing != self.doing:
            self.doing = doing
            self.session.changed()

    def _checkpoints(self) -> Path:
        return self.session.folder.run / "checkpoints"


def keep_rounds(folder: TasteFolder, steps: int) -> None:
    """Strike out the rounds beyond the first so many steps."""
    rounds = folder.rounds()
    kept = [r for r, end in zip(rounds, accumulate(r.steps for r in rounds), strict=True) if end <= steps]
    if len(kept) < len(rounds):
        write_atomic(folder.path / ROUNDS_FILE, "".join(json.dumps(vars(r)) + "\n" for r in kept))


def _start(run: Path, log: Path) -> subprocess.Popen[str]:
    """The process; it has this one's modules, and neither its terminal nor its Ctrl-C. What it complains of is in the
    log, which begins anew."""
    search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with os_errors_as_user_errors(log), open(log, "wb") as complaints:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fastsmart.live.round_worker", str(run)],
            env=os.environ | {"PYTHONPATH": search_path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,
        )
