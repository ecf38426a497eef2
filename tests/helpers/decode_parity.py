"""Is our decode MidiTok's decode? One assertion, for every source of token sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from symusic import Score

from fastsmart.notes import NoteBatch
from fastsmart.tokens.decode import decode
from fastsmart.tokens.vocabulary import Vocabulary

# symusic adds seconds up in float32: measured 2.8 of its steps off at most over 400 tokens, 6.2 over 6,000.
FLOAT32_STEPS = 8


def assert_decodes_as_miditok(
    sequences: Sequence[Sequence[int]] | Sequence[np.ndarray], vocab: Vocabulary
) -> NoteBatch:
    """Assert that every sequence gives MidiTok's notes, tempi, time signatures and seconds; returns our notes.

    Notes must come in MidiTok's order. MidiTok leaves tempi and time signatures in the order of their tokens; they
    are put in the order of time, as a MIDI file holds them. Seconds are compared with symusic's own conversion.
    """
    batch = decode(sequences, vocab)
    assert len(batch) == len(sequences)
    for i, ids in enumerate(sequences):
        score = vocab.tokenizer.decode([[int(token) for token in ids]])
        shown = f"sequence {i}: {' '.join(vocab.tokens[token] for token in ids)}"
        assert score.ticks_per_quarter == batch.ticks_per_beat, shown

        tempi = score.tempos.numpy()
        order = np.argsort(tempi["time"], kind="stable")
        ours = slice(*batch.tempo_offsets[i : i + 2])
        _same(batch.tempo_tick[ours], tempi["time"][order], shown)
        _same(np.rint(60e6 / batch.tempo_bpm[ours]), tempi["mspq"][order], shown)

        meters = score.time_signatures.numpy()
        order = np.argsort(meters["time"], kind="stable")
        ours = slice(*batch.meter_offsets[i : i + 2])
        _same(batch.meter_tick[ours], meters["time"][order], shown)
        _same(batch.meter[ours], np.stack([meters["numerator"], meters["denominator"]], 1)[order], shown)

        ours = batch.rows(i)
        if not score.tracks:
            assert batch.counts[i] == 0, shown
            assert batch.end_s[i] == 0, shown
            continue
        notes = score.tracks[0].notes.numpy()
        _same(batch.onset_tick[ours], notes["time"], shown)
        _same(batch.duration_tick[ours], notes["duration"], shown)
        _same(batch.pitch[ours], notes["pitch"], shown)
        _same(batch.velocity[ours], notes["velocity"], shown)
        heard = _seconds(score)
        onset_s, duration_s = batch.onset_s[ours], batch.duration_s[ours]
        tolerance_s = FLOAT32_STEPS * np.spacing((onset_s + duration_s).astype(np.float32)).astype(np.float64)
        assert (np.abs(onset_s - heard["time"]) <= tolerance_s).all(), shown
        assert (np.abs(duration_s - heard["duration"]) <= tolerance_s).all(), shown
        np.testing.assert_allclose(batch.end_s[i], (onset_s + duration_s).max(), rtol=1e-12, err_msg=shown)
    return batch


def _same(ours: np.ndarray, theirs: np.ndarray, shown: str) -> None:
    np.testing.assert_array_equal(ours, theirs, err_msg=shown)


def _seconds(score: Score) -> dict[str, np.ndarray]:
    """Notes in seconds by symusic (float32). Its sort of tempi by tick is not stable, so of several tempi at one tick
    it is given only the last."""
    last = {tempo.time: tempo for tempo in score.tempos}
    score = score.copy()
    score.tempos = [last[tick] for tick in sorted(last)]
    return score.to("second").tracks[0].notes.numpy()
