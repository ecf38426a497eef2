"""One writer a folder: a lock that names its holder and dies with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fastsmart.errors import UserError

LOCK_FILE = ".lock"
# How long the lock of a machine that has crashed outlives it on a file server: the lease of NFSv4 on Linux is 90 s
LEASE_S = 100.0
_LOOK_EVERY_S = 0.1


class FolderLock:
    """The right to write in `folder`, held from the call of the class until `release` or the end of the process.

    It is a `flock` on an open file, so the kernel takes it back from a process that was killed. Linux hands such locks
    on to an NFS server, which keeps other machines out, too. Where a file system knows no locks, the holder's process
    is looked for, which tells about this machine only.

    doing    : what the holder does, for the message: "training"
    name     : of the lock's file, where it is of one file in the folder only
    patience_s : how long to wait for a holder that cannot be seen to live, as after the crash of another machine

    Raises UserError naming the process that holds the folder, and when the folder cannot be written.
    """

    def __init__(self, folder: Path, doing: str, patience_s: float = 0.0, name: str = LOCK_FILE) -> None:
        self.path, self._doing, self._file = folder / name, doing, -1
        until, waiting = time.monotonic() + patience_s, False
        while not self._take():
            holder = _holder(self.path)
            if _lives_here(holder) or time.monotonic() >= until:
                raise UserError(f"{_named(holder)} in {folder}; {_way_out(holder)}")
            if not waiting:
                waiting = True
                print(
                    f"{_named(holder)} in {folder}, or has died; waiting {patience_s:.0f} s for its lock to go",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(_LOOK_EVERY_S)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others in; nothing is left in the folder."""
        if self._file >= 0:
            with suppress(OSError):
                self.path.unlink()  # while it is held: whoever waits for the old file looks again
            os.close(self._file)
            self._file = -1

    def _take(self) -> bool:
        """Whether the lock is ours now."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)  # children do not inherit it
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; choose a folder you can write to") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = _is_still(handle, self.path)
        except BlockingIOError:
            taken = False
        except OSError:  # a file system without locks
            taken = not _lives_here(_holder(self.path))
        if not taken:
            os.close(handle)
            return False
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now, "doing": self._doing})
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode() + b"\n", 0)
        self._file = handle
        return True


def _is_still(handle: int, path: Path) -> bool:
    """Whether the open file is the one at `path`: a holder that ends removes it."""
    try:
        there, ours = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _holder(path: Path) -> dict[str, Any]:
    """Read what the lock file says of its holder; empty where it says nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(found, dict) and type(found.get("pid")) is int and isinstance(found.get("host"), str)
    return found if whole else {}


def _lives_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine that can be seen to live."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process is writing"
    return f"process {holder['pid']} on host {holder['host']} is {holder.get('doing', 'writing')}"


def _way_out(holder: dict[str, Any]) -> str:
    stop = f" or stop it (kill {holder['pid']} there)" if holder else ""
    return f"wait for it{stop}, or choose another --out"
