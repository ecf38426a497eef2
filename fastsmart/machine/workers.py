"""Worker processes of our own: plain Python processes given file descriptors, so that nothing is pickled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def start_worker(module: str, *descriptors: int) -> subprocess.Popen[bytes]:
    """Run `python -m module DESCRIPTORS...` with the descriptors inherited and one thread for its arithmetic.

    The worker finds the modules that this process finds, and no others; the script of this process is not imported
    again. It ignores Ctrl-C, which reaches every process of a terminal: ending it is its parent's matter.
    """
    search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, descriptors)],
            env=os.environ | {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
