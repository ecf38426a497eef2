"""`NoteBatch`: the notes of N pieces, and their way to and from MIDI files.

Shape letters: N pieces, M notes of all pieces together, E tempo events, S time signatures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.limits import require_kind
from fastsmart.machine.files import read_file, write_atomic

if TYPE_CHECKING:
    import mido  # imported where files are read and written: training needs none

DEFAULT_BPM = 120.0
MIDI_TICKS_PER_BEAT = 480  # of the files we write; a multiple of every resolution the tokenizer uses
DRUM_CHANNEL = 9
SUSTAIN_CONTROL = 64
PEDAL_DOWN = 64  # values of the controller from here on
MIDI_SUFFIXES = (".mid", ".midi", ".kar")
_KEY_SIGNATURE, _C_MAJOR = re.compile(rb"\xff\x59\x02..", re.DOTALL), b"\xff\x59\x02\0\0"
LARGEST_BYTES = 8 * 2**20  # of a MIDI file: hours of the densest music; what it holds takes a hundred times the memory
MAX_DENOMINATOR = 1024  # a time signature beyond it is a damaged byte (the file holds its logarithm), and inaudible


@dataclass(frozen=True)
class Pedals:
    """Sustain pedals of N pieces, as compressed sparse rows like the notes; C changes of all pieces together.

    tick, second : int32 and float64 [C], when the pedal goes down or up, sorted within a piece
    down         : bool [C]
    offsets      : int64 [N + 1]
    """

    tick: np.ndarray
    second: np.ndarray
    down: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def none(pieces: int) -> Pedals:
        """Pieces without pedal."""
        return Pedals(np.zeros(0, np.int32), np.zeros(0), np.zeros(0, bool), np.zeros(pieces + 1, np.int64))

    def rows(self, i: int) -> slice:
        """The slice of the arrays that belongs to piece i."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    def select(self, pieces: np.ndarray) -> Pedals:
        """The pedals of the named pieces, int64, in that order."""
        return Pedals(**_selected(self, _PEDAL_ROWS, pieces))


