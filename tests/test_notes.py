"""Notes to MIDI files and back, read by libraries we did not write."""

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symusic import Score
from token_sources import nearly_music, write_piece

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch, read_midi, ticks_to_seconds
from fastsmart.tokens.decode import decode
from fastsmart.tokens.vocabulary import load_vocabulary

SMART = load_vocabulary("smart")


def without_overlaps(seed: int, n: int) -> NoteBatch:
    """Random pieces in which no pitch is struck while it sounds, the only kind that MIDI holds without loss."""
    random = np.random.default_rng(seed)
    pieces = []
    for _ in range(n):
        piece = [SMART.id("Bar_None"), int(random.choice(SMART.ids_of("TimeSig")))]
        for beat in range(int(random.integers(1, 30))):
            if beat % 4 == 0:
                piece.append(SMART.id("Bar_None"))
            piece.append(SMART.id(f"Position_{beat % 4 * 6}"))
            if random.random() < 0.3:
                piece.append(int(random.choice(SMART.ids_of("Tempo"))))
            for pitch in random.choice(SMART.ids_of("Pitch"), 4, replace=False):
                duration = SMART.id(f"Duration_0.{random.integers(1, 7)}.12")
                piece += [int(pitch), int(random.choice(SMART.ids_of("Velocity"))), duration]
        pieces.append(piece)
    return decode(pieces, SMART)


def table(*columns) -> np.ndarray:
    """Rows in a fixed order, so that two lists of notes compare as sets."""
    rows = np.stack([np.asarray(column, np.float64) for column in columns], 1)
    return rows[np.lexsort(rows.T[::-1])]


def test_a_written_midi_file_holds_the_same_music_for_symusic_and_for_us(tmp_path):
    batch = without_overlaps(seed=1, n=20)
    assert (batch.counts > 0).all()
    for i in range(len(batch)):
        path = tmp_path / f"{i}.mid"
        batch.to_midi(i, path)
        rows, score = batch.rows(i), Score(str(path))
        scale = score.ticks_per_quarter // batch.ticks_per_beat
        assert scale * batch.ticks_per_beat == score.ticks_per_quarter
        ours = table(*(x[rows] for x in (batch.onset_tick, batch.duration_tick, batch.pitch, batch.velocity)))
        notes = score.tracks[0].notes.numpy()
        theirs = table(notes["time"] / scale, notes["duration"] / scale, notes["pitch"], notes["velocity"])
        np.testing.assert_array_equal(ours, theirs)
        tempi = slice(*batch.tempo_offsets[i : i + 2])
        np.testing.assert_array_equal(batch.tempo_tick[tempi] * scale, score.tempos.numpy()["time"])
        np.testing.assert_array_equal(np.rint(60e6 / batch.tempo_bpm[tempi]), score.tempos.numpy()["mspq"])
        meters = slice(*batch.meter_offsets[i : i + 2])
        assert batch.meter[meters].tolist() == [[s.numerator, s.denominator] for s in score.time_signatures]

        back = read_midi(path)
        theirs = table(back.onset_tick / scale, back.duration_tick / scale, back.pitch, back.velocity)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(back.tempo_tick, batch.tempo_tick[tempi] * scale)
        np.testing.assert_array_equal(back.tempo_bpm, batch.tempo_bpm[tempi])
        np.testing.assert_array_equal(back.meter, batch.meter[meters])
        seconds = table(*(x[rows] for x in (batch.onset_s, batch.duration_s)))
        np.testing.assert_allclose(table(back.onset_s, back.duration_s), seconds, rtol=0, atol=1e-9)
        assert back.end_s[0] == pytest.approx(batch.end_s[i], abs=1e-9)


