"""ABC text to notes, by the ABC reader of symusic, in a process of its own.

The reader is made for tunes that people wrote: one that a model drew can end the process it runs in, and what it says
of a tune it prints. All voices become one piano. Dynamics are read; the accents the reader gives to beats, which are in
no score, are not.
"""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.notagen.patches import split_piece
from fastsmart.notagen.rests import restore_rests
from fastsmart.notes import MIDI_TICKS_PER_BEAT, NoteBatch, piece_of_rows

LONGEST_S = 20.0  # that the reader may take for a tune; one of a thousand bars takes it a tenth of a second
_NUMBER = re.compile(r"V:\s*(\d{1,3})")
_FERMATA = re.compile(r"!(?:inverted)?fermata!")
AS_WRITTEN = ("%%MIDI nobeataccents\n", "%%MIDI chordattack 0\n")
_ONE_NOTE = "X:1\nM:4/4\nL:1/4\nK:C\nC|\n"


def sheet(text: str) -> str:
    """The ABC of a piece as other programs read it: rests restored, without style prompt and countdowns.

    Raises UserError for a text without a body.
    """
    lines = restore_rests(text).splitlines()
    kept = [line for line in lines if not line.startswith("%") or line.startswith("%%")]
    return "\n".join(["X:1", *(line for line in kept if not line.startswith("X:")), ""])


def read_abc(texts: Sequence[str], max_seconds: float | None = None) -> tuple[NoteBatch, list[str]]:
    """The notes of N pieces as NotaGen writes them, or as `sheet` does; and why a piece has none, "" where it was read.

    What starts after `max_seconds` is left out, what rings longer is cut. A piece that cannot be read has no notes.
    """
    reader = _Reader()
    try:
        lead = _notes(reader.ask(_ONE_NOTE))[0][0]  # ticks that this version of the reader begins notes late
        found = [_piece(text, reader, int(lead), max_seconds) for text in texts]
    finally:
        reader.close()
    batches = [batch for batch, _ in found]
    return NoteBatch.concat(batches) if batches else NoteBatch.empty(0), [reason for _, reason in found]


def _piece(text: str, reader: _Reader, lead: int, max_seconds: float | None) -> tuple[NoteBatch, str]:
    try:
        answer = reader.ask(_for_reader(sheet(text)))
        if "error" in answer:
            raise UserError("symusic cannot read this ABC; have another one drawn, or look at its header")
        return _batch(answer, lead, max_seconds), ""
    except UserError as error:
        return NoteBatch.empty(1), str(error)


def _for_reader(text: str) -> str:
    """The tune as the reader understands it, and plays what is written.

    It takes a voice that comes out of order for the first one, so voices are numbered as they come. Each is told to
    leave out accents of beats, and to begin the notes of a chord together. A fermata would hold one voice alone.
    """
    header, body = split_piece(_FERMATA.sub("", text))
    order = list(dict.fromkeys(number for line in header if line.startswith("V:") for number in _NUMBER.findall(line)))
    added = sorted({n for line in body for n in _NUMBER.findall(line)} - set(order), key=int)
    numbers = {number: i for i, number in enumerate(order + added, start=1)}

    def renumbered(line: str) -> str:
        return _NUMBER.sub(lambda match: f"V:{numbers.get(match[1], match[1])}", line)

    tune = []
    for line in header + [f"V:{number}\n" for number in added]:
        if line.startswith("V:"):
            tune += [renumbered(line), *AS_WRITTEN]
        elif not line.startswith("%%score"):  # which says nothing about notes
            tune.append(line)
    return "".join(tune + [renumbered(line) for line in body])


def _notes(answer: dict[str, Any]) -> list[list[int]]:
    return answer.get("notes") or [[0, 0, 0, 0]]


def _batch(answer: dict[str, Any], lead: int, max_seconds: float | None) -> NoteBatch:
    """One piece; times are those of the score, in which a note begins where the one before ends."""
    table = np.array(answer["notes"], np.int64).reshape(-1, 4)
    per_beat = int(answer["ticks_per_beat"])
    if per_beat != MIDI_TICKS_PER_BEAT:
        raise UserError(f"symusic reads ABC at {per_beat} ticks a beat, not at {MIDI_TICKS_PER_BEAT}")
    onset = np.maximum(table[:, 0] - lead, 0)
    end = np.maximum(table[:, 0] + table[:, 1], onset + 1)
    order = np.lexsort((table[:, 2], onset))
    rows = np.column_stack([onset, end - onset, table[:, 2], table[:, 3].clip(1, 127)])[order]
    return piece_of_rows(rows, per_beat, answer["tempi"], answer["meters"], max_seconds=max_seconds)


class _Reader:
    """The process that reads; it starts again after a tune that ends it, or takes it too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, text: str) -> dict[str, Any]:
        """Ask it for a tune; the answer has "error" where it could not read it."""
        if self.process is None:
            command = [sys.executable, "-m", "fastsmart.notagen.abc_reader"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        question, answers = self.process.stdin, self.process.stdout
        assert question is not None
        assert answers is not None
        try:
            question.write(json.dumps(text).encode() + b"\n")
            question.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(answers, selectors.EVENT_READ)
                line = answers.readline() if ready.select(LONGEST_S) else b""
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return {"error": "the reader ended, or took too long"}
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self.process is None:
            return
        self.process.kill()
        self.process.communicate()
        self.process = None