@dataclass(frozen=True)
class NoteBatch:
    """Notes of N pieces as compressed sparse rows: notes `offsets[i]:offsets[i + 1]` belong to piece i.

    Notes of a piece are in the order the tokens (or the MIDI file) gave them, which need not be sorted by onset.

    onset_s, duration_s : float64 [M], seconds
    pitch, velocity     : uint8 [M], MIDI numbers, velocity 1-127
    offsets             : int64 [N + 1]
    end_s               : float64 [N], where the piece ends in seconds: its last note end, 0 where it has no notes
    onset_tick, duration_tick : int32 [M], the same notes in musical time
    ticks_per_beat      : ticks in a quarter note, for every `*_tick` array
    tempo_tick, tempo_bpm, tempo_offsets : int32 [E], float64 [E], int64 [N + 1]: tempo map, quarter notes a minute,
                          each piece sorted by tick; 120 before the first event, the last of one tick holds
    meter_tick, meter, meter_offsets     : int32 [S], int32 [S, 2] (numerator, denominator), int64 [N + 1], sorted
    pedals : sustain pedals, which MIDI files have and policies do not play; None where no piece has any
    """

    onset_s: np.ndarray
    duration_s: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    offsets: np.ndarray
    end_s: np.ndarray
    onset_tick: np.ndarray
    duration_tick: np.ndarray
    ticks_per_beat: int
    tempo_tick: np.ndarray
    tempo_bpm: np.ndarray
    tempo_offsets: np.ndarray
    meter_tick: np.ndarray
    meter: np.ndarray
    meter_offsets: np.ndarray
    pedals: Pedals | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """Notes in each piece, int64 [N]."""
        return np.diff(self.offsets)

    def rows(self, i: int) -> slice:
        """The slice of the note arrays that belongs to piece i."""
        return slice(int(self.offsets[i]), int(self.offsets[i + 1]))

    @staticmethod
    def empty(pieces: int) -> NoteBatch:
        """A batch of pieces without notes."""
        none, offsets = np.empty(0), np.zeros(pieces + 1, np.int64)
        ticks, numbers = none.astype(np.int32), none.astype(np.uint8)
        meters = np.empty((0, 2), np.int32)
        return NoteBatch(
            none, none, numbers, numbers, offsets, np.zeros(pieces), ticks, ticks, MIDI_TICKS_PER_BEAT,
            ticks, none, offsets, ticks, meters, offsets,
        )  # fmt: skip

    def select(self, pieces: Sequence[int] | np.ndarray) -> NoteBatch:
        """A batch of the named pieces in that order, or of those where a mask bool [N] is true."""
        pieces = np.arange(len(self))[list(pieces)]
        pedals = self.pedals.select(pieces) if self.pedals else None
        return replace(self, **_selected(self, _ROWS, pieces), end_s=self.end_s[pieces], pedals=pedals)

    @staticmethod
    def concat(batches: Sequence[NoteBatch]) -> NoteBatch:
        """One batch of all pieces in order; all must share `ticks_per_beat`."""
        if len({b.ticks_per_beat for b in batches}) != 1:
            raise ValueError("concat needs at least one batch, and one ticks_per_beat for all of them")
        pedals = None
        if any(b.pedals for b in batches):
            pedals = Pedals(**_joined([b.pedals or Pedals.none(len(b)) for b in batches], _PEDAL_ROWS))
        end_s = np.concatenate([b.end_s for b in batches])
        return replace(batches[0], **_joined(batches, _ROWS), end_s=end_s, pedals=pedals)

    @staticmethod
    def single(
        onset_s: np.ndarray,
        duration_s: np.ndarray,
        pitch: np.ndarray,
        velocity: np.ndarray,
        ticks: tuple[np.ndarray, np.ndarray],
        ticks_per_beat: int,
        tempi: tuple[np.ndarray, np.ndarray],
        meters: tuple[np.ndarray, np.ndarray],
        *,
        pedals: Pedals | None = None,
        end_s: float | None = None,
    ) -> NoteBatch:
        """A batch of one piece, from arrays of any dtype.

        ticks  : onset and duration of each note
        tempi  : ticks [E], quarter notes a minute [E]
        meters : ticks [S], numerators and denominators [S, 2]
        end_s  : None = where the last note ends
        """
        end_s = float((onset_s + duration_s).max(initial=0.0)) if end_s is None else end_s
        offsets, tempo_offsets, meter_offsets = (np.array([0, len(x)], np.int64) for x in (pitch, tempi[0], meters[0]))
        numbers = pitch.astype(np.uint8), velocity.astype(np.uint8)
        onset_tick, duration_tick, tempo_tick, meter_tick, meter = (
            x.astype(np.int32) for x in (*ticks, tempi[0], *meters)
        )
        return NoteBatch(
            onset_s, duration_s, *numbers, offsets, np.array([end_s]), onset_tick, duration_tick, ticks_per_beat,
            tempo_tick, tempi[1], tempo_offsets, meter_tick, meter, meter_offsets, pedals,
        )  # fmt: skip

    def to_midi(self, i: int, path: str | Path) -> None:
        """Write piece i as a one-track MIDI file with its tempo map, time signatures and sustain pedal.

        MIDI cannot say which of two notes of one pitch ends when both sound; readers end the one that began first.

        Raises UserError when the file cannot be written.
        """
        require_kind(path, (str, Path), "path", "the name of a file")
        write_atomic(path, self.midi_bytes(i))

    def midi_bytes(self, i: int) -> bytes:
        """Content of the file that `to_midi` writes."""
        import mido

        if not 0 <= i < len(self):
            raise IndexError(f"piece {i} of a batch of {len(self)}")
        scale = MIDI_TICKS_PER_BEAT // self.ticks_per_beat
        if scale * self.ticks_per_beat != MIDI_TICKS_PER_BEAT:
            scale = 1
        file = mido.MidiFile(ticks_per_beat=self.ticks_per_beat * scale)
        # (tick, rank, message): at one tick meta events come first, note ends before note starts
        events: list[tuple[int, int, mido.Message | mido.MetaMessage]] = []
        for e in range(int(self.tempo_offsets[i]), int(self.tempo_offsets[i + 1])):
            tempo = mido.bpm2tempo(float(self.tempo_bpm[e]))
            events.append((int(self.tempo_tick[e]), 0, mido.MetaMessage("set_tempo", tempo=tempo)))
        for s in range(int(self.meter_offsets[i]), int(self.meter_offsets[i + 1])):
            numerator, denominator = (int(x) for x in self.meter[s])
            message = mido.MetaMessage("time_signature", numerator=numerator, denominator=denominator)
            events.append((int(self.meter_tick[s]), 0, message))
        for m in range(int(self.offsets[i]), int(self.offsets[i + 1])):
            start, pitch = int(self.onset_tick[m]), int(self.pitch[m])
            end = start + max(int(self.duration_tick[m]), 1)
            on = mido.Message("note_on", note=pitch, velocity=int(self.velocity[m]))
            events.append((start, 2, on))
            events.append((end, 1, mido.Message("note_off", note=pitch, velocity=0)))
        if self.pedals:
            rows = self.pedals.rows(i)
            for at, down in zip(self.pedals.tick[rows], self.pedals.down[rows], strict=True):
                pedal = mido.Message("control_change", control=SUSTAIN_CONTROL, value=127 if down else 0)
                events.append((int(at), 1, pedal))
        events.sort(key=lambda event: event[:2])
        track = mido.MidiTrack()
        file.tracks.append(track)
        now = 0
        for tick, _, message in events:
            track.append(message.copy(time=(tick - now) * scale))
            now = tick
        content = BytesIO()
        file.save(file=content)
        return content.getvalue()


