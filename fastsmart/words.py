"""Words of messages: numbers with their nouns, and strangers' texts made safe to print."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 note`, `2 notes`, `1,000 notes`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_one_line(text: str) -> str:
    """A text that may hold a file's name, without what breaks a line or steers a terminal: each such character is
    a question mark. Half characters, as names that are no UTF-8 have, stay for the terminal to show."""
    return "".join(c if c.isprintable() or _is_half(c) else "?" for c in text)


def _is_half(character: str) -> bool:
    return "\udc80" <= character <= "\udcff"  # what Python's surrogateescape makes of a byte
