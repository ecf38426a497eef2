"""DPO on NotaGen: what its steps do, and a run that ends at any instant goes on to the same digits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from learnt_notagen import learnt

from fastsmart import Config, UserError
from fastsmart.cli import main
from fastsmart.config import merged
from fastsmart.notagen.patches import encode
from fastsmart.notagen.weights import is_notagen, load_notagen, save_published
from fastsmart.notes import read_midi
from fastsmart.trainer import sheet_dpo
from fastsmart.trainer.sheet_dpo import piece_logprob, train_sheets
from fastsmart.trainer.sheets import Sheets

STYLE = "Romantic/Chopin, Frederic/Keyboard"
TUNE = """%Romantic
%Chopin, Frederic
%Keyboard
L:1/8
M:4/4
K:D
V:1
[r:0/1][V:1]DF A2 d4|
[r:1/0][V:1]c4 d4|]
"""
ASKED = {
    "prompts": {"source": "bos", "styles": [STYLE]},
    "sampling": {"group": 6, "max_tokens": 100},
    "reward": {"terms": {"variety": 1.0, "pitch_range": 1.0}},
    "dpo": {"prompts": 2, "round_steps": 3, "pairs": 2, "keep": 0.34, "fewest_notes": 1, "refuse": ["empty"]},
    "train": {
        "algorithm": "dpo", "steps": 6, "learning_rate": 1e-4, "schedule": "constant",
        "eval_prompts": 4, "listen": 2, "save_every": 0, "keep": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published form that has half learnt the tune, so that its pieces differ."""
    return save_published(learnt(TUNE, steps=40), tmp_path_factory.mktemp("notagen") / "weights.pth", epoch=1)


def config_for(weights: Path, *changes: dict) -> Config:
    config = merged(Config(), {"policy": {"source": str(weights)}})
    for change in (ASKED, *changes):
        config = merged(config, change)
    return config


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sheets") / "run"
    done = train_sheets(config_for(weights), folder)
    assert (done.step, done.exit_code, done.policy) == (6, 0, folder / "checkpoints" / "step-000006")
    return folder


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_the_log_prob_of_a_piece_is_the_sum_over_its_drawn_characters(weights: Path) -> None:
    model, patches = load_notagen(weights), encode(TUNE)
    whole = torch.from_numpy(patches.astype(np.int64))[None]
    for begin in (1, 4):
        ours = piece_logprob(model, patches, begin)
        told = model.patch_level_decoder(whole)[0, begin - 1 : -1]
        logits = model.char_level_decoder(told, whole[0, begin:])
        expected = -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), whole[0, begin:].flatten(), ignore_index=0, reduction="sum"
        )
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_lines_say_what_rounds_and_pairs_did(run: Path) -> None:
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["round"]["number"] for line in lines[1:]] == [0, 0, 0, 1, 1, 1]
    first = lines[1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the network is its own reference
    assert first["chosen_gain"] == pytest.approx(0, abs=1e-4)
    assert lines[4]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # and so at the next round's first step
    assert lines[3]["loss"] < first["loss"]
    assert lines[3]["accuracy"] == 1.0
    for line in lines[1:]:
        assert line["round"]["chosen_reward"] > line["round"]["rejected_reward"]
        assert line["pairs"] == 2
    assert lines[0]["eval"]["clips"] == lines[6]["eval"]["clips"] == 4


def test_a_run_leaves_what_a_person_opens(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (run / "before_after.md").read_text().startswith("# Before and after 6 steps: 4 outputs on held-out")
    assert len(read_midi(run / "listen" / "01-before.mid")) == 1
    assert "before and after 6 steps" in (run / "listen" / "index.html").read_text()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    assert is_notagen(str(run))
    base, tuned = (load_notagen(source) for source in (run / "checkpoints" / "step-000003", run))
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))
    assert main(["sample", "--policy", str(run), "--style", STYLE, "-n", "4", "--out", str(tmp_path / "songs")]) == 0
    assert list((tmp_path / "songs").glob("*.mid"))
    assert "notes" in capsys.readouterr().out


