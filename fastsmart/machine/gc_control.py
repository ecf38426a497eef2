"""Memory given back at moments of our choosing."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECT_EVERY = 50  # steps


@contextmanager
def gc_at_steps() -> Iterator[Callable[[int], None]]:
    """No automatic collection inside the block, which would stop all threads in the middle of a stage.

    Call what it gives with the number of each step that has ended. What is alive at the start is never looked at.
    """

    def collect(step: int) -> None:
        gc.collect(2 if step % COLLECT_EVERY == 0 else 0)
        if step % COLLECT_EVERY == 0:
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


def _trim_heap() -> None:
    """Have glibc return freed memory: what batches and snapshots of changing sizes leave behind piles up there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
