"""Rounds of training on a taste, and tastes and constraints on the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_notes import made, melody
from small_run import config_for

from fastsmart.cli import main
from fastsmart.config import Config, read_config, with_overrides
from fastsmart.errors import UserError
from fastsmart.run.folder import RunFolder
from fastsmart.run.resumed_config import resumed_config
from fastsmart.taste import Choice, Standard, Taste
from fastsmart.taste.training import go_back, newest_policy, taste_config, train_round


@pytest.fixture
def taste(tmp_path: Path) -> Path:
    """The file of a taste for high notes."""
    notes = made([melody(seed) for seed in range(40)])
    standard = Standard.of(notes)
    high = standard.mean + 2 * standard.std * (np.array(standard.names) == "register")
    choices = [Choice(f"n{k}", 0.0, "", "high", "mean", "left") for k in range(8)]
    path = tmp_path / "taste.json"
    Taste.fit(choices, {"high": high, "mean": standard.mean}, standard).save(path)
    return path


def test_rounds_go_on_from_each_other_and_back(checkpoint: Path, taste: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = config_for(checkpoint, {"reward": {"terms": {"taste": 1.0}, "normalize": "none"}})
    config = replace(small, train=replace(small.train, eval_every=0, save_every=0, listen=0, keep=9))
    with pytest.raises(UserError, match="no run"):
        newest_policy(out)
    assert train_round(out, config, taste, steps=1, beta=0.04).name == "step-000001"
    text = taste.read_text()
    taste.unlink()
    taste.with_name("newer.json").write_text(text)
    assert train_round(out, config, taste.with_name("newer.json"), steps=2, beta=0.5).name == "step-000003"
    own = read_config(out / "config.toml")
    assert (own.grpo.beta, own.train.steps) == (0.5, 3)
    assert Path(own.reward.taste).read_text() == text
    assert Path(own.reward.taste).is_relative_to(out)  # what it learns from is kept with the run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(np.isfinite(line["terms"]["taste"]) for line in lines[1:])

    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 3"):
        go_back(out, 7)
    assert go_back(out, 1).name == newest_policy(out).name == "step-000001"
    assert len(list((out / "undone").iterdir())) == 1
    assert train_round(out, config, taste.with_name("newer.json"), steps=1, beta=0.5).name == "step-000002"


def test_only_a_run_that_is_taught_may_change_what_it_learns_from(tmp_path: Path) -> None:
    changes = {"reward.taste": "b.json", "grpo.beta": 0.2}
    taught = taste_config("pop909-tiny", "a.json")
    assert resumed_config(taught, changes, tmp_path, 5).grpo.beta == 0.2
    other = with_overrides(Config(), ["reward.terms.variety=1"])
    with pytest.raises(UserError, match=r"other settings \(reward.taste, grpo.beta\)"):
        resumed_config(other, changes, tmp_path, 5)
    with pytest.raises(UserError, match="other settings"):
        resumed_config(taught, {"policy.source": "x"}, tmp_path, 5)
    assert RunFolder.begun(tmp_path) is False


def test_train_takes_rewards_by_name(capsys: pytest.CaptureFixture) -> None:
    asked = ["--preset", "demo", "--reward", "constraint", "--set", 'reward.constraint.key="C major"']
    assert main(["train", *asked, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "[reward.terms]\nconstraint = 1.0\n\n" in shown
    assert 'key = "C major"' in shown
    assert main(["train", "--reward", "constrain", "--dry-run"]) == 2
    assert "did you mean constraint?" in capsys.readouterr().err


def test_score_takes_a_taste_and_constraints(taste: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    notes = made([melody(1)])
    notes.to_midi(0, tmp_path / "a.mid")
    asked = ["--reward", "taste", "--taste", str(taste), "--reward", "constraint", "--constraint", "lowest=21"]
    assert main(["score", str(tmp_path / "a.mid"), *asked]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["constraint"] == 1.0
    assert np.isfinite(line["taste"])
    assert main(["score", str(tmp_path / "a.mid"), "--reward", "taste"]) == 2
    assert "name it in reward.taste" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "a.mid"), "--reward", "constraint", "--constraint", "kye=C"]) == 2
    assert "did you mean reward.constraint.key?" in capsys.readouterr().err
