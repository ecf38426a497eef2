"""Files that people open: whole or not there, and true about what was left out."""

import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastsmart.audio import FluidSynthRenderer, RenderSettings, listening_settings, render, render_file
from fastsmart.audio.batch import write_wav
from fastsmart.cli import main
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch

Pieces = Callable[..., NoteBatch]
LIMIT_BYTES = 100_000


@contextmanager
def small_disk() -> Iterator[None]:
    """The system lets no file grow beyond a limit, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_audio_that_does_not_fit_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (200_000, 2))
    with small_disk(), pytest.raises(UserError, match=rf"cannot write .*{name}: File too large"):
        write_wav(tmp_path / name, noise, 48000)
    assert not list(tmp_path.iterdir())
    write_wav(tmp_path / name, noise[:1000], 48000)
    with small_disk(), pytest.raises(UserError, match="File too large"):
        write_wav(tmp_path / name, noise, 48000)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert soundfile.info(tmp_path / name).frames == 1000


def test_memory_that_workers_cannot_share_is_said_so(pieces_of: Pieces) -> None:
    """A limit of files holds for it, too."""
    before = set(os.listdir("/proc/self/fd"))
    with small_disk(), pytest.raises(UserError, match=r"the 0\.6 MB that rendering shares .*: File too large"):
        render(pieces_of([(0.0, 0.5, 60, 90)]), backend="fluidsynth")
    assert set(os.listdir("/proc/self/fd")) <= before


def test_the_longest_name_a_file_may_have_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + ".wav")
    write_wav(path, np.zeros((10, 2)), 48000)
    assert soundfile.info(path).frames == 10


def test_a_piece_beyond_an_hour_is_cut_and_says_so(
    pieces_of: Pieces, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an hour of three seconds, for speed."""
    monkeypatch.setattr("fastsmart.audio.rendering.LONGEST_S", 3.0)
    pieces_of([(0.0, 0.5, 60, 90), (2.9, 0.5, 62, 90), (5.0, 0.5, 64, 90)]).to_midi(0, tmp_path / "long.mid")
    pieces_of([(4.0, 0.5, 60, 90)]).to_midi(0, tmp_path / "late.mid")
    pieces_of([(0.0, 0.5, 60, 90)]).to_midi(0, tmp_path / "short.mid")
    assert main(["render", str(tmp_path / "long.mid"), str(tmp_path / "short.mid"), "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "long.wav"), str(tmp_path / "short.wav")]
    (line,) = [line for line in said.err.splitlines() if "cut" in line]
    assert "long.wav is cut at 60 minutes" in line
    assert 3.0 < soundfile.info(tmp_path / "long.wav").duration < 6.1
    assert main(["render", str(tmp_path / "late.mid"), "--workers", "1"]) == 2
    assert "late.wav: the first note is at 0 minutes, and files end at 60" in capsys.readouterr().err
    assert not (tmp_path / "late.wav").exists()


def test_a_piece_without_notes_is_a_second_of_silence(pieces_of: Pieces, tmp_path: Path) -> None:
    render_file(pieces_of([]), 0, tmp_path / "empty.wav", RenderSettings())
    samples, rate = soundfile.read(tmp_path / "empty.wav")
    assert len(samples) == rate
    assert not samples.any()


@pytest.mark.parametrize("release_s", [3.0, 0.02, 0.0])
@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_what_is_written_part_by_part_is_what_is_rendered_at_once(
    name: str, release_s: float, random_pieces: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts, and a spool in memory, of a few thousandths of their size; a release that ends by itself, and one
    that is cut and fades."""
    settings = replace(listening_settings(RenderSettings(), 5.0), release_s=release_s)
    notes = random_pieces(1, seed=5)
    with FluidSynthRenderer(settings) as renderer:
        write_wav(tmp_path / f"whole-{name}", renderer.render_stereo(notes, 0), settings.sample_rate)
        monkeypatch.setattr("fastsmart.audio.fluidsynth.PART", 192)
        monkeypatch.setattr("fastsmart.audio.listening_file.CHUNK", 1000)
        monkeypatch.setattr("fastsmart.audio.listening_file.KEPT_BYTES", 5000)
        render_file(notes, 0, tmp_path / name, renderer=renderer)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"whole-{name}"]


def test_a_long_piece_takes_no_more_memory_than_a_short_one(
    pieces_of: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five minutes with a spool of 1 MiB, which at once would be more than 100 MB of samples."""
    monkeypatch.setattr("fastsmart.audio.listening_file.KEPT_BYTES", 2**20)
    tracemalloc.start()
    try:
        render_file(pieces_of([(0.0, 0.5, 60, 90), (300.0, 0.5, 62, 90)]), 0, tmp_path / "long.wav")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert soundfile.info(tmp_path / "long.wav").duration > 300.0
    assert most < 30e6


def test_a_spool_that_finds_the_disk_full_names_the_file(
    pieces_of: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsmart.audio.listening_file.KEPT_BYTES", 2**10)
    notes = pieces_of([(0.0, 0.5, 60, 90), (2.0, 0.5, 62, 90)])
    with small_disk(), pytest.raises(UserError, match=r"cannot write .*a\.wav: File too large"):
        render_file(notes, 0, tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())
