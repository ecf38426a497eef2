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
        if step % COLLECT_EVERY == 0:
            give_back_memory()
        else:
            gc.collect(0)

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
    """Collect all garbage, and have glibc return what is free.

    Batches and snapshots of changing sizes leave that in pieces between what is kept, where it piles up.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
