"""MIDI text format and patches, against what mido reads back and upstream's own code where it is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mido
import numpy as np
import pytest
from made_notes import made, melody

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch, read_midi
from fastsmart.reward.clamp3.mtf import BOS, EOS, PAD, PATCH, file_text, notes_text, patches
from fastsmart.tokens.decode import decode
from fastsmart.tokens.vocabulary import load_vocabulary

PEER = os.environ.get("FASTSMART_CLAMP_PEER", "")  # folder with the packages frechet_music_distance and unidecode


def text_of_written(notes: NoteBatch, path: Path, as_note_on: bool = False) -> str:
    """MTF of the file that `to_midi` writes, message by message as mido reads it."""
    notes.to_midi(0, path)
    lines = ["ticks_per_beat 480"]
    for message in mido.MidiFile(path).merged_track:
        if as_note_on and message.type == "note_off":
            message = mido.Message("note_on", note=message.note, velocity=0, time=message.time)
        lines.append(" ".join(map(str, message.dict().values())))
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(4))
def test_text_of_notes_is_that_of_the_file_they_would_be_written_to(seed: int, tmp_path: Path) -> None:
    notes = made([melody(seed)])
    written = text_of_written(notes, tmp_path / "a.mid")
    assert notes_text(notes, 0, "note_off") == written == file_text(tmp_path / "a.mid")
    assert notes_text(notes, 0) == text_of_written(notes, tmp_path / "b.mid", as_note_on=True)


def test_text_of_what_a_policy_plays_is_that_of_its_file(tmp_path: Path) -> None:
    vocab, rng = load_vocabulary(), np.random.default_rng(0)

    def drawn(kind: str) -> int:
        return int(rng.choice(vocab.ids_of(kind)))

    def phrase() -> list[int]:
        start = [vocab.ids_of("Bar")[0]] if rng.random() < 0.3 else []
        tempo = [drawn("Tempo")] if rng.random() < 0.2 else []
        return [*start, drawn("Position"), *tempo, drawn("Pitch"), drawn("Velocity"), drawn("Duration")]

    notes = decode([[i for _ in range(40) for i in phrase()] for _ in range(6)], vocab)
    assert notes.counts.min() == 40
    assert np.diff(notes.tempo_offsets).min() > 2
    for i in range(len(notes)):
        assert notes_text(notes, i, "note_off") == text_of_written(notes.select([i]), tmp_path / f"{i}.mid")


def test_a_note_that_is_cut_in_seconds_ends_there(make_notes: Callable[..., NoteBatch], tmp_path: Path) -> None:
    notes = make_notes([(0, 12, 60, 80), (12, 600, 64, 80)], ticks_per_beat=480, bpm=100.0)
    notes.to_midi(0, tmp_path / "a.mid")
    cut = read_midi(tmp_path / "a.mid", max_seconds=0.5)
    assert cut.duration_tick[1] == 600
    last = notes_text(cut, 0).splitlines()[-2]
    assert last == "note_on 388 0 64 0"  # 0.5 s are 400 ticks


def test_ticks_become_480_a_beat(make_notes: Callable[..., NoteBatch]) -> None:
    lines = notes_text(make_notes([(960, 480, 60, 80)], ticks_per_beat=960), 0).splitlines()
    assert lines[0] == "ticks_per_beat 480"
    assert lines[1:] == ["set_tempo 500000 0", "note_on 480 0 60 80", "note_on 240 0 60 0", "end_of_track 0"]


def test_a_piece_without_notes_is_text_too() -> None:
    assert notes_text(NoteBatch.empty(1), 0) == "ticks_per_beat 480\nend_of_track 0"


def test_an_unknown_writer_is_refused() -> None:
    with pytest.raises(ValueError, match="note_on, note_off"):
        notes_text(NoteBatch.empty(1), 0, "note")


def patches_by_hand(text: str) -> list[list[int]]:
    """The rule of the paper, word for word: lines of one type share a patch while it has room for them."""
    shared: list[tuple[str, list[str]]] = []
    for line in text.split("\n"):
        kind, _, rest = line.partition(" ")
        if shared and shared[-1][0] == kind:
            joined = kind + " " + "\t".join([*shared[-1][1], rest])
            if len(joined) + (line is not text.split("\n")[-1]) <= PATCH - 2:
                shared[-1][1].append(rest)
                continue
        shared.append((kind, [rest]))
    rows = [[BOS] * PATCH]
    for number, (kind, rests) in enumerate(shared, 1):
        characters = f"{kind} " + "\t".join(rests) + ("\n" if number < len(shared) else "")
        row = [BOS, *map(ord, characters), EOS][:PATCH]
        rows.append(row + [PAD] * (PATCH - len(row)))
    return [*rows, [BOS] + [EOS] * (PATCH - 1)]


@pytest.mark.parametrize("writer", ["note_on", "note_off"])
def test_patches_share_lines_of_one_type(writer: str) -> None:
    text = notes_text(made([melody(1, notes=80)]), 0, writer)
    assert patches(text).tolist() == patches_by_hand(text)


def test_note_offs_make_about_twice_as_many_patches() -> None:
    notes = made([melody(1, notes=80)])
    long, short = (len(patches(notes_text(notes, 0, writer))) for writer in ("note_off", "note_on"))
    assert 1.6 * short < long


def test_a_line_longer_than_a_patch_is_cut() -> None:
    table = patches("ticks_per_beat 480\nunknown_meta (" + "1, " * 40 + ") 0\nend_of_track 0")
    assert table[2, 0] == BOS
    assert table[2, -1] == ord("1, "[(63 - 1 - len("unknown_meta (")) % 3])
    assert len(table) == 5


def test_a_file_of_type_2_is_refused(tmp_path: Path) -> None:
    mido.MidiFile(type=2, tracks=[mido.MidiTrack()]).save(tmp_path / "a.mid")
    with pytest.raises(UserError, match="type 2"):
        file_text(tmp_path / "a.mid")


PEER_PROGRAM = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
for name in ("frechet_music_distance", "frechet_music_distance.models", "frechet_music_distance.models.clamp2"):
    module = types.ModuleType(name)  # without what their __init__ loads
    module.__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
    sys.modules[name] = module
from frechet_music_distance.models.clamp2.m3_patchilizer import M3Patchilizer
loader = types.ModuleType("frechet_music_distance.dataset_loaders.dataset_loader")
class DatasetLoader:
    def __init__(self, *arguments): pass
    def _validate_file(self, path): pass
loader.DatasetLoader = DatasetLoader
package = types.ModuleType("frechet_music_distance.dataset_loaders")
package.__path__ = [sys.argv[1] + "/frechet_music_distance/dataset_loaders"]
sys.modules[package.__name__], sys.modules[loader.__name__] = package, loader
from frechet_music_distance.dataset_loaders.midi_as_mtf_loader import MIDIasMTFLoader
read, cut = MIDIasMTFLoader(verbose=False), M3Patchilizer()
for path in json.load(sys.stdin):
    text = read.load_file(path)
    print(json.dumps([text, cut.encode(text, add_special_patches=True)]))
"""


