"""Files: written so that a reader never finds half of one, to a temporary name, then renamed; and where they are."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from fastsmart.errors import UserError

MOST_READ = 64 * 2**20  # bytes of a configuration, a vocabulary, a file of answers
NAME_KEPT = 48  # characters of a file's name in that of its part: with 4 bytes each still below the usual 255


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A fresh private folder that takes the place of `path` when the block ends without an exception.

    What stood at `path` before stays whole until then, and stays when the block fails. What an earlier process that was
    killed left half-done is cleared away first, and put back where it had only been moved aside. Raises UserError when
    the disk is full or the place cannot be written.
    """
    path = Path(path)
    with os_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_up_after_a_crash(path)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield part
        with os_errors_as_user_errors(path):
            for file in part.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    sync(file)
            part.chmod(0o755)
            _take_place(part, path)
            sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _take_place(part: Path, path: Path) -> None:
    if not path.exists():
        part.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
    path.rename(aside)
    try:
        part.rename(path)
    except OSError:
        aside.rename(path)
        raise
    shutil.rmtree(aside.parent, ignore_errors=True)


def _clear_up_after_a_crash(path: Path) -> None:
    for aside in path.parent.glob(f".{path.name}.old.*"):
        if (aside / path.name).exists() and not path.exists():
            (aside / path.name).rename(path)
    for leftover in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file there takes the place of `path` when the block ends without error.

    What stood at `path` before stays whole until then, and stays when the block fails. Raises UserError when the disk
    is full or the place cannot be written.
    """
    path = Path(path)
    if is_special(path):  # a rename would put a file in the place of the device
        raise UserError(f"cannot write {path}: it is a device or a pipe; name a file")
    # another process or thread may be writing the same; a long name has no room for more
    part = path.with_name(f".{path.name[:NAME_KEPT]}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        with os_errors_as_user_errors(path):
            yield part
            sync(part)
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a small file in one step, text as UTF-8; raises UserError as `atomic_file` does."""
    with atomic_file(path) as part:
        part.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def parse_lines(
    content: bytes, whole: Callable[[dict[str, Any]], bool] = lambda line: True
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of a JSON Lines file that can be read, and the bytes of those that cannot; blank ones are neither.

    A line is an object with a whole number `step`, and `whole` says so, too. A last line without a newline, as a crash
    leaves it, is neither.
    """
    lines, damaged = [], []
    for text in content[: content.rfind(b"\n") + 1].split(b"\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**63 and whole(line):
            lines.append(line)
        else:
            damaged.append(text)
    return lines, damaged


class JsonLines:
    """A file of one JSON object a line, each with its `step`: the metrics of a run.

    whole   : says of an object whether it has what a line must have (see `parse_lines`)
    damaged : lines that could not be read when `lines` was called last; they are left out
    """

    def __init__(self, path: Path, whole: Callable[[dict[str, Any]], bool] = lambda line: True) -> None:
        self.path, self.whole = path, whole
        self.damaged = 0
        self._late: list[str] = []  # lines that found the disk full

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; a number that is not finite is written as null.

        Raises UserError when the disk is full; the line is kept, and written with the next one.
        """
        self._late.append(json.dumps(without_nan(line)) + "\n")
        self.flush()

    def flush(self) -> None:
        """Write lines that found the disk full; raises UserError when it still is."""
        if not self._late:
            return
        with os_errors_as_user_errors(self.path):
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with open(self.path, "a", encoding="utf-8") as sink:
                    sink.write("".join(self._late))
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, size)  # no half a line before the next
                raise
        self._late.clear()

    def lines(self) -> list[dict[str, Any]]:
        """The lines that can be read; a last one cut short by a crash is left out. Raises UserError where there is
        something else than a file."""
        lines, damaged = parse_lines(self._content(), self.whole)
        self.damaged = len(damaged)
        return lines

    def forget_after(self, step: int) -> None:
        """Drop the lines of later steps, which will be run again; all lines for step 0.

        Damaged lines move to a file beside it, `metrics.damaged` of `metrics.jsonl`.
        """
        lines, damaged = parse_lines(self._content(), self.whole)
        self.damaged = len(damaged)
        if damaged:
            with os_errors_as_user_errors(self.aside), open(self.aside, "ab") as sink:
                sink.write(b"".join(text + b"\n" for text in damaged))
        kept = [line for line in lines if step and line["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    @property
    def aside(self) -> Path:
        """File in which `forget_after` keeps damaged lines."""
        return self.path.with_suffix(".damaged")

    @property
    def told(self) -> str:
        """Report of what `lines` could not read, in words; empty where it could."""
        if not self.damaged:
            return ""
        return f"{self.damaged} line{'s' if self.damaged > 1 else ''} of {self.path.name} could not be read"

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; put back the file that was there") from error


def without_nan(value: Any) -> Any:
    """The tree with null where a number is not finite, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


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
        way_out = _WAYS_OUT.get(error.errno or 0, "free some space or choose a folder you can write to")
        raise UserError(f"cannot write {path}: {reason}; {way_out}") from error


_IN_THE_WAY = "something of that name is in the way; move it, or choose another name"
_WAYS_OUT = {
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _IN_THE_WAY),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you can write to"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    errno.ENAMETOOLONG: "choose a shorter name",
}


def make_folder(path: str | Path) -> Path:
    """Create a folder that must be writable; raises UserError where it is not."""
    path = Path(path)
    with os_errors_as_user_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    return path


def read_file(path: str | Path, most: int = MOST_READ) -> bytes:
    """The bytes of a file that someone else may have made; raises OSError where it cannot be read, UserError where it
    is larger than any of its kind, as a device can be, before memory is taken for it."""
    with open(path, "rb") as source:
        content = source.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} is larger than {most / 2**20:g} MiB; name a file of the right kind")
    return content


def cpu_cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def processor() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def mkl_knows_processor() -> bool:
    """Whether MKL has products of its own for this processor; for others than Intel's it keeps to those of AVX2."""
    return "Intel" in processor()


def cache_folder(name: str) -> Path:
    """Folder of what can be made again: FASTSMART_CACHE, else XDG_CACHE_HOME/fastsmart, else ~/.cache/fastsmart."""
    home = os.environ.get("FASTSMART_CACHE")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastsmart")
    return Path(home) / name


def is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, of which one cannot tell how much there is to read."""
    return path.exists() and not path.is_file() and not path.is_dir()


def files_below(names: Iterable[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """The files named, and those of the right kind below the folders named, each with its path below the folder.

    Raises UserError when there are none.
    """
    found: list[tuple[Path, Path]] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.suffix.lower() in suffixes)
            found += sorted((p, p.relative_to(path)) for p in below if not is_special(p))
        elif path.exists():
            if is_special(path):
                raise UserError(f"{name} is neither a file nor a folder")
            found.append((path, Path(path.name)))
        else:
            raise UserError(f"no file {name}")
    if not found:
        raise UserError(f"no files ({', '.join(suffixes)}) in {', '.join(names)}")
    return found