class Killed(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(
    ("name", "call", "done"),
    [("piece_logprob", 2, 0), ("step_if_finite", 2, 0), ("step_if_finite", 5, 3), ("choose", 2, 3)],
)
def test_ended_anywhere_it_goes_on_to_the_same_digits(
    weights: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int, done: int
) -> None:
    honest, calls = getattr(sheet_dpo, name), iter(range(1, 10**6))

    def function(*args, **kwargs):
        if next(calls) == call:
            raise Killed(name)
        return honest(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sheet_dpo, name, function)
        with pytest.raises(Killed):
            train_sheets(config_for(weights), tmp_path / "run")
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert saved == ([f"step-{done:06d}"] if done else [])
    train_sheets(config_for(weights), tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(run)
    ours, theirs = (load_notagen(folder) for folder in (tmp_path / "run", run))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_within_a_round_it_goes_on_from_what_the_round_kept(weights: Path, run: Path, tmp_path: Path) -> None:
    often = {"train": {"save_every": 1, "keep": 10}}
    train_sheets(config_for(weights, often, {"train": {"steps": 2}}), tmp_path / "run")
    train_sheets(config_for(weights), tmp_path / "run", True, changes={"train.steps": 6})
    assert [line["loss"] for line in lines_of(tmp_path / "run")[1:]] == [line["loss"] for line in lines_of(run)[1:]]


def test_a_reward_that_is_the_same_for_all_moves_nothing(tmp_path: Path) -> None:
    weights = save_published(learnt(TUNE, steps=200), tmp_path / "by-heart.pth")
    train_sheets(config_for(weights, {"train": {"steps": 1}}), tmp_path / "run")
    assert lines_of(tmp_path / "run")[1]["pairs"] == 0
    tuned, base = load_notagen(tmp_path / "run"), load_notagen(weights)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True))


def test_it_is_evaluated_along_the_way(weights: Path, tmp_path: Path) -> None:
    train_sheets(config_for(weights, {"train": {"steps": 3, "eval_every": 1}}), tmp_path / "run")
    assert ["eval" in line for line in lines_of(tmp_path / "run")] == [True] * 4


def test_a_gradient_that_is_never_finite_ends_the_run(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sheet_dpo.piece_logprob
    monkeypatch.setattr(sheet_dpo, "piece_logprob", lambda *given: honest(*given) * float("nan"))
    with pytest.raises(UserError, match="not finite 3 steps in a row, so nothing has been learnt since step 0"):
        train_sheets(config_for(weights), tmp_path / "run")
    tuned, base = load_notagen(tmp_path / "run"), load_notagen(weights)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True))


def test_sheets_come_back_as_they_were(tmp_path: Path, run: Path) -> None:
    path = run / "rounds" / "sheets-0000.npz"
    kept = Sheets.load(path)
    assert kept is not None
    kept.save(tmp_path / "again.npz", "some weights")
    again = Sheets.load(tmp_path / "again.npz", "some weights")
    assert again is not None
    for ours, theirs in zip(again.patches, kept.patches, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again.scores.total, kept.scores.total)
    assert Sheets.load(tmp_path / "again.npz", "other weights") is None
    path = tmp_path / "damaged.npz"
    path.write_bytes((tmp_path / "again.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"damaged\.npz cannot be read"):
        Sheets.load(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompts": {"styles": ["Chopin"]}}, "the style 'Chopin' is none of the 112"),
        ({"policy": {"source": "notagen-small"}}, "were trained without styles"),
        ({"dpo": {"training_set": "pieces"}}, r"dpo\.training_set is for policies that write tokens"),
        ({"train": {"average": 0.9}}, r"train\.average is for policies that write tokens"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(weights: Path, tmp_path: Path, change: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        train_sheets(config_for(weights, change), tmp_path / "run")


def test_another_algorithm_than_dpo_is_refused(weights: Path, tmp_path: Path) -> None:
    config = merged(Config(), {"policy": {"source": str(weights)}, "reward": ASKED["reward"]})
    with pytest.raises(UserError, match=r"NotaGen is trained by preferences alone, and train\.algorithm is 'grpo'"):
        train_sheets(config, tmp_path / "run")


def test_the_command_trains_it(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["dpo.prompts=1", "dpo.round_steps=1", "dpo.fewest_notes=1", "train.steps=1", "train.eval_prompts=2"]
    short += ["train.listen=1", "sampling.group=6", "sampling.max_tokens=100", "reward.terms={variety=1}"]
    options = [part for key in short for part in ("--set", key)]
    source = ["--set", f"policy.source={weights}@{STYLE}", "--preset", "notagen-dpo"]
    assert main(["train", *source, *options, "--out", str(tmp_path / "run")]) == 0
    assert "Before and after 1 steps" in capsys.readouterr().out