def test_overlapping_notes_of_one_pitch_keep_their_starts_and_their_ends(tmp_path):
    batch = decode(nearly_music(SMART, 40, 200, seed=2), SMART)
    for i in range(len(batch)):
        batch.to_midi(i, tmp_path / "piece.mid")
        back, rows = read_midi(tmp_path / "piece.mid"), batch.rows(i)
        scale = back.ticks_per_beat // batch.ticks_per_beat
        onset, duration, pitch = batch.onset_tick[rows], batch.duration_tick[rows], batch.pitch[rows]
        np.testing.assert_array_equal(table(back.pitch, back.onset_tick / scale), table(pitch, onset))
        ends = table(back.pitch, (back.onset_tick + back.duration_tick) / scale)
        np.testing.assert_array_equal(ends, table(pitch, onset + duration))


def test_read_midi_agrees_with_symusic(tmp_path):
    for seed in range(20):
        write_piece(tmp_path / "piece.mid", seed)
        ours, score = read_midi(tmp_path / "piece.mid"), Score(str(tmp_path / "piece.mid")).to("second")
        notes = [note for track in score.tracks if not track.is_drum for note in track.notes]
        theirs = table(*zip(*((n.pitch, n.velocity, n.time, n.duration) for n in notes), strict=True))
        mine = table(ours.pitch, ours.velocity, ours.onset_s, ours.duration_s)
        np.testing.assert_array_equal(mine[:, :2], theirs[:, :2])
        np.testing.assert_allclose(mine[:, 2:], theirs[:, 2:], rtol=0, atol=2e-5)  # symusic's are float32
        assert (np.diff(ours.onset_tick) >= 0).all()


def test_read_midi_crops_to_max_seconds(tmp_path):
    write_piece(tmp_path / "piece.mid", 3)
    whole, cut = read_midi(tmp_path / "piece.mid"), read_midi(tmp_path / "piece.mid", max_seconds=4.0)
    kept = whole.onset_s < 4.0
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(cut.onset_s, whole.onset_s[kept])
    np.testing.assert_allclose(cut.duration_s, np.minimum(whole.duration_s[kept], 4.0 - cut.onset_s), atol=1e-12)
    assert cut.end_s[0] == 4.0


def test_tempo_map_seconds_are_mido_s():
    tempo_tick, tempo_bpm = np.array([0, 10, 10, 40]), np.array([90.0, 30.0, 200.0, 61.7])
    ticks, seconds, now = np.arange(60), [], 0.0
    for tick in ticks:
        seconds.append(now)
        bpm = tempo_bpm[np.flatnonzero(tempo_tick <= tick)[-1]]
        now += mido.tick2second(1, 24, mido.bpm2tempo(bpm))
    np.testing.assert_allclose(ticks_to_seconds(ticks, 24, tempo_tick, tempo_bpm), seconds, atol=1e-6)
    none = np.array([], np.int64)
    np.testing.assert_allclose(ticks_to_seconds(ticks, 24, none, none.astype(float)), ticks / 48)  # 120 bpm


def same(a: NoteBatch, b: NoteBatch) -> None:
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


@given(st.lists(st.integers(0, 11), max_size=12))
@settings(max_examples=60, deadline=None)
def test_select_gives_what_decoding_these_pieces_alone_gives(pieces):
    sequences = nearly_music(SMART, 12, 60, seed=4)
    same(decode(sequences, SMART, 3.0).select(pieces), decode([sequences[p] for p in pieces], SMART, 3.0))


def test_select_takes_masks_and_counts_from_the_end():
    batch = decode(nearly_music(SMART, 6, 60, seed=5), SMART)
    same(batch.select(batch.counts > 3), batch.select(np.flatnonzero(batch.counts > 3)))
    same(batch.select([-1]), batch.select([5]))
    with pytest.raises(IndexError):
        batch.select([6])


def test_concat_gives_what_decoding_all_at_once_gives():
    sequences = nearly_music(SMART, 12, 60, seed=6)
    parts = [decode(sequences[a:b], SMART) for a, b in ((0, 5), (5, 5), (5, 12))]
    same(NoteBatch.concat(parts), decode(sequences, SMART))
    with pytest.raises(ValueError, match="ticks_per_beat"):
        NoteBatch.concat([])


# Files that are not what they should be


