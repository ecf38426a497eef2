"""Memory given back at moments of our choosing."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECT_EVERY, TRIM_EVERY = 50, 10  # steps


@contextmanager
def gc_at_steps() -> Iterator[Callable[[int], None]]:
    """No automatic collection inside the block, which would stop all threads in the middle of a stage.

    Call what it gives with the number of each step that has ended. What is alive at the start is never looked at.
    """

    def collect(step: int) -> None:
        gc.collect(2 if step % COLLECT_EVERY == 0 else 0)
        if step % TRIM_EVERY == 0:
            _trim_heap()

    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def give_back_memory() -> None:
    """Collect all garbage, and have glibc return what is free."""
    gc.collect()
    _trim_heap()


def _trim_heap() -> None:
    """Have glibc return what is free: batches and snapshots of changing sizes leave it in pieces among what is kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
