"""A phrase of one's own, a MIDI file, as what the policy is asked to continue."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch, read_midi
from fastsmart.tokens.dataset import encode_midi
from fastsmart.tokens.prompts import Prompts
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

BEATS_A_BAR = 12  # at most, of the time signatures that policies know
MOST_NOTES = 100_000  # far more than any policy holds


def phrase(path: str | Path, vocab: Vocabulary, n: int, longest: int, bars: int = 0) -> Prompts:
    """n times the same prompt: the notes of a MIDI file, tokenised by MidiTok as the pieces a policy is trained on.

    Its onsets, durations, velocities and tempi are those of the vocabulary that are nearest; drums, and pitches that it
    does not have, are left out. An upbeat with a time signature of its own becomes the end of a whole bar.

    longest : tokens that it may have at most
    bars    : of its beginning that are taken, 0 = all

    Raises UserError naming the file when it cannot be read, has no notes in these bars, is longer than that, or is in a
    time signature that the vocabulary does not have.
    """
    notes = _with_whole_upbeat(read_midi(path), vocab)
    where = f"its first {bars} bars" if bars > 1 else "its first bar" if bars else "it"
    onset_beats = notes.onset_tick / notes.ticks_per_beat
    within = onset_beats < BEATS_A_BAR * (min(bars, longest) or longest)
    if not len(onset_beats) or (bars and not within.any()):
        raise UserError(f"cannot continue {path}: no note begins in {where}")
    if not bars and not within.all():
        raise UserError(
            f"cannot continue {path}: it goes on for {onset_beats.max():,.0f} beats, and the policy holds fewer; take "
            "its beginning with --bars"
        )
    if within.sum() > MOST_NOTES:
        raise UserError(f"cannot continue {path}: it has {within.sum():,} notes; take its beginning with --bars")
    if unknown := _unknown_metre(notes, vocab, bars):
        raise UserError(
            f"cannot continue {path}: there are bars of {unknown} in {where}, which the policy does not know; take "
            f"fewer --bars, or write it in one of {', '.join(vocab.values_of('TimeSig'))}"
        )
    try:
        ids = _cut(encode_notes(_only(notes, within), vocab), vocab, bars)
    except UserError as error:
        raise UserError(f"cannot continue {path}: {error}") from error
    if not set(ids.tolist()) & set(vocab.ids_of("Pitch")):
        raise UserError(f"cannot continue {path}: no note that the policy can play begins in {where}")
    if len(ids) > longest:
        raise UserError(
            f"cannot continue {path}: it makes {len(ids):,} tokens, and beside --max-tokens the policy has room for "
            f"{max(longest, 0):,}; take fewer --bars, or ask for fewer tokens"
        )
    return Prompts(TokenBatch.pack([ids] * n), vocab)


def _with_whole_upbeat(notes: NoteBatch, vocab: Vocabulary) -> NoteBatch:
    """The piece with rests before an upbeat, up to a whole bar, where its time signature is none of the vocabulary."""
    at, known, lengths = notes.meter_tick, vocab.values_of("TimeSig"), _bar_ticks(notes, notes.meter)
    if len(at) < 2 or at[0] or _named(notes.meter[0]) in known or not at[1] == lengths[0] < lengths[1]:
        return notes
    rest = int(lengths[1] - lengths[0])
    seconds = rest / notes.ticks_per_beat * 60 / (float(notes.tempo_bpm[0]) if len(notes.tempo_bpm) else 120.0)
    return NoteBatch.single(
        *(notes.onset_s + seconds, notes.duration_s, notes.pitch, notes.velocity),
        (notes.onset_tick + rest, notes.duration_tick),
        notes.ticks_per_beat,
        tempi=(np.where(notes.tempo_tick > 0, notes.tempo_tick + rest, 0), notes.tempo_bpm),
        meters=(np.concatenate([[0], at[2:] + rest]), notes.meter[1:]),
        end_s=float(notes.end_s[0]) + seconds,
    )


def _unknown_metre(notes: NoteBatch, vocab: Vocabulary, bars: int) -> str:
    """A time signature that the vocabulary lacks of its first bars, 0 = of all up to the last onset; "" = none."""
    at, meters, known = notes.meter_tick, notes.meter.astype(np.int64), vocab.values_of("TimeSig")
    if not known or not len(at):
        return ""
    meters[:, 0] = np.where(meters[:, 0] == 1, 4, meters[:, 0])  # as `encode_midi` takes it
    lengths, tick, last = _bar_ticks(notes, meters), 0, int(notes.onset_tick.max())
    for _ in range(bars or len(at) + 1):
        if tick > last:
            break
        now = max(int(np.searchsorted(at, tick, side="right")) - 1, 0)
        if _named(meters[now]) not in known:
            return _named(meters[now])
        later = at[at > tick]
        tick = tick + int(lengths[now]) if bars else int(later[0]) if len(later) else last + 1
    return ""


def _bar_ticks(notes: NoteBatch, meters: np.ndarray) -> np.ndarray:
    """Ticks of a bar of each time signature [K, 2], int64."""
    return notes.ticks_per_beat * 4 * meters[:, 0].astype(np.int64) // meters[:, 1]


def _named(meter: np.ndarray) -> str:
    return f"{int(meter[0])}/{int(meter[1])}"


def encode_notes(notes: NoteBatch, vocab: Vocabulary) -> np.ndarray:
    """Token ids of one piece, int32, without BOS and EOS, by MidiTok from a file written here.

    Raises UserError when it holds no notes that the vocabulary can express.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "phrase.mid"
        try:
            notes.to_midi(0, written)
            return encode_midi(written, vocab).astype(np.int32)
        except (UserError, ValueError) as error:
            raise UserError(str(error).replace(str(written), "it")) from error


def _only(notes: NoteBatch, kept: np.ndarray) -> NoteBatch:
    """One piece with some of its notes, bool [M], and without its pedal."""
    end = int(notes.onset_tick[kept].max())
    tempi, meters = notes.tempo_tick <= end, notes.meter_tick <= end
    return NoteBatch.single(
        *(notes.onset_s[kept], notes.duration_s[kept], notes.pitch[kept], notes.velocity[kept]),
        (notes.onset_tick[kept], notes.duration_tick[kept]),
        notes.ticks_per_beat,
        tempi=(notes.tempo_tick[tempi], notes.tempo_bpm[tempi]),
        meters=(notes.meter_tick[meters], notes.meter[meters]),
        end_s=float(notes.end_s[0]),
    )


def _cut(ids: np.ndarray, vocab: Vocabulary, bars: int) -> np.ndarray:
    """The tokens up to the end of the given bar."""
    begins = np.flatnonzero(np.isin(ids, vocab.ids_of("Bar")))
    return ids[: begins[bars]] if 0 < bars < len(begins) else ids
