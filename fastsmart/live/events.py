"""News for every open page, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

MOST_PAGES = 32
MOST_WAITING = 2000  # events that a page may be behind before it is let go; it then connects anew
BEAT_S = 15.0  # between signs of life, which tell a page that has gone


class Events:
    """Sends what is published, from any thread, to all who listen."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pages: set[asyncio.Queue[str | None]] = set()
        self._closed = False

    def begin(self) -> None:
        """Take the running event loop for its own; before that, nobody listens."""
        self._loop = asyncio.get_running_loop()

    def publish(self, kind: str, content: Any) -> None:
        """Tell all pages."""
        if self._loop is not None and not self._loop.is_closed():
            text = f"event: {kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n"
            self._loop.call_soon_threadsafe(self._hand_out, text)

    def close(self) -> None:
        """Let all pages go."""
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, None)

    @property
    def full(self) -> bool:
        """Whether no further page can listen."""
        return len(self._pages) >= MOST_PAGES

    async def listen(self, first: Any) -> AsyncIterator[str]:
        """The text of an event stream that begins with the state `first`; ends when the page is too far behind."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(MOST_WAITING)
        self._pages.add(queue)
        try:
            yield f"retry: 1000\nevent: state\ndata: {json.dumps(first, separators=(',', ':'))}\n\n"
            while not self._closed:
                try:
                    text = await asyncio.wait_for(queue.get(), BEAT_S)
                except TimeoutError:
                    text = ": still here\n\n"
                if text is None:
                    return
                yield text
        finally:
            self._pages.discard(queue)

    def _hand_out(self, text: str | None) -> None:
        for queue in list(self._pages):
            behind = queue.full()
            while behind and not queue.empty():
                queue.get_nowait()
            queue.put_nowait(None if behind else text)
