"""Writing so that a reader never finds half of it: to a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastsmart.errors import UserError


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A fresh private folder that takes the place of `path` when the block ends without an exception.

    What stood at `path` before stays whole until then, and stays when the block fails. Raises UserError when the disk
    is full or the place cannot be written.
    """
    path = Path(path)
    with os_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with os_errors_as_user_errors(path):
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    sync(file)
            part.chmod(0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                path.rename(old / path.name)
                part.rename(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                part.rename(path)
            sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_atomic(path: str | Path, text: str) -> None:
    """Write a small text file in one step; raises UserError when the disk is full or the place cannot be written."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os_errors_as_user_errors(path):
            part.write_text(text, encoding="utf-8")
            sync(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Push a file or folder to the disk (where the file system can)."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside the block into one sentence about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose a folder you can write to"
        ) from error


def make_folder(path: str | Path) -> Path:
    """Create a folder that must be writable; raises UserError where it is not."""
    path = Path(path)
    with os_errors_as_user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    return path


def cpu_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