def read_midi(path: str | Path, max_seconds: float | None = None) -> NoteBatch:
    """Notes of one MIDI file, all channels but drums, as a batch of one piece.

    A note-off ends the earliest sounding note of its channel and pitch; what is never ended is dropped. The sustain
    pedal is down while that of any channel is. With `max_seconds`, notes that start later are left out and notes that
    ring longer are cut. Data bytes above 127 count as 127, and key signatures, which are not heard, may be any.

    Raises UserError naming the file when it is missing, truncated or not MIDI.
    """
    file = parse_midi(path)
    if not file.tracks:
        raise UserError(f"cannot read {path} as MIDI: it has no tracks")
    if file.type == 2 or file.ticks_per_beat <= 0:
        timing = f"type {file.type}, division {file.ticks_per_beat}"
        raise UserError(f"{path} uses MIDI timing fastsmart does not read ({timing}); save it as type 0 or 1 in beats")

    tick, notes, tempi, meters, pedals = _events(file)
    if tick > np.iinfo(np.int32).max:
        raise UserError(f"{path} is not a sound MIDI file: it lasts {tick} ticks")
    notes.sort()
    return piece_of_rows(notes, file.ticks_per_beat, tempi, meters, pedals, max_seconds)


def piece_of_rows(
    notes: Sequence[Sequence[int]] | np.ndarray,
    ticks_per_beat: int,
    tempi: Sequence[tuple[int, float]],
    meters: Sequence[tuple[int, int, int]],
    pedals: Sequence[tuple[int, bool]] = (),
    max_seconds: float | None = None,
) -> NoteBatch:
    """A batch of one piece from its rows, as `_events` gives them; cut at `max_seconds` as `read_midi` does."""
    table, meter = np.array(notes, np.int64).reshape(-1, 4), np.array(meters, np.int64).reshape(-1, 3)
    tempo = np.array([t for t, _ in tempi], np.int64), np.array([b for _, b in tempi], np.float64)
    onset_s = ticks_to_seconds(table[:, 0], ticks_per_beat, *tempo)
    end_s = ticks_to_seconds(table[:, 0] + table[:, 1], ticks_per_beat, *tempo)
    if max_seconds is not None:
        keep = onset_s < max_seconds
        table, onset_s, end_s = table[keep], onset_s[keep], np.minimum(end_s[keep], max_seconds)
    changes = None
    if pedals:
        at, down = np.array([t for t, _ in pedals], np.int32), np.array([down for _, down in pedals], bool)
        seconds = ticks_to_seconds(at, ticks_per_beat, *tempo)
        changes = Pedals(at, seconds, down, np.array([0, len(pedals)], np.int64))
    onset, duration, pitch, velocity = table.T
    return NoteBatch.single(
        *(onset_s, end_s - onset_s, pitch, velocity, (onset, duration), ticks_per_beat, tempo),
        (meter[:, 0], meter[:, 1:]),
        pedals=changes,
        end_s=float(end_s.max(initial=0.0)),
    )


