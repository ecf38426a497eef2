"""Leaving a long job politely: the first SIGINT or SIGTERM asks it to save and stop, a second one stops it at once.

The first signal ends the job, not the process: a script that calls `fastsmart.train` goes on behind that line, with the
next run of a loop for example, unless it looks at `Run.exit_code`, which is then 128 + the signal's number.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StopRequest:
    """`signal_number` is 0 until somebody asks the job to stop; the job looks at it between two steps."""

    signal_number: int = 0

    def __bool__(self) -> bool:
        return self.signal_number != 0

    @property
    def exit_code(self) -> int:
        """128 + signal, as a shell reports it; 0 when nobody asked."""
        return 128 + self.signal_number if self.signal_number else 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block (in the main thread; elsewhere the request stays empty)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, _frame: object) -> None:
        if request:
            raise KeyboardInterrupt
        request.signal_number = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
