"""Tokens to notes, as MidiTok's REMI decodes them. Shape letters: N sequences, T tokens, V vocabulary, M notes.

The policy emits any id anywhere, so the decoder defines a score for every id sequence; it is the score MidiTok 3.1
gives, for music and for garbage alike:

* PAD, BOS, EOS and every other special token take no time and end nothing.
* A note is a Pitch token followed by a Velocity and a Duration token. Any other Pitch, Velocity or Duration is silent.
* Bar starts the next bar one bar length after the start of the present one, whatever the positions reached. Position
  counts from the start of the present bar and may lie beyond its end, so ticks may run backwards from token to token.
* TimeSig holds from its token on, also in the middle of a bar: for the length of this bar and the size of positions
  and durations. The first one holds from tick 0 if no note token comes before it; otherwise the piece starts in 4/4.
* A piece whose first Tempo is not at tick 0 starts in the vocabulary's tempo nearest 120.

Seconds follow the tempo map in the order of ticks; of several tempi at one tick the last given holds. This is what a
player makes of the score's MIDI file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit

from fastsmart.errors import UserError
from fastsmart.limits import require_kind
from fastsmart.notes import NoteBatch
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary, derived

# Kinds of token. OTHER takes no time and changes nothing.
OTHER, BAR, POSITION, PITCH, VELOCITY, DURATION, TEMPO, TIME_SIGNATURE = range(8)
KINDS = {
    "Position": POSITION,
    "Pitch": PITCH,
    "Velocity": VELOCITY,
    "Duration": DURATION,
    "Tempo": TEMPO,
    "TimeSig": TIME_SIGNATURE,
}
MICROSECONDS = 1_000_000


class _Tables(NamedTuple):
    """Meaning of the ids of a vocabulary.

    kind  : uint8 [V]
    value : int32 [V + 1, 4]; Position, Pitch, Velocity: (number); Duration: (numerator, denominator) of a beat;
            Tempo: (microseconds a quarter note); TimeSig: (numerator, denominator, ticks a bar, ticks a beat), and in
            row V the time signature of a piece that gives none
    """

    kind: np.ndarray
    value: np.ndarray
    default_tempo_us: int
    positions_per_beat: int
    ticks_per_beat: int  # of a quarter note


@lru_cache(maxsize=8)
def _tables(vocab: Vocabulary) -> _Tables:
    if stored := derived(vocab.description):
        kind, value, *numbers = stored["decode"]
        return _Tables(np.array(kind, np.uint8), np.array(value, np.int32), *numbers)
    return tables_of_miditok(vocab)


def tables_of_miditok(vocab: Vocabulary) -> _Tables:
    """The tables as MidiTok has them."""
    from miditok.constants import TIME_SIGNATURE as COMMON_TIME
    from miditok.utils import compute_ticks_per_bar
    from symusic import Tempo, TimeSignature

    tokenizer = vocab.tokenizer
    if 0 not in tokenizer.config.use_note_duration_programs:
        raise UserError("the vocabulary's use_note_duration_programs lacks 0, the piano; fastsmart decodes piano notes")

    def time_signature(numerator: int, denominator: int) -> tuple[int, int, int, int]:
        bar = compute_ticks_per_bar(TimeSignature(0, numerator, denominator), tokenizer.time_division)
        return numerator, denominator, bar, tokenizer._tpb_per_ts[denominator]

    def tempo_us(bpm: float) -> int:
        return Tempo(0, bpm).mspq  # whole microseconds, as in MidiTok's scores and in MIDI files

    kind = np.zeros(len(vocab), np.uint8)
    value = np.zeros((len(vocab) + 1, 4), np.int32)
    value[-1] = time_signature(*COMMON_TIME)
    for i, token in enumerate(vocab.tokens):
        name, text = token.split("_", 1)
        kind[i] = BAR if token == "Bar_None" else KINDS.get(name, OTHER)
        if kind[i] in (POSITION, PITCH, VELOCITY):
            value[i, 0] = int(text)
        elif kind[i] == DURATION:
            beats, positions, resolution = (int(x) for x in text.split("."))
            value[i, :2] = beats * resolution + positions, resolution
        elif kind[i] == TEMPO:
            value[i, 0] = tempo_us(float(text))
        elif kind[i] == TIME_SIGNATURE:
            numerator, denominator = (int(x) for x in text.split("/"))
            value[i] = time_signature(numerator, denominator)
    return _Tables(
        kind,
        value,
        tempo_us(float(tokenizer.default_tempo)),
        tokenizer.config.max_num_pos_per_beat,
        tokenizer.time_division,
    )


def decode(
    sequences: TokenBatch | Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    vocab: Vocabulary,
    max_seconds: float | None = None,
) -> NoteBatch:
    """The notes of N token sequences, exactly as MidiTok decodes them (see the top of this module).

    Notes are in the order of their tokens, tempi and time signatures in the order of time. EOS does not end a piece:
    whoever samples cuts there. With `max_seconds`, notes that start at or after it are left out and the seconds of
    those that ring longer are cut (their `duration_tick` stays musical), so `end_s <= max_seconds`.

    Raises UserError for an id outside the vocabulary, or a `max_seconds` that is not above 0; TypeError or ValueError
    naming what are no sequences of ids.
    """
    require_kind(vocab, Vocabulary, "vocab", "a vocabulary, such as that of a policy, policy.vocab")
    require_kind(max_seconds, (int, float, type(None)), "max_seconds", "a number of seconds, or None")
    if isinstance(sequences, str) or not hasattr(sequences, "__iter__"):
        raise TypeError(f"sequences is of type {type(sequences).__name__}; it must be lists of token ids")
    batch = sequences if isinstance(sequences, TokenBatch) else TokenBatch.pack(sequences)
    limit_s = np.inf if max_seconds is None else float(max_seconds)
    if not limit_s > 0:
        raise UserError(f"max_seconds must be above 0, not {max_seconds}")
    _check_ids(batch, vocab)
    tables = _tables(vocab)
    n = len(batch)
    # Upper bounds: three tokens a note; one token a tempo or time signature, and one of each without a token.
    notes = np.empty((len(batch.ids) // 3, 4), np.int32)
    tempi = np.empty((len(batch.ids) + n, 2), np.int32)
    meters = np.empty((len(batch.ids) + n, 3), np.int32)
    note_offsets, tempo_offsets, meter_offsets = offsets = np.zeros((3, n + 1), np.int64)
    _read(batch.ids, batch.offsets, tables, notes, tempi, meters, offsets)
    notes = notes[: note_offsets[-1]]
    tempi = _in_time_order(tempi[: tempo_offsets[-1]], tempo_offsets)
    meters = _in_time_order(meters[: meter_offsets[-1]], meter_offsets)
    start_s, stop_s = _seconds(notes, note_offsets, tempi, tempo_offsets, tables.ticks_per_beat).T
    heard = start_s < limit_s
    note_offsets = np.concatenate([[0], np.cumsum(heard)])[note_offsets]
    notes, start_s, stop_s = notes[heard], start_s[heard], np.minimum(stop_s[heard], limit_s)
    end_s = np.zeros(n)
    np.maximum.at(end_s, np.repeat(np.arange(n), np.diff(note_offsets)), stop_s)
    return NoteBatch(
        onset_s=start_s,
        duration_s=stop_s - start_s,
        pitch=notes[:, 2].astype(np.uint8),
        velocity=notes[:, 3].astype(np.uint8),
        offsets=note_offsets,
        end_s=end_s,
        onset_tick=notes[:, 0].copy(),
        duration_tick=notes[:, 1].copy(),
        ticks_per_beat=tables.ticks_per_beat,
        tempo_tick=tempi[:, 0].copy(),
        tempo_bpm=60 * MICROSECONDS / tempi[:, 1],
        tempo_offsets=tempo_offsets.copy(),
        meter_tick=meters[:, 0].copy(),
        meter=meters[:, 1:].copy(),
        meter_offsets=meter_offsets.copy(),
    )


def _in_time_order(rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The rows of each piece sorted by tick, their first column; rows of one tick keep their order."""
    piece = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return rows[np.lexsort((rows[:, 0], piece))]