def test_a_midi_file_cut_anywhere_is_named(tmp_path):
    write_piece(tmp_path / "whole.mid", 7, bars=3)
    data = (tmp_path / "whole.mid").read_bytes()
    path = tmp_path / "cut.mid"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cannot read .*cut\.mid as MIDI: it ends too early"):
            read_midi(path)


def test_damaged_bytes_give_notes_or_one_clear_error_never_a_crash(tmp_path):
    write_piece(tmp_path / "whole.mid", 8, bars=3)
    data, random = (tmp_path / "whole.mid").read_bytes(), np.random.default_rng(8)
    path, refused = tmp_path / "damaged.mid", []
    for _ in range(1500):
        damaged = bytearray(data)
        for at in random.integers(len(data), size=random.integers(1, 5)):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            batch = read_midi(path)
        except UserError as error:
            refused.append(str(error))
        else:
            assert np.isfinite(batch.end_s).all()
    assert 100 < len(refused) < 1500
    assert all("damaged.mid" in reason for reason in refused)


@pytest.mark.parametrize(
    "content",
    [b"", b"these are not notes", b"MThd", b"MThd\0\0\0\6\0\1\0\0\1\xe0", b"RIFF" + bytes(200), bytes(500)],
    ids=["empty", "text", "magic only", "no tracks", "wav", "zeros"],
)
def test_a_file_that_is_not_midi_is_named(content, tmp_path):
    (tmp_path / "song.mid").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*song\.mid as MIDI: "):
        read_midi(tmp_path / "song.mid")


def test_bytes_that_no_note_needs_lose_no_notes(tmp_path):
    """A velocity above 127 counts as 127; a key signature of no key is passed over. Both stand in large collections."""
    write_piece(tmp_path / "whole.mid", 8, bars=3)
    whole = read_midi(tmp_path / "whole.mid")
    file = mido.MidiFile(tmp_path / "whole.mid")
    file.tracks[0].insert(0, mido.MetaMessage("key_signature", key="Eb"))
    file.save(tmp_path / "key.mid")
    named = (tmp_path / "key.mid").read_bytes()
    key = b"\xff\x59\x02\xfd\x00"  # three flats, major
    assert named.count(key) == 1
    (tmp_path / "key.mid").write_bytes(named.replace(key, b"\xff\x59\x02\xfd\x02"))
    with pytest.raises(mido.KeySignatureError):
        mido.MidiFile(tmp_path / "key.mid")
    same(read_midi(tmp_path / "key.mid"), whole)

    note = next(m for m in mido.merge_tracks(file.tracks) if m.type == "note_on" and m.velocity > 0 and m.channel != 9)
    struck = bytes(note.bytes())
    (tmp_path / "loud.mid").write_bytes(named.replace(struck, struck[:2] + b"\xc8", 1))
    with pytest.raises(OSError, match="data byte"):
        mido.MidiFile(tmp_path / "loud.mid")
    loud = read_midi(tmp_path / "loud.mid")
    changed = np.flatnonzero(loud.velocity != whole.velocity)
    assert loud.velocity[changed].tolist() == [127]
    np.testing.assert_array_equal(loud.onset_s, whole.onset_s)
    np.testing.assert_array_equal(loud.pitch, whole.pitch)


@pytest.mark.parametrize(("kind", "division"), [(2, 480), (1, -7640), (1, 0)])
def test_timing_that_is_not_in_beats_is_named(kind, division, tmp_path):
    file = mido.MidiFile(type=kind, ticks_per_beat=division)
    file.tracks.append(mido.MidiTrack())
    file.save(str(tmp_path / "film.mid"))
    with pytest.raises(UserError, match=r"film\.mid uses MIDI timing"):
        read_midi(tmp_path / "film.mid")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.mid: No such file"):
        read_midi(tmp_path / "gone.mid")
    with pytest.raises(UserError, match="cannot read"):
        read_midi(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    batch = without_overlaps(seed=9, n=1)
    with pytest.raises(UserError, match=r"cannot write .*piece\.mid"):
        batch.to_midi(0, tmp_path / "no such folder" / "piece.mid")
