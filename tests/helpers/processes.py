"""Processes that a test starts and that do not outlive it, whatever happens."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """`subprocess.Popen`, of whose process and its descendants none is left after the block; it can be interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests that are a shell's background job, and its children
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid)
            for member in (*family.children(recursive=True), family):
                with suppress(psutil.NoSuchProcess):
                    member.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()
