"""Decode is MidiTok's decode, on music and on garbage, and its seconds are those of the MIDI file."""

import json

import mido
import numpy as np
import pytest
from decode_parity import assert_decodes_as_miditok
from hypothesis import given, settings
from hypothesis import strategies as st
from miditok import REMI, TokenizerConfig
from token_sources import POP909, garbage, nearly_music, real_pieces, synthetic_pieces, windows

from fastsmart.errors import UserError
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary

SMART = load_vocabulary("smart")
NOTE = ["Pitch_60", "Velocity_99", "Duration_1.0.12"]


def ids(*texts: str) -> list[int]:
    return [SMART.id(text) for text in texts]


# 10,000 sequences and more, in four kinds.


def test_decode_agrees_on_garbage():
    assert_decodes_as_miditok(garbage(SMART, 3000, 128, seed=1), SMART)


def test_decode_agrees_on_nearly_music():
    batch = assert_decodes_as_miditok(nearly_music(SMART, 4000, 160, seed=2), SMART)
    assert len(batch.pitch) > 40_000
    assert (np.diff(batch.onset_tick) < 0).any()  # time that runs backwards was among them


def test_decode_agrees_on_synthetic_pieces(tmp_path):
    pieces = synthetic_pieces(SMART, 60, tmp_path, seed=3)
    assert_decodes_as_miditok([*pieces, *windows(pieces, 3000, 120, seed=3)], SMART)


@pytest.mark.skipif(not POP909.is_file(), reason=f"{POP909} is not on this machine (set FASTSMART_POP909)")
def test_decode_agrees_on_real_pieces(tmp_path):
    pieces = real_pieces(SMART, 25, tmp_path)
    batch = assert_decodes_as_miditok([*pieces, *windows(pieces, 2000, 160, seed=4)], SMART)
    assert len(batch.pitch) > 60_000


MUSICAL = st.sampled_from(
    [kind + "_" for kind in ("Bar", "Position", "Pitch", "Velocity", "Duration", "Tempo", "TimeSig")]
)
ANY_ID = st.integers(0, len(SMART) - 1)
LIKELY_ID = MUSICAL.flatmap(lambda kind: st.sampled_from([i for i, t in enumerate(SMART.tokens) if t.startswith(kind)]))
A_NOTE = st.tuples(*[st.sampled_from(SMART.ids_of(kind)) for kind in ("Pitch", "Velocity", "Duration")])
PARTS = st.one_of(st.tuples(ANY_ID), st.tuples(LIKELY_ID), A_NOTE)


@given(st.lists(st.lists(PARTS, max_size=40), max_size=4))
@settings(max_examples=300, deadline=None)
def test_decode_agrees_on_whatever_hypothesis_finds(sequences):
    assert_decodes_as_miditok([[token for part in parts for token in part] for parts in sequences], SMART)


OTHER_VOCABULARIES = {
    "no tempo, no time signature": {"use_tempos": False, "use_time_signatures": False},
    "numbered bars": {"max_bar_embedding": 6},
    "bar ends": {"use_time_signatures": True, "use_bar_end_tokens": True},
    "two resolutions, sixteenths": {
        "beat_res": {(0, 2): 8, (2, 6): 4},
        "use_time_signatures": True,
        "use_tempos": True,
        "time_signature_range": {16: [3, 5], 8: [3, 6], 4: [3, 4], 2: [2]},
    },
    "logarithmic tempi, none of them 120": {
        "use_tempos": True,
        "log_tempos": True,
        "num_tempos": 9,
        "tempo_range": (33, 177),
        "beat_res": {(0, 4): 5},
    },
}


@pytest.mark.parametrize("config", OTHER_VOCABULARIES.values(), ids=OTHER_VOCABULARIES.keys())
def test_decode_agrees_for_other_vocabularies(config, tmp_path):
    special = ["PAD", "BOS", "EOS"]
    REMI(TokenizerConfig(special_tokens=special, use_pitchdrum_tokens=False, **config)).save(
        tmp_path / "tokenizer.json"
    )
    vocab = load_vocabulary(tmp_path)
    batch = assert_decodes_as_miditok(nearly_music(vocab, 200, 120, seed=5) + garbage(vocab, 100, 80, seed=6), vocab)
    assert len(batch.pitch) > 1000


def test_a_vocabulary_without_piano_durations_is_refused():
    description = json.loads(SMART.description)
    description["config"]["use_note_duration_programs"] = [1]
    with pytest.raises(UserError, match="use_note_duration_programs"):
        decode([ids(*NOTE)], Vocabulary(SMART.tokens, json.dumps(description)))


# Seconds