def _check_ids(batch: TokenBatch, vocab: Vocabulary) -> None:
    ids = batch.ids
    if len(ids) and (ids.min() < 0 or ids.max() >= len(vocab)):
        at = int(np.flatnonzero((ids < 0) | (ids >= len(vocab)))[0])
        i = int(np.searchsorted(batch.offsets, at, side="right")) - 1
        raise UserError(
            f"token id {ids[at]} (sequence {i}, token {at - batch.offsets[i]}) is outside the vocabulary of "
            f"{len(vocab)} tokens; decode with the vocabulary of the model that made it"
        )


@njit(cache=True, nogil=True)
def _read(
    ids: np.ndarray,
    offsets: np.ndarray,
    tables: _Tables,
    notes: np.ndarray,
    tempi: np.ndarray,
    meters: np.ndarray,
    row_offsets: np.ndarray,
) -> None:
    """Read the tokens into rows with ticks.

    Fills notes (onset, duration, pitch, velocity), tempi (tick, microseconds a quarter note) and meters (tick,
    numerator, denominator), all in the order of tokens, and row_offsets [3, N + 1] of the three.
    """
    kind, value = tables.kind, tables.value
    common_time = np.int32(len(kind))
    m = e = s = 0
    for n in range(len(offsets) - 1):
        first, last = offsets[n], offsets[n + 1]
        first_e, signature = e, common_time
        for t in range(first, last):
            k = kind[ids[t]]
            if k == TIME_SIGNATURE:
                signature = ids[t]
            if k in (TIME_SIGNATURE, PITCH, VELOCITY, DURATION):
                break
        meters[s, 0], meters[s, 1], meters[s, 2] = 0, value[signature, 0], value[signature, 1]
        tempi[e, 0], tempi[e, 1] = 0, tables.default_tempo_us
        s, e = s + 1, e + 1
        tick = bar_tick = 0
        in_bar = has_tempo = False
        for t in range(first, last):
            token = ids[t]
            k, v = kind[token], value[token, 0]
            if k == BAR:
                if in_bar:
                    bar_tick += value[signature, 2]
                in_bar, tick = True, bar_tick
            elif k == POSITION:
                in_bar = True
                tick = bar_tick + v * value[signature, 3] // tables.positions_per_beat
            elif k == PITCH and t + 2 < last and kind[ids[t + 1]] == VELOCITY and kind[ids[t + 2]] == DURATION:
                length = ids[t + 2]
                notes[m, 0] = tick
                notes[m, 1] = value[length, 0] * value[signature, 3] // value[length, 1]
                notes[m, 2], notes[m, 3] = v, value[ids[t + 1], 0]
                m += 1
            elif k == TEMPO:
                if tick == 0 and not has_tempo:
                    e = first_e  # it replaces the default tempo
                has_tempo = True
                tempi[e, 0], tempi[e, 1] = tick, v
                e += 1
            elif k == TIME_SIGNATURE and (v != value[signature, 0] or value[token, 1] != value[signature, 1]):
                signature = token
                meters[s, 0], meters[s, 1], meters[s, 2] = tick, v, value[token, 1]
                s += 1
        row_offsets[0, n + 1], row_offsets[1, n + 1], row_offsets[2, n + 1] = m, e, s


