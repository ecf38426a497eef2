"""A stream without a GPU that knows which threads are on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastsmart.machine.cuda_graph import OwnStream


class WatchedStream(OwnStream):
    """entered : whether this thread is on the stream

    turns : how often work has been put on it in turn
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._place = threading.local()
        self.turns = 0

    @property
    def entered(self) -> bool:
        return getattr(self._place, "depth", 0) > 0

    @contextmanager
    def on(self) -> Iterator[None]:
        self._place.depth = getattr(self._place, "depth", 0) + 1
        try:
            yield
        finally:
            self._place.depth -= 1

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        self.turns += 1
        with super().in_turn():
            yield
