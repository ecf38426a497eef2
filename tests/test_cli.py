"""The command line as a person types it: what it prints, what it leaves, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from token_sources import write_piece

from fastsmart.cli import main
from fastsmart.notes import read_midi


@pytest.fixture
def run(capsys):
    """Run a command in this process: its exit code, stdout and stderr."""

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def one_sentence(error: str) -> bool:
    return error.startswith("fastsmart: ") and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    "command",
    [
        *("pretrain", "train", "profile", "sample", "render", "score", "evaluate", "blend", "frontier", "report"),
        *("listen", "live", "sweep", "doctor"),
    ],
)
def test_every_command_explains_itself(command):
    shown = subprocess.run(
        [sys.executable, "-m", "fastsmart", command, "--help"], capture_output=True, text=True, check=True
    )
    assert f"usage: fastsmart {command}" in shown.stdout


def test_a_dry_run_prints_the_resolved_run_and_writes_nothing(run, tmp_path):
    code, out, _ = run("train", "--preset", "demo", "--set", "train.steps=3", "--out", tmp_path / "r", "--dry-run")
    assert code == 0
    assert "steps = 3" in out
    assert 'source = "pop909-tiny"' in out
    assert not (tmp_path / "r").exists()
    (tmp_path / "again.toml").write_text(out)
    assert run("train", "--config", tmp_path / "again.toml", "--dry-run")[1] == out


def test_sample_render_and_score_work_hand_in_hand(run, checkpoint, tmp_path):
    songs = tmp_path / "songs"
    code, out, _ = run("sample", "--policy", checkpoint, "--out", songs, "-n", 3, "--max-tokens", 80, "--wav")
    assert code == 0
    assert out.count("notes, ") == 3
    assert sorted(p.name for p in songs.iterdir()) == [f"00{i}.{kind}" for i in (1, 2, 3) for kind in ("mid", "wav")]
    first = read_midi(songs / "001.mid")
    run("sample", "--policy", checkpoint, "--out", tmp_path / "same", "-n", 3, "--max-tokens", 80)
    again = read_midi(tmp_path / "same" / "001.mid")
    np.testing.assert_array_equal(first.onset_s, again.onset_s)

    code, out, _ = run("render", songs, "--out", tmp_path / "audio")
    assert code == 0
    assert soundfile.info(tmp_path / "audio" / "001.wav").samplerate == 48000

    run("render", songs, "--flac")
    code, out, err = run("score", songs, "--reward", "consonance", "--reward", "typicality")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [Path(line["path"]).name for line in lines] == ["001.mid", "002.mid", "003.mid"]  # each piece once
    assert "left out 6 audio files" in err
    assert all(0.0 <= line["consonance"] <= 1.0 for line in lines)
    _, out, _ = run("score", songs / "001.mid", songs / "001.wav", "--reward", "brightness")
    assert len(out.splitlines()) == 2  # what is named is scored


def test_scores_are_those_of_the_python_face(run, tmp_path):
    import fastsmart as fs

    write_piece(tmp_path / "piece.mid", 3)
    notes = read_midi(tmp_path / "piece.mid", 10.0)
    clips = fs.Clips(notes, fs.render(notes, backend="fluidsynth", max_seconds=float(notes.end_s[0])))
    rewards = ("consonance", "scale_consistency")
    _, out, _ = run("score", tmp_path / "piece.mid", *(x for name in rewards for x in ("--reward", name)))
    line = json.loads(out)
    for name in rewards:
        assert line[name] == pytest.approx(float(fs.load_reward(name)(clips)[0]), rel=1e-6)


def test_one_bad_file_does_not_spoil_the_others(run, tmp_path):
    write_piece(tmp_path / "a.mid", 0)
    (tmp_path / "b.mid").write_text("not music at all")
    (tmp_path / "c.mid").write_bytes((tmp_path / "a.mid").read_bytes()[:60])
    write_piece(tmp_path / "d.mid", 1)
    code, out, _ = run("score", tmp_path, "--reward", "scale_consistency")
    lines = {Path(line["path"]).name: line for line in map(json.loads, out.splitlines())}
    assert code == 2
    assert "scale_consistency" in lines["a.mid"]
    assert "scale_consistency" in lines["d.mid"]
    assert "b.mid" in lines["b.mid"]["error"]
    assert "c.mid" in lines["c.mid"]["error"]

    code, out, err = run("render", tmp_path)
    assert code == 2
    assert sorted(p.name for p in tmp_path.glob("*.wav")) == ["a.wav", "d.wav"]
    assert "b.mid" in err
    assert "c.mid" in err


def bad_soundfont(folder):
    (folder / "empty.sf2").write_bytes(b"")
    write_piece(folder / "piece.mid", 0)
    return ["render", folder / "piece.mid", "--soundfont", folder / "empty.sf2"], "empty.sf2"


def wrong_vocabulary(folder):
    from tiny_policy import make_policy

    from fastsmart.policy.hf_format import save_policy
    from fastsmart.tokens.vocabulary import load_vocabulary

    save_policy(make_policy(load_vocabulary("smart")), folder / "p")
    description = json.loads((folder / "p" / "tokenizer.json").read_text())
    description["config"]["num_tempos"] = 32
    (folder / "p" / "tokenizer.json").write_text(json.dumps(description))
    return ["sample", "--policy", folder / "p", "--out", folder / "s"], "413 tokens, but its vocabulary has 381"


def typo(folder):
    (folder / "typo.toml").write_text("[train]\nlerning_rate = 1e-4\n")
    return ["train", "--config", folder / "typo.toml", "--out", folder / "r"], "did you mean train.learning_rate?"


def not_writable(folder):
    (folder / "file").write_text("")
    return ["train", "--preset", "demo", "--out", folder / "file" / "run"], "Not a directory"


def no_audiobox(folder):
    sets = ["--set", "reward.terms={audiobox=1}", "--set", f"reward.audiobox_checkpoint={folder / 'none.pt'}"]
    return ["train", "--preset", "demo", *sets, "--out", folder / "r"], "none.pt"


def nothing_to_learn(folder):
    return ["train", "--out", folder / "r"], "reward.terms"


def no_out(folder):
    return ["train", "--preset", "demo"], "--out"


def no_run(folder):
    return ["train", "--resume", "--out", folder / "none"], "no run to resume"


def no_midi(folder):
    return ["pretrain", "--midi", folder, "--out", folder / "r"], "no MIDI files"


def no_preset(folder):
    return [
        "train",
        "--preset",
        "dmo",
        "--out",
        folder / "r",
    ], "there are demo, smart-paper, smart-released, h200, diverse, styles, dpo"


def no_engine(folder):
    return ["train", "--preset", "demo", "--engine", "warp", "--out", folder / "r"], "sampling.engine"


def no_reward(folder):
    write_piece(folder / "piece.mid", 0)
    return ["score", folder / "piece.mid", "--reward", "consonanse"], "did you mean consonance?"


MISTAKES = [
    bad_soundfont,
    wrong_vocabulary,
    typo,
    not_writable,
    no_audiobox,
    nothing_to_learn,
    no_out,
    no_run,
    no_midi,
    no_preset,
    no_engine,
    no_reward,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(run, tmp_path, mistake):
    arguments, says = mistake(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert one_sentence(err), err
    assert says in err


def test_doctor_finds_what_the_demo_needs(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "reward.audiobox_dtype 'auto' is" in " ".join(out.split())
    assert all(what in out for what in ("PyTorch", "FluidSynth", "soundfont", "shipped policy", "vLLM", "Audiobox"))


def test_pretrain_makes_a_release_that_can_be_sampled(run, tmp_path):
    for seed in range(20):
        write_piece(tmp_path / f"{seed}.mid", seed, bars=24)
    (tmp_path / "damaged.mid").write_bytes(b"MThd")
    out_folder = tmp_path / "base"
    sizes = ["--layers", 1, "--hidden", 32, "--ffn", 64, "--steps", 20, "--length", 64, "--eval-every", 10]
    options = ["--name", "test pieces", "--licence", "CC0"]
    code, _, err = run("pretrain", "--midi", tmp_path, "--out", out_folder, *sizes, *options)
    assert code == 0, err
    assert "left out damaged.mid" in err
    card = (out_folder / "release" / "README.md").read_text()
    assert all(text in card for text in ("test pieces", "CC0", "unigram", "bigram", "scale consistency", "real pieces"))
    assert json.loads((out_folder / "release" / "typicality.json").read_text())
    code, _, _ = run("sample", "--policy", out_folder / "release", "--out", tmp_path / "s", "-n", 1, "--max-tokens", 20)
    assert code == 0


def test_the_version_is_that_of_the_package(capsys):
    import fastsmart

    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"fastsmart {fastsmart.__version__}\n"
    assert fastsmart.__version__[0].isdigit()


@pytest.mark.parametrize(
    "arguments", [[], ["tune"], ["sweep"], ["top", "a", "b"], ["listen", "power", "--effect", "x"]]
)
def test_what_the_parser_refuses_is_one_sentence_that_names_the_help(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert one_sentence(err), err
    assert "--help says what there is" in err


def test_a_name_that_breaks_lines_or_steers_a_terminal_stays_in_its_line(run):
    code, _, err = run("render", "a\nb\x1b[31m.mid")
    assert code == 2
    assert one_sentence(err)
    assert err == "fastsmart: no file a?b?[31m.mid\n"


def test_a_sentence_that_quotes_a_damaged_file_has_an_end(run, tmp_path):
    record = {"policies": [{"x" * 20_000: 1}], "metrics": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    code, _, err = run("listen", "make", tmp_path, "--out", tmp_path / "t")
    assert code == 2
    assert one_sentence(err)
    assert len(err) < 2100


def test_a_terminal_without_the_characters_gets_question_marks_and_names_their_bytes(tmp_path):
    import os

    odd = os.fsencode(tmp_path) + b"/\xff\xc3\xbc.mid"
    write_piece(tmp_path / "piece.mid", 0, bars=1)
    os.rename(tmp_path / "piece.mid", odd)
    for encoding in ("ascii", "utf-8"):
        env = os.environ | {"PYTHONIOENCODING": encoding, "LANG": "C"}
        done = subprocess.run([sys.executable, "-m", "fastsmart", "render", odd], capture_output=True, env=env)
        assert done.returncode == 0, done.stderr
        shown = b"??.wav" if encoding == "ascii" else b"\xff\xc3\xbc.wav"
        assert done.stdout.rstrip().endswith((shown, b"\xff?.wav", b"\xff\xc3\xbc.wav"))
    old_run = Path(__file__).parent / "run" / "old_run" / "run"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "LANG": "C"}
    done = subprocess.run([sys.executable, "-m", "fastsmart", "top", old_run], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert b"held-out reward" in done.stdout


def test_a_phrase_is_continued_at_its_tempo(run, checkpoint, tmp_path):
    import mido

    file = mido.MidiFile(ticks_per_beat=480)
    track = mido.MidiTrack()
    file.tracks.append(track)
    track.append(mido.MetaMessage("time_signature", numerator=3, denominator=4))
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(100)))
    for pitch in (60, 64, 67, 72, 71, 69):  # two bars of 3/4
        track.append(mido.Message("note_on", note=pitch, velocity=80))
        track.append(mido.Message("note_off", note=pitch, time=480))
    file.save(tmp_path / "my.mid")
    words = ["sample", "--policy", checkpoint, "-n", 2, "--max-tokens", 60, "--prompt", tmp_path / "my.mid"]
    for bars, kept in (([], 6), (["--bars", 1], 3), (["--bars", 9], 6)):
        code, out, err = run(*words, "--out", tmp_path / "s", *bars)
        assert code == 0, err
        assert "goes on from" in out
        for name in ("001.mid", "002.mid"):
            notes = read_midi(tmp_path / "s" / name)
            began = notes.onset_tick < kept * notes.ticks_per_beat
            assert [60, 64, 67, 72, 71, 69][:kept] == notes.pitch[began][:kept].tolist()
            assert abs(notes.tempo_bpm[0] - 100) < 2  # the nearest of the vocabulary's
            assert notes.meter[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda path: path.write_text("no music"), [], "my.mid as MIDI"),
        (lambda path: None, [], "my.mid"),
        (
            lambda path: write_piece(path, 0),
            ["--tempo", "60", "90"],
            "--tempo and --time-signature are of the openings",
        ),
        (lambda path: write_piece(path, 0), ["--max-tokens", "2040"], "take fewer --bars"),
        (
            lambda path: write_piece(path, 0),
            ["--max-tokens", "3000"],
            "--max-tokens is 3000, and the policy holds 2048",
        ),
        (lambda path: path.write_bytes(late_note()), [], "my.mid: it goes on for 4,473,924 beats"),
        (lambda path: path.write_bytes(late_note()), ["--bars", "2"], "my.mid: no note begins in its first 2 bars"),
    ],
)
def test_a_phrase_that_cannot_be_continued_is_named(run, checkpoint, tmp_path, make, options, says):
    make(tmp_path / "my.mid")
    words = ["--policy", checkpoint, "--out", tmp_path / "s", "--prompt", tmp_path / "my.mid"]
    code, _, err = run("sample", *words, *options)
    assert code == 2
    assert one_sentence(err)
    assert says in err, err
    assert not list(tmp_path.glob("s/*.mid"))
    assert "--bars is of" in run("sample", "--policy", checkpoint, "--out", tmp_path / "s", "--bars", "2")[2]


def late_note() -> bytes:
    """A MIDI file of one note after months of rest."""
    import io

    import mido

    file, sink = mido.MidiFile(ticks_per_beat=60), io.BytesIO()
    file.tracks.append(mido.MidiTrack([mido.Message("note_on", note=60, time=2**28 - 1)]))
    file.tracks[0].append(mido.Message("note_off", note=60, time=60))
    file.save(file=sink)
    return sink.getvalue()
