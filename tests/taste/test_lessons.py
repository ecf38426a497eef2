"""Lessons by a taste, and tastes and constraints on the command line."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_notes import made, melody
from small_run import config_for

from fastsmart.cli import main
from fastsmart.config import Config, read_config, with_overrides
from fastsmart.errors import UserError
from fastsmart.policy.hf_format import load_policy
from fastsmart.run.display import Silent
from fastsmart.run.folder import RunFolder
from fastsmart.run.resumed_config import resumed_config
from fastsmart.taste import Choice, Standard, Taste
from fastsmart.taste.lessons import (
    CLOSE,
    FARTHEST,
    KEPT,
    Lesson,
    LessonFolder,
    _mean_taste,
    _share,
    lesson_config,
    teach,
)


@pytest.fixture
def taste(tmp_path: Path) -> Path:
    """The file of a taste for high notes."""
    path = tmp_path / "taste.json"
    learn(path, "left")
    return path


def learn(path: Path, answer: str) -> None:
    """Write the taste of a listener who always says this of high notes beside middling ones."""
    notes = made([melody(seed) for seed in range(40)])
    standard = Standard.of(notes)
    high = standard.mean + 2 * standard.std * (np.array(standard.names) == "register")
    taste, choices = Taste.unknown(standard), list[Choice]()
    for number in range(8):
        choices.append(Choice(f"n{number}", 0.0, "", "high", "mean", answer))
        taste = Taste.fit(choices, {"high": high, "mean": standard.mean}, standard, taste)
    taste.save(path)


def small_lesson(**credit: float) -> Config:
    return config_for(
        Path("pop909-tiny"),
        {"sampling": {"group": 2}, "reward": {"terms": {"taste": 1.0}, "normalize": "none"}},
        {"train": {"algorithm": "credit", "steps": 4, "prompts": 4, "eval_every": 0, "save_every": 0, "listen": 0}},
        {"credit": {"prompts": 4, "round_steps": 2, "clips": 4} | credit},
        {"merge": {"tilt_steps": 2}, "tilt": {"prompts": 4, "clips": 4, "weights": "diverse"}},
    )


def test_a_lesson_tunes_the_first_policy_to_a_taste_which_it_keeps(taste: Path, tmp_path: Path) -> None:
    out, known = tmp_path / "lesson", Taste.load(taste)
    policy = teach(out, small_lesson(), taste, goal=9.0)
    assert policy == out / "policy"
    assert (out / "taste.json").read_text() == taste.read_text()
    own = read_config(out / "config.toml")
    assert Path(own.reward.taste) == (out / "taste.json").resolve()
    assert own.credit.goal == 9.0 * known.borne_out > 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(np.isfinite(line["terms"]["taste"]) for line in lines[1:])
    rounds = ["value_r2", "value_r2", "effective_clips", "effective_clips"]  # credit, then the most diverse clips
    assert all(name in line["round"] for name, line in zip(rounds, lines[1:], strict=True))
    with pytest.raises(UserError, match="already holds a run"):
        teach(out, small_lesson(), taste, goal=9.0)


def test_where_nothing_came_true_nothing_is_learnt(taste: Path, tmp_path: Path) -> None:
    known = Taste.load(taste)
    replace(known, predictions=()).save(taste)
    policy = teach(tmp_path / "lesson", small_lesson(), taste, goal=9.0)
    base, tuned = (load_policy(source).state_dict() for source in ("pop909-tiny", policy))
    assert all(torch.equal(base[name], tuned[name]) for name in base)
    assert read_config(tmp_path / "lesson" / "config.toml").credit.goal == 0
    assert not RunFolder.read(tmp_path / "lesson").metrics.lines()  # nor is anything trained


def test_a_folder_knows_its_finished_lessons_and_begins_the_next(tmp_path: Path) -> None:
    lessons = LessonFolder(tmp_path / "lessons")
    assert lessons.finished() == []
    first = lessons.begin("a1", 6, 1.2, "ann")
    assert (first.number, first.path.name) == (1, "lesson-0001")
    assert lessons.finished() == []
    again = lessons.begin("a2", 7, 0.5)  # the first was cut off
    assert again.path == first.path
    finish(again)
    assert lessons.finished() == LessonFolder(tmp_path / "lessons").finished() == [again]
    second = lessons.begin("a9", 12, 1.2, "ann")
    finish(second)
    assert [lesson.number for lesson in lessons.finished()] == [1, 2]
    lessons.go_back(1)
    assert lessons.finished() == [again]
    assert lessons.begin("a9", 12, 1.2, "ann").number == 2
    lessons.go_back(0)
    assert lessons.finished() == []
    assert sorted(path.name for path in (tmp_path / "lessons" / "undone").iterdir()) == [
        "0000-lesson-0002", "0001-lesson-0001", "0002-lesson-0002"
    ]  # fmt: skip


def test_a_lesson_that_was_stopped_is_not_finished(taste: Path, tmp_path: Path, monkeypatch) -> None:
    out, steps = tmp_path / "lesson", []

    def say(display: Silent, line: dict) -> None:
        steps.append(line["step"])
        if steps[-1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Silent, "line", say)
    policy = teach(out, small_lesson(), taste, goal=9.0, display=Silent())
    assert steps[-1] < 4
    assert policy.parent == out / "checkpoints"
    assert not (out / "policy").exists()


@pytest.mark.parametrize("wanted", [0.2, 0.5, 1.0, 1.5])
def test_what_goes_beyond_the_goal_is_taken_back(wanted: float) -> None:
    """Also where half of a change has three quarters of its gain."""
    asked: list[float] = []

    def gain(share: float) -> float:
        asked.append(share)
        return 2 * (2 * share - share**2)

    share = _share(wanted, 2.0, gain)
    assert abs(gain(share) - wanted) <= 0.03 + 1e-9
    assert len(asked) <= 5
    assert asked[0] == wanted / 2


@pytest.mark.parametrize("whole", [2.0, 1.98, 2.02])
def test_at_the_goal_nothing_is_tried(whole: float) -> None:
    assert _share(2.0, whole, lambda tried: pytest.fail("asked")) == 1.0


@pytest.mark.parametrize("whole", [0.0, -0.3, math.nan])
def test_of_a_lesson_that_gained_nothing_nothing_is_kept(whole: float) -> None:
    assert _share(1.0, whole, lambda tried: pytest.fail("asked")) == 0.0


@pytest.mark.parametrize("wanted", [1.1, 1.2, 1.3])
def test_where_a_lesson_falls_short_its_change_goes_further(wanted: float) -> None:
    """Also where half as much again has only a third more."""

    def gain(share: float) -> float:
        return 4 * share / (3 + share)

    share = _share(wanted, gain(1.0), gain)
    assert 1 < share < FARTHEST
    assert abs(gain(share) - wanted) <= CLOSE + 1e-9


def test_it_goes_no_further_than_it_may_and_not_where_that_gains_nothing() -> None:
    assert _share(3.0, 1.0, lambda tried: tried) == FARTHEST
    assert _share(1.2, 1.0, lambda tried: 1.0 - (tried - 1)) == 1.0
    assert _share(1.2, 1.0, lambda tried: 1.0 if tried < 1.1 else 1.4) == pytest.approx(1.1, abs=0.11)


def test_where_nothing_can_be_scored_the_share_is_a_number() -> None:
    assert _share(0.5, 2.0, lambda tried: math.nan) == 0.25


def test_other_policies_play_the_held_out_clips_as_the_lesson_does(taste: Path, tmp_path: Path) -> None:
    out = tmp_path / "lesson"
    teach(out, small_lesson(), taste, goal=9.0)
    run = RunFolder.read(out)
    means = [line["eval"]["terms"]["taste"]["mean"] for line in run.metrics.lines() if "eval" in line]
    played = (_mean_taste(run.config, load_policy(source)) for source in ("pop909-tiny", out))
    assert list(played) == pytest.approx(means, abs=1e-6)
    assert means[0] != means[1]


def test_the_oldest_lessons_go_but_no_folder_of_another_name(tmp_path: Path) -> None:
    lessons, own = LessonFolder(tmp_path), tmp_path / "lesson-0001-the-good-one"
    own.mkdir()
    for number in range(KEPT + 3):
        finish(lessons.begin(f"a{number}", number, 1.2))
    assert [lesson.number for lesson in lessons.finished()] == list(range(4, KEPT + 4))
    assert own.is_dir()


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    lesson = LessonFolder(tmp_path).begin("a", 6, 1.2)
    for text in ("{", "[]", '{"after": "a"}'):
        (lesson.path / "lesson.json").write_text(text)
        with pytest.raises(UserError, match=r"lesson-0001/lesson\.json is damaged; remove the folder"):
            LessonFolder(tmp_path).finished()


def finish(lesson: Lesson) -> None:
    lesson.policy.mkdir(parents=True)


def test_only_a_run_that_is_taught_may_change_what_it_learns_from(tmp_path: Path) -> None:
    changes = {"reward.taste": "b.json", "reward.taste_caution": 0.2}
    steered = with_overrides(Config(), ["reward.terms.taste=1", 'reward.taste="a.json"'])
    assert resumed_config(steered, changes, tmp_path, 5).reward.taste == "b.json"
    other = with_overrides(Config(), ["reward.terms.variety=1"])
    for kept in (other, lesson_config("pop909-tiny", "a.json")):
        with pytest.raises(UserError, match=r"other settings \(reward.taste, reward.taste_caution\)"):
            resumed_config(kept, changes, tmp_path, 5)
    with pytest.raises(UserError, match="other settings"):
        resumed_config(steered, {"policy.source": "x"}, tmp_path, 5)
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
    both = ["--reward", "constraint", "--constraint", "voices=9", "--set", "reward.constraint.lowest=120"]
    assert main(["score", str(tmp_path / "a.mid"), *both, "--reward", "taste", "--set", f"reward.taste={taste}"]) == 0
    assert json.loads(capsys.readouterr().out)["constraint"] < 1  # all that was asked for counts
