"""Interleaved ABC text as patches of sixteen characters, and back.

A header line is cut into patches by itself, and so is each bar of a body line: no patch crosses a barline, which begins
the patch after it. A patch that is not full ends with EOS and is filled up with PAD. Shape letters: P patches, C = 16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from fastsmart.errors import UserError
from fastsmart.notagen.model import BOS, CHARACTERS, EOS, PAD, PATCH_CHARS

BARLINES = ("|:", "::", ":|", "[|", "||", "|]", "|")  # the first that fits is one
_BARLINE = re.compile(f"({'|'.join(map(re.escape, BARLINES))})")
BEGIN_PATCH = np.array([BOS] * (PATCH_CHARS - 1) + [EOS], np.uint8)
END_PATCH = np.array([BOS] + [EOS] * (PATCH_CHARS - 1), np.uint8)
COUNTDOWN = "[r:"  # of a body line: how many bars came, and how many are to come


def encode(text: str) -> np.ndarray:
    """A whole piece as patches uint8 [P, C], with the patches of its begin and end; countdowns are written where the
    body has none. Raises UserError for a character that is not ASCII, or a text without a body."""
    header, body = split_piece(text)
    if not body[0].startswith(COUNTDOWN):
        body = [f"{COUNTDOWN}{i}/{len(body) - 1 - i}]{line}" for i, line in enumerate(body)]
    chunks = [chunk for line in header for chunk in _cut(line)]
    chunks += [chunk for line in body for bar in _bars(line) for chunk in _cut(bar)]
    return np.concatenate([BEGIN_PATCH[None], _filled(chunks), END_PATCH[None]])


def encode_prompt(lines: Sequence[str]) -> np.ndarray:
    """Header lines that a piece begins with, as patches uint8 [P, C], after that of its begin."""
    return np.concatenate([BEGIN_PATCH[None], _filled([chunk for line in lines for chunk in _cut(f"{line}\n")])])


def encode_open(text: str) -> tuple[np.ndarray, np.ndarray]:
    """A piece that is to go on: its patches uint8 [P, C], and the characters uint8 of the one it breaks off in."""
    header, body = split_piece(text)
    if not text.endswith("\n"):
        body[-1] = body[-1].removesuffix("\n")
    bars = [bar for line in body for bar in _bars(line)]
    chunks = [chunk for line in header for chunk in _cut(line)]
    chunks += [chunk for bar in bars[:-1] for chunk in _cut(bar)]
    last = [bars[-1][i : i + PATCH_CHARS] for i in range(0, len(bars[-1]), PATCH_CHARS)]
    begun = last.pop() if len(last[-1]) < PATCH_CHARS else ""
    return np.concatenate([BEGIN_PATCH[None], _filled(chunks + last)]), _ids(begun)


def decode(patches: np.ndarray) -> str:
    """Text of patches uint8 [P, C]: of each up to its EOS; BOS and PAD are no text."""
    written = []
    for patch in patches:
        ends = np.flatnonzero(patch == EOS)
        kept = patch[: ends[0]] if len(ends) else patch
        written.append(kept[kept > EOS].tobytes().decode("ascii", "replace"))
    return "".join(written)


def is_end(patch: np.ndarray) -> bool:
    """Whether this patch [C] ends the piece."""
    return bool(patch[0] == BOS and patch[1] == EOS)


def split_piece(text: str) -> tuple[list[str], list[str]]:
    """Lines of the header and of the body, each with its newline; the body begins with the first line of voices.

    Raises UserError where there is none.
    """
    lines = [f"{line}\n" for line in text.split("\n") if line]
    first = next((i for i, line in enumerate(lines) if line.startswith(COUNTDOWN) or "[V:" in line), None)
    if first is None:
        raise UserError("the ABC has no line of bars such as [V:1]CDEF|; write each bar of all voices in one line")
    return lines[:first], lines[first:]


def _bars(line: str) -> list[str]:
    """The bars of a body line, each with the barline before it; what is no voice at its end belongs to the last."""
    parts = [part for part in _BARLINE.split(line) if part]
    start = 0 if parts[0] in BARLINES else 1
    bars = parts[:start] + ["".join(parts[i : i + 2]) for i in range(start, len(parts), 2)]
    if len(bars) > 1 and "V" not in bars[-1]:
        bars[-2:] = [bars[-2] + bars[-1]]
    return bars


def _cut(text: str) -> list[str]:
    """Chunks of sixteen characters; a shorter last one ends with EOS."""
    if len(text) % PATCH_CHARS:
        text += chr(EOS)
    return [text[i : i + PATCH_CHARS] for i in range(0, len(text), PATCH_CHARS)]


def _filled(chunks: Sequence[str]) -> np.ndarray:
    patches = np.full((len(chunks), PATCH_CHARS), PAD, np.uint8)
    for patch, chunk in zip(patches, chunks, strict=True):
        patch[: len(chunk)] = _ids(chunk)
    return patches


def _ids(text: str) -> np.ndarray:
    for character in text:
        if ord(character) >= CHARACTERS:
            raise UserError(f"the ABC has the character {character!r}, NotaGen knows ASCII only; write it otherwise")
    return np.frombuffer(text.encode("ascii"), np.uint8)
