"""How much memory a job adds at its peak, measured in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def peak_in_own_process(script: str, options: Sequence[str]) -> float:
    """The last number that a script prints with these options: what its `added_mib` found."""
    command = [sys.executable, script, *options]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def added_mib(job: Callable[[], object], device: str) -> float:
    """MiB above what was there before, at the highest, while a job runs for the second time.

    On a GPU: what PyTorch has taken from it for both runs, since a recorded graph keeps the memory of the first.
    """
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        job()
        job()
        return (torch.cuda.max_memory_reserved() - before) / 2**20
    job()  # libraries and compilers take memory once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is handed back
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far is forgotten
    before = _status("VmRSS")
    job()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
