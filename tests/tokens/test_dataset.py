"""Encoding folders of MIDI: what MidiTok says, in order, whatever is damaged."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import mido
import numpy as np
import pytest
from token_sources import write_piece

from fastsmart.errors import UserError
from fastsmart.notes import read_midi
from fastsmart.tokens.dataset import TokenDataset, encode_folder, encode_midi
from fastsmart.tokens.decode import decode


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "midi"
    (root / "deeper").mkdir(parents=True)
    for seed in range(5):
        write_piece(root / ("deeper" if seed % 2 else "") / f"{seed}.mid", seed)
    return root


def test_pieces_come_in_order_and_are_memory_mapped(folder, tmp_path, vocab):
    seen = []
    dataset = encode_folder(folder, tmp_path / "data", vocab, workers=2, progress=lambda *counts: seen.append(counts))
    assert dataset.files == ("0.mid", "2.mid", "4.mid", "deeper/1.mid", "deeper/3.mid")
    assert seen[-1] == (5, 5, 0)
    assert isinstance(dataset.ids, np.memmap)
    assert not dataset.ids.flags.writeable
    for p, name in enumerate(dataset.files):
        np.testing.assert_array_equal(dataset.piece(p), encode_midi(folder / name, vocab))
    again = TokenDataset.open(tmp_path / "data")
    np.testing.assert_array_equal(again.ids, dataset.ids)
    assert again.vocab.tokens == vocab.tokens


def test_damaged_files_are_named_and_left_out(folder, tmp_path, vocab):
    (folder / "empty.mid").write_bytes(b"")
    (folder / "text.mid").write_text("this is not music")
    whole = (folder / "0.mid").read_bytes()
    (folder / "cut.mid").write_bytes(whole[: len(whole) // 2])
    silent = mido.MidiFile()
    silent.tracks.append(mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=500000)]))
    silent.save(folder / "silent.mid")
    dataset = encode_folder(folder, tmp_path / "data", vocab, workers=2)
    damaged = dict(dataset.damaged)
    assert set(damaged) >= {"empty.mid", "text.mid", "silent.mid"}
    assert all(name in reason for name, reason in damaged.items())
    assert len(dataset) + len(damaged) == 9
    assert set(dataset.files) >= {"0.mid", "2.mid", "4.mid", "deeper/1.mid", "deeper/3.mid"}


def test_a_worker_that_dies_takes_one_file_at_most_and_is_replaced(folder, tmp_path, vocab):
    for seed in range(5, 60):
        write_piece(folder / f"{seed}.mid", seed)
    killed = []

    def kill_one() -> None:
        while not killed:
            for entry in os.listdir("/proc"):
                if entry.isdigit():
                    try:
                        status = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
                        command = Path(f"/proc/{entry}/cmdline").read_text()
                    except OSError:
                        continue
                    if int(status[1]) == os.getpid() and "encode_worker" in command:
                        os.kill(int(entry), signal.SIGKILL)
                        killed.append(int(entry))
                        return
            time.sleep(0.01)

    def kill_after_some(done: int, total: int, damaged: int) -> None:
        if done == 5:
            threading.Thread(target=kill_one).start()

    dataset = encode_folder(folder, tmp_path / "data", vocab, workers=1, progress=kill_after_some)
    assert killed
    assert len(dataset) + len(dataset.damaged) == 60
    assert len(dataset.damaged) <= 1
    assert all("crashed" in reason for _, reason in dataset.damaged)


def test_voices_are_merged_doublings_and_drums_left_out_and_one_beat_bars_become_four(tmp_path, vocab):
    file = mido.MidiFile(ticks_per_beat=480)
    note = [mido.Message("note_on", note=60, velocity=80), mido.Message("note_off", note=60, time=480)]
    head = mido.MetaMessage("time_signature", numerator=1, denominator=4)
    melody = mido.MidiTrack([head, *note])
    doubling = mido.MidiTrack([m.copy(channel=1) for m in note] + [m.copy(channel=1, note=67) for m in note] * 4)
    drums = mido.MidiTrack([m.copy(channel=9, note=38) for m in note])
    file.tracks += [melody, doubling, drums]
    file.save(tmp_path / "piece.mid")
    notes = decode([encode_midi(tmp_path / "piece.mid", vocab)], vocab)
    assert notes.pitch.tolist() == [60, 67, 67, 67, 67]
    assert notes.meter.tolist() == [[4, 4]]


def test_nothing_to_read_is_said(tmp_path, vocab):
    with pytest.raises(UserError, match="no MIDI files"):
        encode_folder(tmp_path, tmp_path / "data", vocab)
    (tmp_path / "bad.mid").write_bytes(b"MThd")
    with pytest.raises(UserError, match="none of the 1 MIDI files"):
        encode_folder(tmp_path, tmp_path / "data", vocab)
    assert not (tmp_path / "data").exists()


def test_a_broken_dataset_is_refused(folder, tmp_path, vocab):
    encode_folder(folder, tmp_path / "data", vocab, workers=1)
    record = json.loads((tmp_path / "data" / "dataset.json").read_text())
    record["files"].pop()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="incomplete"):
        TokenDataset.open(tmp_path / "data")
    with pytest.raises(UserError, match="not an encoded dataset"):
        TokenDataset.open(tmp_path / "midi")


def test_a_velocity_above_127_is_the_loudest_as_read_midi_has_it(tmp_path, vocab):
    write_piece(tmp_path / "whole.mid", 8, bars=3)
    file = mido.MidiFile(tmp_path / "whole.mid")
    note = next(m for track in file.tracks for m in track if m.type == "note_on" and m.velocity > 0 and m.channel != 9)
    struck, content = bytes(note.bytes()), (tmp_path / "whole.mid").read_bytes()
    for name, velocity in (("damaged", 200), ("loudest", 127)):
        (tmp_path / f"{name}.mid").write_bytes(content.replace(struck, struck[:2] + bytes([velocity]), 1))
    encoded, expected, whole = (encode_midi(tmp_path / f"{n}.mid", vocab) for n in ("damaged", "loudest", "whole"))
    np.testing.assert_array_equal(encoded, expected)
    assert encoded.tolist() != whole.tolist()
    damaged, loudest = (read_midi(tmp_path / f"{name}.mid") for name in ("damaged", "loudest"))
    np.testing.assert_array_equal(damaged.velocity, loudest.velocity)


def test_devices_and_pipes_below_a_folder_are_passed_over(tmp_path, vocab):
    (tmp_path / "midi").mkdir()
    write_piece(tmp_path / "midi" / "a.mid", 0)
    (tmp_path / "midi" / "zero.mid").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "midi" / "pipe.mid")
    dataset = encode_folder(tmp_path / "midi", tmp_path / "out", vocab, 1)
    assert dataset.files == ("a.mid",)


def test_offsets_that_promise_a_billion_pieces_are_refused(tmp_path, vocab):
    write_piece(tmp_path / "a.mid", 0)
    encode_folder(tmp_path, tmp_path / "out", vocab, 1)
    with open(tmp_path / "out" / "offsets.npy", "wb") as sink:
        np.lib.format.write_array_header_1_0(sink, {"descr": "<i8", "fortran_order": False, "shape": (10**15,)})
    with pytest.raises(UserError, match="is not an encoded dataset"):
        TokenDataset.open(tmp_path / "out")
