"""Training beside the page: a lesson where there is something new to teach, in a process that may die."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from fastsmart.errors import UserError
from fastsmart.live import teacher as module
from fastsmart.live.replay import replay_all
from fastsmart.live.session import Session
from fastsmart.live.settings import LiveSettings, goal_of
from fastsmart.live.teacher import FIRST_CHOICES, NEW_CHOICES, Teacher
from fastsmart.taste import Clip


def judge(session: Session, count: int) -> None:
    for number in range(count):
        session.choose(*session.place.pair, ("left", "right")[number % 2])


def lesson_of(session: Session, choices: int = FIRST_CHOICES) -> Path:
    """The policy of another finished lesson."""
    lesson = session.folder.lessons.begin("a", choices, goal_of(session.place.boldness), session.listener)
    lesson.policy.mkdir(parents=True)
    return lesson.policy


def test_without_boldness_nothing_changes_and_more_of_it_goes_further():
    goals = [goal_of(boldness) for boldness in range(11)]
    assert goals == sorted(goals)
    assert goals[0] == 0
    assert goals[5] == pytest.approx(1.0)


def test_nothing_is_taught_before_there_is_something_to_teach(session):
    teacher = Teacher(session)
    judge(session, FIRST_CHOICES - 1)
    assert not teacher._is_due()
    judge(session, 1)
    assert teacher._is_due()
    session.configure(paused=True)
    assert not teacher._is_due()
    assert teacher.doing == "paused"


def test_a_page_that_is_left_open_does_not_drift(session):
    teacher = Teacher(session)
    judge(session, FIRST_CHOICES)
    lesson_of(session)
    assert not teacher._is_due()
    judge(session, NEW_CHOICES - 1)
    assert not teacher._is_due()
    judge(session, 1)
    assert teacher._is_due()


def test_another_boldness_and_another_listener_are_new(session):
    teacher = Teacher(session)
    judge(session, FIRST_CHOICES)
    lesson_of(session)
    session.configure(boldness=7)
    assert teacher._is_due()
    lesson_of(session)
    assert not teacher._is_due()
    session.configure(listener="ann")
    assert not teacher._is_due()  # who has not chosen yet


def test_the_newest_lesson_plays(session):
    teacher = Teacher(session)
    assert teacher.newest() == (0, "pop909-tiny")
    lesson_of(session)
    policy = lesson_of(session)
    session.folder.lessons.begin("b", 9, 1.2)  # not finished
    assert teacher.newest() == (2, str(policy))
    assert teacher.versions() == [0, 1, 2]


def test_going_back_puts_later_lessons_aside_whole(session):
    teacher = Teacher(session)
    first, second = lesson_of(session), lesson_of(session)
    teacher.go_back(1)
    assert teacher.newest() == (1, str(first))
    assert session.place.paused
    teacher.go_back(0)
    assert teacher.newest() == (0, "pop909-tiny")
    assert first.name == second.name
    assert len(list(session.folder.lessons.path.glob(f"undone/*/{second.name}"))) == 2
    with pytest.raises(UserError, match="no such policy"):
        teacher.go_back(2)


def test_clips_of_policies_that_are_no_more_are_not_played(session, clips):
    teacher = Teacher(session)
    lesson_of(session)
    newer = [newer_copy(clip, number) for number, clip in enumerate(clips[:6])]
    session.add(newer)
    judge(session, 1)  # of the old clips; the next pair is of the newest
    assert {session.clip(id).version for id in session.place.pair} == {1}
    teacher.go_back(0)
    assert {session.clip(id).version for id in session.place.pair} == {0}


def newer_copy(clip: Clip, number: int) -> Clip:
    return Clip(f"newer-{number}", clip.tokens, clip.prompt, clip.notes, clip.vector, 1)


def test_a_process_that_dies_is_said_and_another_is_started(session, monkeypatch):
    judge(session, FIRST_CHOICES)
    teacher = Teacher(session)

    def dying(log: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(3)"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(module, "_start", dying)
    assert teacher._teach() is False
    assert "exit code 3" in teacher.error
    told = """import sys
for line in sys.stdin: print('{"error": ""}', flush=True)"""

    def working(log: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(module, "_start", working)
    assert teacher._teach() is True
    assert teacher.error == ""
    assert session.folder.lessons.finished() == []  # it only said so
    teacher.end_process()


def test_after_a_failure_it_rests_whatever_changes(session, monkeypatch):
    teacher, tried = Teacher(session), []

    def failing() -> bool:
        tried.append(time.monotonic())
        teacher._tell("the disk is full")
        return False

    session.changed = teacher.look
    monkeypatch.setattr(teacher, "_is_due", lambda: True)
    monkeypatch.setattr(teacher, "_teach", failing)
    monkeypatch.setattr(module, "AFTER_A_FAILURE_S", 0.5)
    teacher.start()
    time.sleep(1.2)
    teacher.stop()
    teacher.join(30)
    assert 1 <= len(tried) <= 3
    assert not teacher.is_alive()


def test_a_lesson_that_is_not_due_any_more_is_not_begun(session, monkeypatch):
    judge(session, FIRST_CHOICES)
    teacher = Teacher(session)
    assert teacher._is_due()
    session.configure(listener="ann")  # before it has begun
    monkeypatch.setattr(module, "_start", lambda log: pytest.fail("begun"))
    assert teacher._teach() is True
    assert list(session.folder.lessons.path.glob("*")) == []


@pytest.mark.slow
def test_the_policy_that_was_trained_can_be_trained_again_from_the_choices(tiny, tmp_path, clips):
    """The page's process and the replay give the same weights, bit for bit."""
    session = Session(tmp_path / "page", LiveSettings(tiny, max_tokens=40))
    session.add(clips)
    judge(session, FIRST_CHOICES)
    teacher = Teacher(session)
    teacher.start()
    until = time.monotonic() + 500
    while teacher.newest()[0] < 1 and time.monotonic() < until and not teacher.error:
        time.sleep(0.2)
    teacher.stop()
    assert teacher.error == ""
    _, place = teacher.newest()
    taste, policy = replay_all(session.folder.choices_file, tmp_path / "again", "me", print)
    assert taste.choices == FIRST_CHOICES
    ours, theirs = (load_file(Path(folder) / "model.safetensors") for folder in (place, policy))
    assert all((ours[name] == theirs[name]).all() for name in ours)
