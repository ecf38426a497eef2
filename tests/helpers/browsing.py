"""Driving a page whose security policy forbids evaluating strings inside it, as Playwright's own waiting does."""

from __future__ import annotations

from typing import Any

PATIENCE_MS, PAUSE_MS = 10_000, 50


def until(tab: Any, condition: str) -> None:
    """Wait until a JavaScript expression is true in the page; fails after ten seconds."""
    for _ in range(PATIENCE_MS // PAUSE_MS):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(PAUSE_MS)
    raise AssertionError(f"still not so: {condition}")