@njit(cache=True, nogil=True)
def _seconds(
    notes: np.ndarray, note_offsets: np.ndarray, tempi: np.ndarray, tempo_offsets: np.ndarray, ticks_per_beat: int
) -> np.ndarray:
    """Start and stop of every note in seconds (float64 [M, 2]) through the tempo map of its piece.

    Sums whole microseconds per tick, so that only the last division rounds.
    """
    seconds = np.empty((len(notes), 2))
    unit = ticks_per_beat * MICROSECONDS
    elapsed = np.zeros(len(tempi), np.int64)  # since the start of the piece, in microseconds / ticks_per_beat
    for n in range(len(note_offsets) - 1):
        first, last = tempo_offsets[n], tempo_offsets[n + 1]
        for e in range(first + 1, last):
            elapsed[e] = elapsed[e - 1] + (tempi[e, 0] - tempi[e - 1, 0]) * np.int64(tempi[e - 1, 1])
        e = first
        for m in range(note_offsets[n], note_offsets[n + 1]):
            for side in range(2):
                tick = notes[m, 0] + side * notes[m, 1]
                while e + 1 < last and tempi[e + 1, 0] <= tick:
                    e += 1
                while tempi[e, 0] > tick:
                    e -= 1
                seconds[m, side] = (elapsed[e] + (tick - tempi[e, 0]) * np.int64(tempi[e, 1])) / unit
    return seconds
