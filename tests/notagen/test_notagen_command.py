"""NotaGen from the command line: sampled, heard, scored, compared and reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from learnt_notagen import learnt
from tiny_policy import make_policy

from fastsmart import Config, UserError
from fastsmart.cli import main
from fastsmart.config import merged
from fastsmart.notagen.engine import SheetPolicy
from fastsmart.notagen.notation import read_abc
from fastsmart.notagen.weights import save_published
from fastsmart.notes import read_midi
from fastsmart.policy.hf_format import save_policy
from fastsmart.sampling import SamplingSettings
from fastsmart.study.evaluate import evaluate
from fastsmart.study.report import write_report
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import bos
from fastsmart.tokens.token_batch import TokenBatch

STYLE = "Romantic/Chopin, Frederic/Keyboard"
TUNE = """%Romantic
%Chopin, Frederic
%Keyboard
L:1/8
Q:1/4=120
M:4/4
K:D
V:1
V:2
[r:0/1][V:1]DF A2 d4|
[r:1/0][V:1]c4 d4|[V:2]A,8|]
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published form that has learnt the tune."""
    return save_published(learnt(TUNE, steps=200), tmp_path_factory.mktemp("notagen") / "weights.pth", epoch=1)


def test_it_is_sampled_in_a_style_and_heard(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cold = ["--temperature", "0.5", "--wav", "-n", "2"]
    assert main(["sample", "--policy", str(weights), "--style", STYLE, "--out", str(tmp_path), *cold]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{tmp_path / '001.mid'}  {STYLE}: 7 notes, 4.0 s"
    notes = read_midi(tmp_path / "001.mid")
    assert notes.pitch.tolist() == [62, 66, 69, 74, 73, 57, 74]  # D major
    np.testing.assert_allclose(notes.onset_s, [0, 0.25, 0.5, 1, 2, 2, 3], atol=0.002)
    sheet = (tmp_path / "002.abc").read_text()
    assert sheet.startswith("X:1\nL:1/8\n")
    assert "[V:1]DF A2 d4|[V:2]z8|\n" in sheet
    audio, rate = soundfile.read(tmp_path / "002.wav")
    assert len(audio) > 3 * rate
    assert np.abs(audio).max() > 0.01
    assert main(["score", str(tmp_path), "--reward", "consonance", "--reward", "filled_beats"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["001.mid", "002.mid"]
    assert rows[0]["consonance"] == rows[1]["consonance"] > 0


def test_pieces_that_are_no_music_are_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = save_published(learnt(TUNE, steps=0), tmp_path / "untrained.pth")
    other = "Baroque/Vivaldi, Antonio/Chamber"
    short = ["-n", "2", "--max-tokens", "64", "--style", STYLE, "--style", other]
    assert main(["sample", "--policy", str(path), "--out", str(tmp_path), *short]) == 2
    printed = capsys.readouterr()
    assert sorted(line.split("  ")[1] for line in printed.out.splitlines()) == [
        f"{other}: not to be read as music",
        f"{STYLE}: not to be read as music",
    ]  # styles take turns
    assert printed.err.splitlines()[-1] == "fastsmart: 2 of 2 pieces cannot be read as music"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["001.abc", "002.abc", "untrained.pth"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--style", "Chopin"], "the style 'Chopin' is none of the 112"),
        (["--tempo", "60", "70"], "--tempo is for policies that write tokens"),
        (["--bars", "4"], "--bars is for policies that write tokens"),
        (["--engine", "vllm"], "--engine vllm does not serve NotaGen"),
        (["--policy", "notagen-small", "--style", STYLE], "notagen-small was trained without styles"),
        (["--policy", "pop909-tiny", "--style", STYLE], "--style"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
):
    assert main(["sample", "--policy", str(weights), "--out", str(tmp_path / "songs"), *options]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "songs").exists()


def test_it_is_compared_with_a_policy_that_writes_tokens_and_reported(weights: Path, tmp_path: Path, vocab):
    save_policy(make_policy(vocab), tmp_path / "tiny")
    small = {
        "prompts": {"source": "bos"},
        "sampling": {"max_tokens": 80},
        "reward": {"terms": {"filled_beats": 1.0, "variety": 1.0}},
    }
    sources = [f"chopin={weights}@{STYLE}", str(tmp_path / "tiny")]
    found = evaluate(sources, tmp_path / "e", merged(Config(), small), 4, 2)
    assert found.labels == ["chopin", "tiny", "best of 2"]
    assert found.policies[0].source.endswith(STYLE)
    notes = found.outputs("chopin").notes(found.vocab)
    assert notes.counts.max() >= 7
    assert np.isfinite(found.metric("reward", "filled_beats").values["chopin"].value)
    page = write_report(found, tmp_path / "report.html", players=0).read_text()
    assert "chopin" in page
    with pytest.raises(UserError, match=r"prompts\.source=bos"):
        evaluate(sources[:1], tmp_path / "f", merged(Config(), small | {"prompts": {"source": "procedural"}}), 4, 0)


def test_tokens_of_a_piece_are_those_of_its_notes(weights: Path, vocab):
    policy = SheetPolicy(f"{weights}@{STYLE}", vocab)
    (completion,) = policy.engine().stream(bos(vocab, 1).tokens, SamplingSettings(group=1, max_tokens=200), (3,))
    heard = decode(TokenBatch.pack([np.append(vocab.bos_id, completion.ids)]), vocab)
    (asked,), (reason,) = read_piece(policy, 3)
    assert reason == ""
    assert heard.pitch.tolist() == asked[0]
    np.testing.assert_allclose(heard.onset_s, asked[1], atol=0.03)  # a position of the grid
    assert completion.ids[-1] == vocab.eos_id


def read_piece(policy: SheetPolicy, seed: int) -> tuple[list[tuple[list[int], np.ndarray]], list[str]]:
    """Pitches and onsets of piece 0 of a seed, by the sampler itself."""
    from fastsmart.notagen.patches import encode_prompt
    from fastsmart.notagen.sampler import AS_THE_AUTHORS, PatchSampler

    assert policy.style is not None
    prompt = encode_prompt(policy.style.lines)
    with torch.inference_mode():
        (piece,) = PatchSampler(policy.model, AS_THE_AUTHORS)([prompt], (seed,))
    notes, reasons = read_abc([piece.text])
    return [(notes.pitch.tolist(), notes.onset_s)], reasons
