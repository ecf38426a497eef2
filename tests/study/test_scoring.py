"""Files to scores: formats, channels, rates, errors in place, and going on where a run was cut short."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly
from token_sources import write_piece

from fastsmart.audio import AudioBatch
from fastsmart.cli import main
from fastsmart.errors import UserError
from fastsmart.reward import Clips, load_reward
from fastsmart.reward.audiobox import make_random_weights
from fastsmart.reward.audiobox.architecture import Size
from fastsmart.study.scoring import read_audio

RATE = 16_000
SMALL = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)


def tone(seconds: float, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_random_weights(tmp_path / "weights" / "checkpoint.pt", size=SMALL)


@pytest.mark.parametrize(
    ("name", "subtype", "step"),
    [
        ("a.wav", "PCM_U8", 2.0**-7),
        ("a.wav", "PCM_16", 2.0**-15),
        ("a.wav", "PCM_24", 2.0**-23),
        ("a.wav", "FLOAT", 1e-7),
        ("a.flac", "PCM_16", 2.0**-15),
    ],
)
def test_every_sample_format_gives_the_same_sound(tmp_path: Path, name: str, subtype: str, step: float) -> None:
    soundfile.write(tmp_path / name, tone(0.2), RATE, subtype=subtype)
    audio = read_audio(tmp_path / name)
    np.testing.assert_allclose(audio.clip(0), tone(0.2), atol=step)


def test_channels_are_averaged(tmp_path: Path) -> None:
    channels = np.stack([k * tone(0.1) / 6 for k in range(6)], axis=1)
    soundfile.write(tmp_path / "six.wav", channels, RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "six.wav").clip(0), channels.mean(1), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000, 96_000])
def test_other_rates_sound_the_same(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav")
    assert audio.lengths[0] == RATE
    np.testing.assert_allclose(audio.clip(0)[500:-500], tone(1.0)[500:-500], atol=5e-3)
    common = np.gcd(rate, RATE)
    other = resample_poly(tone(1.0, rate), RATE // common, rate // common)
    np.testing.assert_allclose(audio.clip(0)[500:-500], other[500:-500], atol=1e-2)


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.0]), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", tone(1.0)[:50], 100)
    soundfile.write(tmp_path / "prime.wav", tone(0.1), 44_101)
    (tmp_path / "text.wav").write_text("no sound")
    for name, says in (
        ("empty", "no audio"),
        ("nan", "not finite"),
        ("slow", "100 Hz"),
        ("prime", "44101 Hz"),
        ("text", "not a readable"),
    ):
        with pytest.raises(UserError, match=f"{name}.wav .*{says}"):
            read_audio(tmp_path / f"{name}.wav")


def test_a_folder_is_scored_in_order_with_errors_in_their_place(run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "songs"
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.stack([tone(0.5)] * 2, axis=1), RATE)
    (folder / "b.wav").write_text("no sound")
    write_piece(folder / "c.mid", 3)
    (folder / "d.mid").write_text("no music")
    soundfile.write(folder / "e.flac", tone(0.1)[:1], RATE)
    code, lines, err = run("score", folder, "--reward", "audiobox", "--checkpoint", checkpoint)
    assert code == 2
    assert [Path(line["path"]).name for line in lines] == ["a.wav", "b.wav", "c.mid", "d.mid", "e.flac"]
    assert ["error" in line for line in lines] == [False, True, False, True, False]
    assert "weights of audiobox are random" in err
    audio = read_audio(folder / "a.wav")
    ratings = load_reward("audiobox", checkpoint=checkpoint).rate(Clips(range(1), audio))  # type: ignore[arg-type]
    for axis, values in ratings.items():
        assert lines[0][axis] == pytest.approx(float(values[0]), abs=1e-6)
        assert np.isfinite(lines[2][axis])
    assert lines[0]["audiobox"] == pytest.approx(lines[0]["CE"] / 10)
    assert lines[0]["weights"] == "random"
    assert isinstance(audio, AudioBatch)


def test_a_piece_too_long_to_be_rendered_is_said_so_and_the_others_go_on(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an hour of eight seconds; a reward that reads notes takes the piece as it is."""
    monkeypatch.setattr("fastsmart.audio.rendering.LONGEST_S", 8.0)
    for i, bars in enumerate((1, 30, 1)):
        write_piece(tmp_path / f"{i}.mid", i, bars=bars)
    code, lines, err = run("score", tmp_path, "--reward", "brightness", "--max-seconds", "0")
    assert code == 2
    assert ["error" in line for line in lines] == [False, True, False]
    assert "minutes, and 60 can be rendered; name --max-seconds" in lines[1]["error"]
    assert "1 of 3 files" in err
    code, lines, _ = run("score", tmp_path, "--reward", "variety", "--max-seconds", "0")
    assert code == 0
    assert "error" not in lines[1]
    assert run("score", tmp_path, "--reward", "brightness", "--max-seconds", "2")[0] == 0


def test_a_run_cut_short_goes_on_and_tries_errors_again(run, tmp_path: Path) -> None:
    songs, out = tmp_path / "songs", tmp_path / "scores.jsonl"
    songs.mkdir()
    for i in range(4):
        write_piece(songs / f"{i}.mid", i)
    whole = (songs / "2.mid").read_bytes()
    (songs / "2.mid").write_bytes(whole[:60])
    score = ("score", songs, "--reward", "polyphony_rate", "--out", out)
    assert run(*score)[0] == 2
    lines = out.read_text().splitlines(keepends=True)
    assert "error" in json.loads(lines[2])

    marked = json.loads(lines[0]) | {"polyphony_rate": 123.0}  # shows that the row was kept and not made again
    out.write_text(json.dumps(marked) + "\n" + lines[1] + lines[2] + lines[3][:20])
    (songs / "2.mid").write_bytes(whole)
    code, _, err = run(*score)
    assert code == 2
    assert "--resume" in err
    assert run(*score, "--resume")[0] == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(Path(row["path"]).name for row in rows) == ["0.mid", "1.mid", "2.mid", "3.mid"]
    assert rows[0] == marked
    assert all(np.isfinite(row["polyphony_rate"]) for row in rows)
    code, _, err = run("score", songs, "--reward", "variety", "--out", out, "--resume")
    assert code == 2
    assert "scored with other rewards" in err


@pytest.mark.parametrize("text", ["hello", "{", "[1, 2", '{"paths": '])
def test_a_strangers_file_without_a_newline_is_left_as_it_is(run, tmp_path: Path, text: str) -> None:
    write_piece(tmp_path / "a.mid", 0)
    out = tmp_path / "notes.txt"
    out.write_text(text)
    code, _, err = run("score", tmp_path / "a.mid", "--reward", "variety", "--out", out, "--resume")
    if text == "{":  # where a row may have been torn
        assert code == 0
        return
    assert code == 2
    assert "notes.txt line 1 is no row of fastsmart score" in err
    assert out.read_text() == text
