"""`fastsmart style-stats`, and what CLaMP measures in an evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_notes import made, melody
from small_clamp import SMALL as SMALL_CLAMP
from small_clamp import write_small_clamp

from fastsmart import Config, UserError
from fastsmart.cli import main
from fastsmart.config import merged
from fastsmart.music.covariance import Gaussian, fisher_ratio, frechet_distance
from fastsmart.music.diversity import vendi_score
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.reward.clamp3 import MusicReader, RealStyles
from fastsmart.reward.clamp3.styles import cosines
from fastsmart.study.clamp_measures import BETWEEN, EFFECTIVE, FRECHET, ClampMeasures, prompt_styles
from fastsmart.study.evaluate import evaluate
from fastsmart.study.style_stats import StyleStatsSettings, chosen_windows, style_stats, styled_files
from fastsmart.tokens.token_batch import TokenBatch

SMALL = {"prompts": {"time_signatures": ["4/4"]}, "sampling": {"max_tokens": 60}, "reward": {"terms": {"variety": 1.0}}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSMART_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_small_clamp(tmp_path / "clamp2.pth")


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """Two styles of three pieces each, half a minute and more: low and slow, high and fast; and a manifest."""
    rows = ["path,style,split"]
    for style, low in (("low", 36), ("high", 72)):
        (tmp_path / "real" / style).mkdir(parents=True)
        for i in range(3):
            rng = np.random.default_rng(i)
            step = 12 if style == "low" else 3
            piece = made([[(at, step, int(low + rng.integers(12))) for at in range(0, 900, step)]])
            piece.to_midi(0, tmp_path / "real" / style / f"{i}.mid")
            rows.append(f"{style}/{i}.mid,{style},{'train' if i else 'test'}")
    (tmp_path / "real" / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "real"


def test_style_stats_keeps_what_the_encoder_heard(real, checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "styles.safetensors"
    options = ["--checkpoint", str(checkpoint), "--windows", "7", "--window", "5"]
    assert main(["style-stats", str(real), *options, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "the weights are random" in told
    found = RealStyles.load(out)
    reader = MusicReader(checkpoint)
    assert (found.about.kind, found.about.sha256) == ("CLaMP 2", reader.sha256)
    assert (found.about.writer, found.about.window_s, found.about.styles) == ("note_on", 5.0, ("high", "low"))
    assert np.bincount(found.style).tolist() == [7, 7]
    assert {tuple(np.unique(found.piece[found.style == s])) for s in (0, 1)} == {(0, 1, 2), (3, 4, 5)}
    assert found.vectors.shape == (14, SMALL_CLAMP.out)
    assert "100%" in told  # low and high are told apart
    split = ["--split", "train", "--writer", "note_off"]
    assert main(["style-stats", str(real / "manifest.csv"), *options, *split, "--out", str(out)]) == 0
    train = RealStyles.load(out)
    assert len(np.unique(train.piece)) == 4
    assert train.about.writer == "note_off"
    scored = ["--set", f"reward.clamp_checkpoint={checkpoint}", "--set", f"reward.clamp_styles={out}"]
    piece = str(real / "high" / "0.mid")
    capsys.readouterr()
    for style, sign in (("high", 1), ("low", -1)):
        command = ["score", piece, "--reward", "clamp_style", *scored, "--set", f"reward.clamp_style={style}"]
        assert main(command) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["clamp_style"] * sign > 0
        assert row["weights"] == "random"


def test_windows_go_the_way_of_a_policy_s_clips(real, checkpoint, vocab) -> None:
    """A velocity that tokens round to the same changes nothing."""
    reader, settings = MusicReader(checkpoint), StyleStatsSettings(window_s=5.0)
    before = style_stats(real, reader, vocab, settings).vectors
    for style, low in (("low", 36), ("high", 72)):
        rng, step = np.random.default_rng(0), 12 if style == "low" else 3
        piece = made([[(at, step, int(low + rng.integers(12))) for at in range(0, 900, step)]])
        softer = type(piece)(**{**vars(piece), "velocity": piece.velocity - np.uint8(2)})
        softer.to_midi(0, real / style / "0.mid")
    np.testing.assert_array_equal(style_stats(real, reader, vocab, settings).vectors, before)


def test_windows_are_taken_from_pieces_in_turn() -> None:
    style = np.array([0] * 10 + [0] * 2 + [1] * 3)
    piece = np.array([0] * 10 + [1] * 2 + [2] * 3)
    chosen = chosen_windows(style, piece, 4, 0)
    assert np.bincount(piece[chosen]).tolist() == [2, 2, 3]
    assert chosen_windows(style, piece, 99, 0).tolist() == list(range(15))
    assert chosen_windows(style, piece, 4, 1).tolist() != chosen.tolist()


def test_sources_that_name_no_styles_are_refused(real, tmp_path) -> None:
    def refused(match: str, source: Path, split: str = "") -> None:
        with pytest.raises(UserError, match=match):
            styled_files(source, split)

    refused("no folder of MIDI files for each style", real / "low")
    refused("name its CSV file", real, "train")
    refused("cannot read", tmp_path / "nowhere.csv")
    table = tmp_path / "table.csv"
    table.write_text("path,composer\na.mid,Bach\n")
    refused("lacks the column 'style'", table)
    table.write_text("path,style\na.mid,\n")
    refused("without path or style", table)
    table.write_text("path,style\na.mid,rag\n")
    refused("lacks the column 'split'", table, "train")
    refused("lists no files of split valid", real / "manifest.csv", "valid")


def test_an_evaluation_measures_with_clamp_where_it_is_given(real, checkpoint, tmp_path) -> None:
    config = merged(Config(), SMALL)
    tuned = load_policy("pop909-tiny")
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.2)
    save_policy(tuned, tmp_path / "tuned")
    sources, vocab = ["base=pop909-tiny", str(tmp_path / "tuned")], tuned.vocab
    styles = tmp_path / "styles.safetensors"
    style_stats(real, MusicReader(checkpoint), vocab, StyleStatsSettings()).save(styles)
    plain = evaluate(sources, tmp_path / "e", config, 12, 0)
    assert "clamp" not in plain.record
    found = evaluate(sources, tmp_path / "e", config, 12, 0, clamp=str(checkpoint), clamp_styles=str(styles))
    assert {m.name for m in found.metrics} - {m.name for m in plain.metrics} == {EFFECTIVE, FRECHET}
    assert {m.name for m in found.diversity()} == {m.name for m in plain.diversity()}
    assert found.record["clamp"]["kind"] == "CLaMP 2"
    assert found.record["clamp"]["real"]["writer"] == "note_on"
    assert not found.record["clamp"]["trained_on"]
    notes = found.outputs("tuned").notes(found.vocab, config.audio.max_seconds)
    vectors = MusicReader(checkpoint).read(notes)[notes.counts > 0]
    effective = found.metric("diversity", EFFECTIVE).values["tuned"]
    assert effective.value == pytest.approx(vendi_score(cosines(vectors, vectors)))
    distance = found.metric("diversity", FRECHET).values["tuned"]
    expected = frechet_distance(Gaussian.fit(vectors), Gaussian.fit(RealStyles.load(styles).vectors))
    assert distance.value == pytest.approx(expected)
    assert distance.low < distance.value < distance.high
    trained = merged(config, {"reward": {"terms": {"clamp_style": 1.0}}}).reward
    assert ClampMeasures(str(checkpoint), MusicReader(checkpoint)).about(trained)["trained_on"]


def test_styles_asked_for_are_compared(checkpoint, vocab) -> None:
    names, bar = ["INF1_None", "INF2_None"], vocab.ids_of("Bar")[0]
    ids = [[vocab.bos_id, vocab.id(names[i % 2]), bar] for i in range(8)]
    prompts = TokenBatch.pack(ids)
    assert prompt_styles(prompts, vocab).tolist() == names * 4
    assert set(prompt_styles(TokenBatch.pack([[vocab.bos_id], [vocab.bos_id, bar]]), vocab)) == {""}
    notes = made([melody(i) if i % 2 else [(k * 3, 3, 90) for k in range(30)] for i in range(7)] + [[]])
    reader = MusicReader(checkpoint)
    draws = ClampMeasures(str(checkpoint), reader).draws(prompts, notes, vocab)
    assert set(draws) == {EFFECTIVE, BETWEEN}
    expected = fisher_ratio(reader.read(notes)[:7], np.arange(7) % 2)
    assert draws[BETWEEN].value == pytest.approx(expected)
    assert expected > 0.1


def test_files_that_do_not_fit_are_refused(real, checkpoint, vocab, tmp_path) -> None:
    with pytest.raises(UserError, match="--clamp-styles needs the weights"):
        evaluate(["pop909-tiny"], tmp_path / "e", Config(), 4, 0, clamp_styles=str(checkpoint))
    styles = tmp_path / "styles.safetensors"
    style_stats(real, MusicReader(checkpoint), vocab, StyleStatsSettings()).save(styles)
    other = write_small_clamp(tmp_path / "other.pth", seed=1)
    with pytest.raises(UserError, match="made with other weights"):
        ClampMeasures.of(str(other), str(styles), vocab, "cpu")
    other_vocab = type(vocab)((*vocab.tokens[:-1], "Pitch_0"), vocab.description)
    with pytest.raises(UserError, match="another vocabulary"):
        ClampMeasures.of(str(checkpoint), str(styles), other_vocab, "cpu")