def by_peer(files: list[Path]) -> list[tuple[str, np.ndarray]]:
    """Text and patches of files as frechet-music-distance has them."""
    done = subprocess.run(
        [sys.executable, "-c", PEER_PROGRAM, PEER],
        input=json.dumps([str(file) for file in files]),
        capture_output=True,
        text=True,
        check=True,
    )
    return [(text, np.array(table)) for text, table in map(json.loads, done.stdout.splitlines())]


@pytest.mark.skipif(not PEER, reason="FASTSMART_CLAMP_PEER names no folder with frechet_music_distance")
def test_text_and_patches_are_those_of_frechet_music_distance(tmp_path: Path) -> None:
    pieces = made([melody(seed, notes=200) for seed in range(4)])
    files = [tmp_path / f"{i}.mid" for i in range(4)]
    for i, file in enumerate(files):
        pieces.to_midi(i, file)
    for i, (file, (text, table)) in enumerate(zip(files, by_peer(files), strict=True)):
        assert file_text(file) == notes_text(pieces, i, "note_off") == text
        np.testing.assert_array_equal(patches(text), table)


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason="FASTSMART_CLAMP_PEER names no folder with frechet_music_distance")
def test_text_and_patches_of_300_real_files_are_those_of_frechet_music_distance() -> None:
    folder = Path(os.environ.get("FASTSMART_MIDI", ""))
    files = sorted(folder.rglob("*.mid"))
    if len(files) < 300 or not folder.name:
        pytest.skip("FASTSMART_MIDI names no folder of 300 MIDI files")
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, 300).astype(int)]
    for file, (text, table) in zip(chosen, by_peer(chosen), strict=True):
        assert file_text(file) == text, file
        np.testing.assert_array_equal(patches(text), table, err_msg=str(file))
