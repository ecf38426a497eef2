"""The soundfont that is asked for is found and whole, or one sentence says what is wrong with it."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from fastsmart.audio import FluidSynthRenderer, RenderSettings, find_soundfont, list_soundfonts
from fastsmart.audio import soundfont as soundfont_module
from fastsmart.errors import UserError
from fastsmart.machine.files import file_hash


@pytest.fixture
def font() -> Path:
    return find_soundfont()


def damaged(kind: str, whole: Path) -> bytes:
    head = whole.read_bytes()[:100_000]
    return {
        "empty": b"",
        "text": b"This is not a soundfont.\n",
        "truncated": head,
        "header only": head[:7],
        "zip": b"PK\x03\x04" + head,
        "wave": b"RIFF\x00\x00\x00\x00WAVEfmt ",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "is empty"),
        ("text", "not a soundfont"),
        ("truncated", "cut short"),
        ("header only", "cut short"),
        ("zip", "zip archive"),
        ("wave", "not a soundfont"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(kind: str, says: str, font: Path, tmp_path: Path) -> None:
    path = tmp_path / "piano.sf2"
    path.write_bytes(damaged(kind, font))
    with pytest.raises(UserError, match=says) as error:
        find_soundfont(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_that_lies_is_refused_by_fluidsynth(tmp_path: Path) -> None:
    path = tmp_path / "piano.sf2"
    path.write_bytes(b"RIFF" + (4).to_bytes(4, "little") + b"sfbk")
    with pytest.raises(UserError, match="cannot load"):
        FluidSynthRenderer(RenderSettings(soundfont=str(path)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.sf2"):
        find_soundfont(tmp_path / "nowhere.sf2")


def test_the_path_comes_before_the_environment_and_that_before_what_is_installed(
    font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = tmp_path / "mine.sf3", tmp_path / "theirs.sf3"
    mine.symlink_to(font)
    theirs.symlink_to(font)
    monkeypatch.setenv("FASTSMART_SOUNDFONT", str(theirs))
    assert find_soundfont(mine) == mine
    assert find_soundfont() == theirs
    monkeypatch.delenv("FASTSMART_SOUNDFONT")
    assert find_soundfont() == list_soundfonts()[0]


def test_of_several_the_preferred_one_is_used_and_links_are_listed_once(
    font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AAA.sf2", "TimGM6mb.sf2", "FluidR3_GM.sf2"):
        (tmp_path / name).write_bytes(font.read_bytes()[:1000])
    (tmp_path / "default-GM.sf2").symlink_to(tmp_path / "TimGM6mb.sf2")
    monkeypatch.setattr(soundfont_module, "FOLDERS", (str(tmp_path),))
    assert [path.name for path in list_soundfonts()] == ["FluidR3_GM.sf2", "TimGM6mb.sf2", "AAA.sf2"]


def test_without_any_the_command_that_installs_one_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSMART_SOUNDFONT", raising=False)
    monkeypatch.setattr(soundfont_module, "FOLDERS", (str(tmp_path),))
    with pytest.raises(UserError, match="apt-get install fluidr3mono-gm-soundfont"):
        find_soundfont()


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x.sf2").write_bytes(b"abc" * 100_000)
    assert file_hash(tmp_path / "x.sf2") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_program_the_font_lacks_is_named(font: Path, tmp_path: Path) -> None:
    """An SF2 whose bank number is changed from 0 to 1 for every preset has no program 0 in bank 0."""
    data = bytearray(font.read_bytes())
    at = data.index(b"phdr")
    for record in range(at + 8, at + 8 + int.from_bytes(data[at + 4 : at + 8], "little"), 38):
        data[record + 22 : record + 24] = (1).to_bytes(2, "little")
    path = tmp_path / "bank1.sf3"
    path.write_bytes(data)
    with pytest.raises(UserError, match="has no program 0"):
        FluidSynthRenderer(RenderSettings(soundfont=str(path)))


def test_without_the_library_the_command_that_installs_it_is_given() -> None:
    """Where no library of that name is found, as on a fresh machine."""
    script = """
import ctypes.util
ctypes.util.find_library = lambda name: None
from fastsmart.audio import load_library
from fastsmart.errors import UserError
try:
    load_library()
except UserError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "apt-get install libfluidsynth3" in said
    assert said.count("\n") == 1