def _events(
    file: mido.MidiFile,
) -> tuple[
    int, list[tuple[int, int, int, int]], list[tuple[int, float]], list[tuple[int, int, int]], list[tuple[int, bool]]
]:
    """Read the last tick of a file, its notes (onset tick, duration ticks, pitch, velocity), tempi (tick, bpm), meters
    (tick, numerator, denominator) and pedal changes (tick, down), in the order in which they end or come."""
    import mido

    notes: list[tuple[int, int, int, int]] = []  # onset tick, duration ticks, pitch, velocity
    tempi: list[tuple[int, float]] = []
    meters: list[tuple[int, int, int]] = []
    pedals: list[tuple[int, bool]] = []
    channels_down: set[int] = set()
    sounding: dict[tuple[int, int], list[tuple[int, int]]] = {}
    tick = 0
    for message in mido.merge_tracks(file.tracks):
        tick += message.time
        if message.type == "set_tempo":
            tempi.append((tick, mido.tempo2bpm(max(message.tempo, 1))))
        elif message.type == "time_signature" and message.denominator <= MAX_DENOMINATOR:
            meters.append((tick, message.numerator, message.denominator))
        elif message.type in ("note_on", "note_off") and message.channel != DRUM_CHANNEL:
            key = (message.channel, message.note)
            if message.type == "note_on" and message.velocity > 0:
                sounding.setdefault(key, []).append((tick, message.velocity))
            elif sounding.get(key):
                onset, velocity = sounding[key].pop(0)
                notes.append((onset, tick - onset, message.note, velocity))
        elif message.is_cc(SUSTAIN_CONTROL) and message.channel != DRUM_CHANNEL:
            was_down = bool(channels_down)
            (channels_down.add if message.value >= PEDAL_DOWN else channels_down.discard)(message.channel)
            if bool(channels_down) != was_down:
                pedals.append((tick, not was_down))
    return tick, notes, tempi, meters, pedals


def parse_midi(path: str | Path) -> mido.MidiFile:
    """A MIDI file as mido reads it, data bytes above 127 as 127; raises UserError as `read_midi` does."""
    import mido

    try:
        content = read_file(path, LARGEST_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        try:
            return mido.MidiFile(file=BytesIO(content), clip=True)
        except mido.KeySignatureError:  # mido refuses keys it cannot name
            return mido.MidiFile(file=BytesIO(_KEY_SIGNATURE.sub(_C_MAJOR, content)), clip=True)
    except EOFError as error:
        raise UserError(f"cannot read {path} as MIDI: it ends too early") from error
    # OSError is mido's own here: nothing is read from the disk
    except (OSError, ValueError, IndexError, KeyError, mido.KeySignatureError) as error:
        reason = "a damaged event" if isinstance(error, IndexError | KeyError) else str(error) or "it ends too early"
        raise UserError(f"cannot read {path} as MIDI: {reason}") from error


def ticks_to_seconds(
    ticks: np.ndarray, ticks_per_beat: int, tempo_tick: np.ndarray, tempo_bpm: np.ndarray
) -> np.ndarray:
    """Seconds (float64) of integer ticks through a tempo map sorted by tick; `DEFAULT_BPM` before its first event."""
    at = np.concatenate([[0], tempo_tick]).astype(np.float64)
    seconds_per_tick = 60.0 / (np.concatenate([[DEFAULT_BPM], tempo_bpm]) * ticks_per_beat)
    at_s = np.concatenate([[0.0], np.cumsum(np.diff(at) * seconds_per_tick[:-1])])
    segment = np.searchsorted(at, ticks, side="right") - 1
    return at_s[segment] + (ticks - at[segment]) * seconds_per_tick[segment]


_ROWS = {  # offsets of compressed sparse rows -> the arrays that have these rows
    "offsets": ("onset_s", "duration_s", "pitch", "velocity", "onset_tick", "duration_tick"),
    "tempo_offsets": ("tempo_tick", "tempo_bpm"),
    "meter_offsets": ("meter_tick", "meter"),
}
_PEDAL_ROWS = {"offsets": ("tick", "second", "down")}


def _selected(batch: object, rows_of: Mapping[str, tuple[str, ...]], pieces: np.ndarray) -> dict[str, Any]:
    """Arrays and offsets of the named pieces, int64, in that order."""
    found = {}
    for name, arrays in rows_of.items():
        offsets = getattr(batch, name)
        counts = offsets[pieces + 1] - offsets[pieces]
        found[name] = new = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.arange(new[-1]) - np.repeat(new[:-1] - offsets[pieces], counts)
        found |= {array: getattr(batch, array)[rows] for array in arrays}
    return found


def _joined(batches: Sequence[object], rows_of: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Arrays and offsets of all pieces in order."""
    found = {}
    for name, arrays in rows_of.items():
        counts = np.concatenate([np.diff(getattr(b, name)) for b in batches])
        found[name] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        found |= {array: np.concatenate([getattr(b, array) for b in batches]) for array in arrays}
    return found
