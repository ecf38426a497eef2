"""Training beside the page: as much as the choices are worth, in a process that may die."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fastsmart.errors import UserError
from fastsmart.live import rounds as module
from fastsmart.live.replay import replay_all
from fastsmart.live.rounds import FIRST_CHOICES, STEPS_A_CHOICE, Rounds, keep_rounds
from fastsmart.live.session import Session
from fastsmart.live.settings import LiveSettings, kl_weight
from fastsmart.policy.hf_format import STATE_FILE
from fastsmart.taste import Clip
from fastsmart.taste.replay import Round


def judge(session: Session, count: int) -> None:
    for number in range(count):
        session.choose(*session.place.pair, ("left", "right")[number % 2])


def checkpoint_of(session: Session, step: int) -> Path:
    folder = session.folder.run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text("{}")
    return folder


def test_boldness_is_a_weight_of_the_kl_term_that_falls():
    weights = [kl_weight(boldness) for boldness in range(11)]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] == pytest.approx(0.4)
    assert weights[5] == pytest.approx(0.04)
    assert weights[10] == pytest.approx(0.004)


def test_nothing_is_trained_before_there_is_something_to_train_on(session):
    rounds = Rounds(session)
    judge(session, FIRST_CHOICES - 1)
    assert not rounds._is_due()
    judge(session, 1)
    assert rounds._is_due()
    session.configure(paused=True)
    assert not rounds._is_due()
    assert rounds.doing == "paused"


def test_a_page_that_is_left_open_does_not_drift(session):
    rounds = Rounds(session)
    judge(session, FIRST_CHOICES)
    session.folder.append_round(Round(session.choices[-1].id, STEPS_A_CHOICE * FIRST_CHOICES, 0.04, "me"))
    assert not rounds._is_due()
    judge(session, 1)
    assert rounds._is_due()


def test_rounds_that_came_to_nothing_are_struck_out(session):
    for number in range(4):
        session.folder.append_round(Round(f"c{number}", 1, 0.04, "me"))
    keep_rounds(session.folder, 3)
    assert [r.after for r in session.folder.rounds()] == ["c0", "c1", "c2"]


def test_the_newest_checkpoint_plays(session):
    rounds = Rounds(session)
    assert rounds.newest() == (0, "pop909-tiny")
    folder = checkpoint_of(session, 2)
    assert rounds.newest() == (2, str(folder))
    assert rounds.versions() == [0, 2]


def test_going_back_to_the_first_policy_puts_the_run_aside_whole(session):
    rounds, folder = Rounds(session), checkpoint_of(session, 2)
    session.folder.append_round(Round("c0", 2, 0.04, "me"))
    rounds.go_back(0)
    assert rounds.newest() == (0, "pop909-tiny")
    assert session.folder.rounds() == []
    assert session.place.paused
    assert list(session.folder.path.glob(f"earlier/*/checkpoints/{folder.name}/{STATE_FILE}"))
    with pytest.raises(UserError, match="no such policy"):
        rounds.go_back(2)


def test_clips_of_policies_that_are_no_more_are_not_played(session, clips):
    rounds = Rounds(session)
    checkpoint_of(session, 1)
    newer = [newer_copy(clip, number) for number, clip in enumerate(clips[:6])]
    session.add(newer)
    judge(session, 1)  # of the old clips; the next pair is of the newest
    assert {session.clip(id).version for id in session.place.pair} == {1}
    rounds.go_back(0)
    assert {session.clip(id).version for id in session.place.pair} == {0}


def newer_copy(clip: Clip, number: int) -> Clip:
    return Clip(f"newer-{number}", clip.tokens, clip.prompt, clip.notes, clip.vector, 1)


def test_a_process_that_dies_is_said_and_another_is_started(session, monkeypatch):
    judge(session, FIRST_CHOICES)
    rounds = Rounds(session)

    def dying(run: Path, log: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(module, "_start", dying)
    assert rounds._round() is False
    assert "exit code 3" in rounds.error
    told = """import sys
for line in sys.stdin: print('{"step": 1}', flush=True)"""

    def working(run: Path, log: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(module, "_start", working)
    assert rounds._round() is True
    assert rounds.error == ""
    assert len(session.folder.rounds()) == 1
    rounds.end_process()


@pytest.mark.slow
def test_the_policy_that_was_trained_can_be_trained_again_from_the_choices(tiny, tmp_path, clips):
    """The page's process and the replay give the same weights, bit for bit."""
    session = Session(tmp_path / "page", LiveSettings(tiny, max_tokens=40))
    session.add(clips)
    judge(session, FIRST_CHOICES)
    rounds = Rounds(session)
    rounds.start()
    until = time.monotonic() + 500
    while rounds.newest()[0] < 2 and time.monotonic() < until and not rounds.error:
        time.sleep(0.2)
    rounds.stop()
    assert rounds.error == ""
    version, place = rounds.newest()
    keep_rounds(session.folder, version)
    taste, policy = replay_all(session.folder.choices_file, tmp_path / "again", "me", print)
    assert taste.choices == FIRST_CHOICES
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (place, policy))
    assert all((ours[name] == theirs[name]).all() for name in ours)
