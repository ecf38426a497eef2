"""A phrase of the listener's own, and how the policy goes on from it: several ways, note by note as they are drawn."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.live.player import Player
from fastsmart.live.session import ANSWER, Session
from fastsmart.live.sound import LONGEST_S, notes_of
from fastsmart.machine.files import write_atomic
from fastsmart.notes import LARGEST_BYTES, NoteBatch
from fastsmart.study.sound import note_rows
from fastsmart.taste import Clip
from fastsmart.tokens.decode import decode
from fastsmart.tokens.phrase import phrase
from fastsmart.tokens.token_batch import TokenBatch

PHRASE_FILE = "phrase.mid"
WAYS = 4  # in which a phrase is continued at once
LONGEST_PHRASE_S = LONGEST_S / 2
MOST_PLAYED = 2000  # notes of a phrase from a keyboard
TEMPI = (30, 240)  # bpm a phrase from a keyboard can have


class Phrase:
    """The prompt that a phrase makes.

    name  : what the listener's file is called
    bars  : of it that are taken; 0 = all
    ids   : int32 [K], its tokens
    notes : as the policy reads them, a NoteBatch of one piece
    """

    def __init__(self, path: Path, name: str, player: Player, tokens: int, bars: int = 0) -> None:
        """Read it; raises UserError that calls the file by the listener's name for it."""
        try:
            self.ids = phrase(path, player.vocab, 1, player.room - tokens, bars).row(0)
        except UserError as error:
            words = str(error).replace(str(path), name).replace("--max-tokens", "its answer")
            words = words.replace("take its beginning with --bars", "choose how many bars of it to take")
            words = words.replace("take fewer --bars, or ask for fewer tokens", "choose fewer bars")
            words = words.replace("take fewer --bars", "choose fewer bars")
            raise UserError(words) from error
        self.name, self.bars = name, bars
        self.notes = decode(TokenBatch.pack([self.ids]), player.vocab)
        if self.end_s > LONGEST_PHRASE_S:
            raise UserError(f"cannot continue {name}: it lasts longer than {LONGEST_PHRASE_S:g} s; take fewer bars")

    @property
    def end_s(self) -> float:
        """Where its last note ends."""
        return float(self.notes.end_s[0])


class Answers:
    """Continues one phrase at a time and tells every note the moment it is drawn.

    error   : why the last answer came to nothing, in a sentence; "" where it did not
    publish : told "notes" for each part: id of the clip, its new notes as [onset s, duration s, pitch, velocity]. A
              duration holds unless the tempo changes before it is over
    """

    def __init__(self, session: Session, player: Player, tokens: int, seconds: float, publish: Any) -> None:
        self.session, self.player, self.publish = session, player, publish
        self._tokens, self._seconds = tokens, seconds
        self._lock, self._turn, self._beginning = threading.Lock(), 0, False
        self.phrase: Phrase | None = None
        self.error = ""

    def take(self, content: bytes, name: str, bars: int = 0) -> None:
        """Take a MIDI file for the phrase; raises UserError for one that cannot be continued, and the phrase before
        stays."""
        if len(content) > LARGEST_BYTES:
            raise UserError(f"{name} is larger than {LARGEST_BYTES / 2**20:g} MiB; choose a MIDI file of a piece")
        path = self.session.folder.path / PHRASE_FILE
        part = path.with_name(f".{PHRASE_FILE}.{uuid.uuid4().hex}")
        try:
            write_atomic(part, content)
            self.phrase = Phrase(part, name, self.player, self._tokens, bars)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def take_played(self, rows: Sequence[Sequence[float]], bpm: float) -> None:
        """Take what was played on a keyboard, [onset s, duration s, pitch, velocity] each; raises UserError for what
        cannot be played."""
        self.take(played_notes(rows, bpm).midi_bytes(0), "what you played")

    def warm(self) -> None:
        """Load what the first phrase would else have to wait for: MidiTok takes seconds."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / PHRASE_FILE
            notes_of([(0.0, 0.5, 60, 80)], 120.0).to_midi(0, path)
            Phrase(path, path.name, self.player, self._tokens)

    def drop(self) -> None:
        """Forget the phrase."""
        with self._lock:
            self._turn += 1
        self.phrase = None
        (self.session.folder.path / PHRASE_FILE).unlink(missing_ok=True)
        self.session.end_phrase()

    def go_on(self) -> None:
        """Answer again, in a thread of its own, where all answers have been heard."""
        with self._lock:
            heard_all = bool(self.session.place.phrase) and self.session.place.pair is None
            if self.phrase is None or self._beginning or not heard_all:
                return
            self._beginning = True
        self.begin()

    def begin(self) -> None:
        """Answer in a thread of its own."""
        threading.Thread(target=self._answer_or_say, name="answer", daemon=True).start()

    def _answer_or_say(self) -> None:
        try:
            self.error = ""
            self.answer()
        except UserError as error:
            self.error = str(error)
            self.session.changed()
        finally:
            self._beginning = False

    def answer(self) -> None:
        """Continue the phrase in several ways, of which the session plays the first two; returns when all have ended,
        or when another answer has begun."""
        if (asked := self.phrase) is None:
            return
        with self._lock:
            self._turn += 1
            turn = self._turn
        ids = tuple(f"{ANSWER}{uuid.uuid4().hex[:12]}" for _ in range(WAYS))
        self.session.begin_answers(ids, asked.bars)
        self._beginning = False
        version, told = self.player.version, [int(asked.notes.counts[0])] * WAYS
        limit_s = asked.end_s + self._seconds
        seed = uuid.uuid4().int % 2**31
        notes = asked.notes
        pieces: list[np.ndarray] = []
        for pieces in self.player.play([asked.ids] * WAYS, self._tokens, (seed,), urgent=True):
            notes = decode(TokenBatch.pack(pieces), self.player.vocab, limit_s)
            for i, id in enumerate(ids):
                rows = list(note_rows(notes, i))
                if len(rows) > told[i]:
                    self.publish("notes", {"id": id, "notes": rows[told[i] :]})
                    told[i] = len(rows)
            if self._turn != turn:
                return
            if (notes.end_s >= limit_s).all():
                break
        self.session.add(Clip.of(id, pieces[i], len(asked.ids), notes.select([i]), version) for i, id in enumerate(ids))


def played_notes(rows: Sequence[Sequence[float]], bpm: float) -> NoteBatch:
    """Notes from a keyboard as one piece that begins with the first of them; raises UserError for what is none."""
    if not isinstance(bpm, int | float) or not TEMPI[0] <= bpm <= TEMPI[1]:
        raise UserError(f"a tempo is a number from {TEMPI[0]} to {TEMPI[1]} beats a minute")
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_PLAYED:
        raise UserError(f"a phrase has from 1 to {MOST_PLAYED:,} notes; play again")
    found = []
    for row in rows:
        sound = isinstance(row, list) and len(row) == 4 and all(type(x) in (int, float) for x in row)
        sound = sound and 0 <= row[0] <= LONGEST_S and 0 < row[1] <= LONGEST_S
        if not (sound and 0 <= row[2] <= 127 and 0 <= row[3] <= 127):
            raise UserError("a note is an onset and a duration in seconds, a pitch and a velocity; play again")
        found.append((float(row[0]), float(row[1]), int(row[2]), max(int(row[3]), 1)))
    first = min(row[0] for row in found)
    return notes_of([(onset - first, *rest) for onset, *rest in found], float(bpm))  # type: ignore[misc]
