"""Words of messages: numbers with their nouns, and strangers' texts made safe to print."""

from __future__ import annotations

import codecs
import io
import sys


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 note`, `2 notes`, `1,000 notes`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_one_line(text: str) -> str:
    """A text that may hold a file's name, without what breaks a line or steers a terminal: each such character is
    a question mark. Half characters, as names that are no UTF-8 have, stay for the terminal to show."""
    return "".join(c if c.isprintable() or _is_half(c) else "?" for c in text)


def _is_half(character: str) -> bool:
    return "\udc80" <= character <= "\udcff"  # what Python's surrogateescape makes of a byte


def write_what_terminals_can_show() -> None:
    """Write a question mark for a character that the encoding of the terminal lacks, and go on."""
    codecs.register_error("fastsmart", _shown_otherwise)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # none where it is closed, others in notebooks
            stream.reconfigure(errors="fastsmart")


def _shown_otherwise(error: UnicodeError) -> tuple[str | bytes, int]:
    """A file name's bytes as they are, a question mark for any other character that cannot be written."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    try:
        return text.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return "?" * len(text), error.end
