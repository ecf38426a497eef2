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

    Its notes, time signatures and tempi are those of the vocabulary that are nearest; drums are left out.

    longest : tokens that it may have at most
    bars    : of its beginning that are taken, 0 = all

    Raises UserError naming the file when it cannot be read, has no notes in these bars, or is longer than that.
    """
    notes = read_midi(path)
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
