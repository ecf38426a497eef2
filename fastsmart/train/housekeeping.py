"""Garbage collection at moments of our choosing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECT_EVERY = 50  # steps


@contextmanager
def collections_at_steps() -> Iterator[Callable[[int], None]]:
    """No automatic collection inside the block, which would stop all threads in the middle of a stage.

    Call what it gives with the number of each step that has ended. What is alive at the start is never looked at.
    """

    def collect(step: int) -> None:
        gc.collect(2 if step % COLLECT_EVERY == 0 else 0)

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
