"""Training beside the page: a process of its own, of the least priority, that trains a lesson each time it is asked.

There is a lesson to be had where some choices, or another boldness, are new since the last one, so a page that is left
open does not drift. What a kill at any instant leaves of one, of the process or the server, is begun anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastsmart.errors import UserError
from fastsmart.live.session import Session
from fastsmart.live.settings import goal_of
from fastsmart.machine.files import os_errors_as_user_errors
from fastsmart.taste.lessons import Lesson

FIRST_CHOICES = 6  # before the first lesson
NEW_CHOICES = 5  # before another
LOG_FILE = "training.log"
TAUGHT = "training.json"  # the taste of the present lesson
LOOK_EVERY_S = 1.0
AFTER_A_FAILURE_S = 30.0
# oneDNN keeps the code of so many products, by itself of 1,024; each lesson has clips of other lengths, and so others
LEAN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


class Teacher(threading.Thread):
    """A thread that has a process train while there is something to teach.

    doing : "waiting", "training", "paused" or "off"
    error : why the last lesson came to nothing, in a sentence; "" where it did not
    """

    def __init__(self, session: Session) -> None:
        super().__init__(name="teacher", daemon=True)
        self.session = session
        self.doing, self.error = "waiting", ""
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._guard = threading.RLock()  # held while the lessons' folder is changed

    def newest(self) -> tuple[int, str]:
        """Version and place of the policy that is to play: the number of a lesson, 0 = the first policy."""
        last = self._last()
        return (last.number, str(last.policy)) if last else (0, self.session.settings.policy)

    def versions(self) -> list[int]:
        """Policies one can go back to, oldest first."""
        return [0, *(lesson.number for lesson in self.session.folder.lessons.finished())]

    def look(self) -> None:
        """Look now whether there is something to teach."""
        self._wake.set()

    def go_back(self, version: int) -> None:
        """Play an earlier policy; raises UserError for one that is not there. Lessons after it are put aside in their
        folder, not removed."""
        with self._guard:
            if version not in self.versions():
                raise UserError("there is no such policy to go back to")
            self.session.configure(paused=True)
            self.end_process()
            self.session.folder.lessons.go_back(version)
        self.session.forget_after(version)

    def reset(self) -> Path:
        """Begin again, as `Session.reset` does."""
        with self._guard:
            self.end_process()
            return self.session.reset()

    def stop(self) -> None:
        """End the process and the thread; a lesson that has begun is lost, and begun anew by the next server."""
        self._stopped.set()
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
        while not self._stopped.is_set():
            try:
                due = self._is_due()
                failed = due and not self._teach()
            except UserError as error:  # a full disk, a damaged file
                failed = True
                self._tell(str(error))
            if failed:
                self._stopped.wait(AFTER_A_FAILURE_S)  # whatever else happens, or it would fail without a pause
            elif not due:
                self._wake.wait(LOOK_EVERY_S)
                self._wake.clear()

    def _is_due(self) -> bool:
        """Whether there is something new to teach."""
        session, last = self.session, self._last()
        if session.place.paused:
            self._say("paused")
            return False
        count = len(session.judgements())
        told = last and (last.listener, last.goal)
        due = (
            count >= FIRST_CHOICES
            and session.taste is not None
            and (
                last is None
                or told != (session.listener, goal_of(session.place.boldness))
                or abs(count - last.choices) >= NEW_CHOICES
            )
        )
        if not due:
            self._say("waiting")
        return due

    def _last(self) -> Lesson | None:
        return next(reversed(self.session.folder.lessons.finished()), None)

    def _teach(self) -> bool:
        """Have one lesson trained; False where it came to nothing."""
        session, folder = self.session, self.session.folder
        taste = (folder.path / TAUGHT).resolve()
        with self._guard:
            if self._stopped.is_set() or not self._is_due() or (known := session.taste_to_train_on(taste)) is None:
                return True
            self._say("training")
            lesson = folder.lessons.begin(*known)
            if self._process is None:
                self._process = _start(folder.path / LOG_FILE)
            process = self._process
        order = {
            "policy": session.settings.policy,
            "max_tokens": session.settings.max_tokens,
            "seconds": session.settings.seconds,
            "taste": str(taste),
            "goal": lesson.goal,
            "out": str(lesson.path.resolve()),
        }
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


def _start(log: Path) -> subprocess.Popen[str]:
    """The process; it has this one's modules, and neither its terminal nor its Ctrl-C. What it complains of is in the
    log, which begins anew."""
    search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with os_errors_as_user_errors(log), open(log, "wb") as complaints:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fastsmart.live.lesson_worker"],
            env=LEAN | os.environ | {"PYTHONPATH": search_path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,
        )