def test_seconds_are_those_of_the_midi_file_also_when_time_runs_backwards(tmp_path):
    batch = decode(nearly_music(SMART, 120, 200, seed=7), SMART)
    ties = backwards = 0
    for i in range(len(batch)):
        path = tmp_path / f"{i}.mid"
        batch.to_midi(i, path)
        played, now = [], 0.0
        for message in mido.MidiFile(str(path)):  # in seconds, by mido's own clock
            now += message.time
            if message.type == "note_on":
                played.append((now, message.note, message.velocity))
        rows = batch.rows(i)
        order = np.argsort(batch.onset_tick[rows], kind="stable")
        ours = [x[rows][order] for x in (batch.onset_s, batch.pitch, batch.velocity)]
        assert len(played) == len(order)
        for mine, theirs in zip(ours, zip(*played, strict=True), strict=False):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)
        steps = np.diff(batch.tempo_tick[slice(*batch.tempo_offsets[i : i + 2])])
        assert (steps >= 0).all()
        ties += (steps == 0).sum()
        backwards += (np.diff(batch.onset_tick[rows]) < 0).sum()
    assert ties > 20
    assert backwards > 100


def test_max_seconds_drops_and_cuts_notes_and_leaves_musical_time_alone():
    sequences = nearly_music(SMART, 200, 200, seed=8)
    whole, cut = decode(sequences, SMART), decode(sequences, SMART, max_seconds=2.5)
    kept = whole.onset_s < 2.5
    assert 0 < kept.sum() < len(kept)
    for name in ("onset_s", "pitch", "velocity", "onset_tick", "duration_tick"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[kept])
    np.testing.assert_allclose(
        cut.duration_s, np.minimum(whole.duration_s[kept], 2.5 - whole.onset_s[kept]), atol=1e-12
    )
    assert (cut.duration_s > 0).all()
    assert cut.end_s.max() == 2.5
    for i in range(len(cut)):
        assert cut.counts[i] == kept[whole.rows(i)].sum()
        assert cut.end_s[i] == pytest.approx((cut.onset_s + cut.duration_s)[cut.rows(i)].max(initial=0))
    np.testing.assert_array_equal(cut.tempo_tick, whole.tempo_tick)
    np.testing.assert_array_equal(cut.meter, whole.meter)


def test_a_note_that_starts_at_the_limit_is_left_out():
    piece = ids("Bar_None", "TimeSig_4/4", "Position_0", "Tempo_120.0", *NOTE, "Position_12", *NOTE)
    batch = decode([piece], SMART, max_seconds=0.5)
    assert batch.onset_s.tolist() == [0.0]
    assert decode([piece], SMART, max_seconds=0.5 + 1e-9).counts[0] == 2


# What is asked wrongly


@pytest.mark.parametrize("bad", [-1, len(SMART), 2**31 - 1, 2**40])
def test_an_id_outside_the_vocabulary_is_named(bad):
    with pytest.raises(UserError, match=str(bad)):
        decode([ids(*NOTE), [0, 0, bad]], SMART)


def test_the_place_of_a_bad_id_is_named():
    with pytest.raises(UserError, match=r"sequence 2, token 1\b"):
        decode([[0], [], [1, 999, 2]], SMART)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan")])
def test_max_seconds_must_be_positive(bad):
    with pytest.raises(UserError, match="max_seconds"):
        decode([ids(*NOTE)], SMART, max_seconds=bad)


def test_nothing_decodes_to_nothing():
    assert len(decode([], SMART)) == 0
    batch = decode([[], []], SMART)
    assert batch.offsets.tolist() == [0, 0, 0]
    assert batch.end_s.tolist() == [0, 0]
    assert batch.tempo_bpm.tolist() == [120, 120]
    assert batch.meter.tolist() == [[4, 4], [4, 4]]


def test_dtypes_are_those_that_note_batch_promises():
    batch = decode([ids("Bar_None", "TimeSig_3/8", "Tempo_250.0", *NOTE)], SMART)
    promised = {
        np.float64: ("onset_s", "duration_s", "end_s", "tempo_bpm"),
        np.uint8: ("pitch", "velocity"),
        np.int32: ("onset_tick", "duration_tick", "tempo_tick", "meter_tick", "meter"),
        np.int64: ("offsets", "tempo_offsets", "meter_offsets"),
    }
    for dtype, names in promised.items():
        for name in names:
            assert getattr(batch, name).dtype == dtype, name
            assert getattr(batch, name).flags.c_contiguous, name


# TokenBatch


def test_pack_keeps_rows_of_every_kind():
    rows = [[1, 2], [], np.array([3], np.uint16), (4, 5, 6)]
    batch = TokenBatch.pack(rows)
    assert batch.ids.dtype == np.int32
    assert batch.offsets.dtype == np.int64
    assert len(batch) == 4
    assert [row.tolist() for row in batch] == [[1, 2], [], [3], [4, 5, 6]]
    assert batch.row(-1).tolist() == [4, 5, 6]
    assert batch.lengths.tolist() == [2, 0, 1, 3]
    assert [row.tolist() for row in TokenBatch.pack(np.eye(2, dtype=np.int64))] == [[1, 0], [0, 1]]
    with pytest.raises(IndexError):
        batch.row(4)


@pytest.mark.parametrize("bad", [[[1.5]], [[[1]]], [["a"]], [3]])
def test_pack_refuses_what_is_not_a_list_of_ids(bad):
    with pytest.raises(ValueError, match="sequence 0"):
        TokenBatch.pack(bad)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 4, 3], []])
def test_offsets_must_cut_the_ids(offsets):
    with pytest.raises(ValueError, match="offsets"):
        TokenBatch(np.zeros(3, np.int32), np.array(offsets, np.int64))
