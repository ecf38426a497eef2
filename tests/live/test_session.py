"""A session on disk: what is chosen is never lost, and the same choices make the same taste."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fastsmart.errors import UserError
from fastsmart.live import session as module
from fastsmart.live.place import Place
from fastsmart.live.replay import replay_all
from fastsmart.live.session import Session, Stale
from fastsmart.live.settings import LiveSettings
from fastsmart.live.view import learnt
from fastsmart.taste import read_choices, replay, standing

ANSWERS = ("left", "right", "equal", "left", "both_bad", "right")


def judged(session: Session, answers=ANSWERS) -> list[tuple[str, str, str]]:
    """Answer so many pairs; what was answered about which."""
    given = []
    for answer in answers:
        left, right = session.place.pair
        session.choose(left, right, answer)
        given.append((left, right, answer))
    return given


def on_disk(session: Session) -> list[tuple[str, str, str]]:
    return [(c.left, c.right, c.choice) for c in standing(read_choices(session.folder.choices_file).choices)]


def again(session: Session) -> Session:
    """The session as a server that starts again finds it."""
    return Session(session.folder.path, session.settings)


def test_what_was_chosen_is_in_the_file_in_its_order(session):
    given = judged(session)
    assert on_disk(session) == given
    assert session.taste.choices == len(ANSWERS)


def test_a_choice_is_on_the_disk_before_anything_is_learnt_from_it(session, monkeypatch):
    def learn(*_: object) -> None:
        raise KeyboardInterrupt  # as a kill would end it there

    monkeypatch.setattr(session, "_learn", learn)
    left, right = session.place.pair
    with pytest.raises(KeyboardInterrupt):
        session.choose(left, right, "left")
    found = again(session)
    assert on_disk(found) == [(left, right, "left")]
    assert found.taste.choices == 1
    assert not {left, right} & set(found.place.pair)


def test_no_piece_is_played_twice(session):
    given = judged(session, ["left"] * 20)
    heard = [id for left, right, _ in given for id in (left, right)]
    assert len(set(heard)) == len(heard) == 40


def test_a_server_that_starts_again_goes_on_with_the_same_pair(session):
    judged(session)
    session.configure(boldness=8, paused=True)
    found = again(session)
    assert found.place == session.place
    assert found.place.boldness == 8
    np.testing.assert_array_equal(found.taste.posterior.mean, session.taste.posterior.mean)
    assert found.taste.predictions == session.taste.predictions


def test_taking_back_plays_the_pair_again_and_then_the_one_it_put_off(session):
    given, before = judged(session, ["left"]), session.place.pair
    session.undo()
    assert session.place.pair == given[0][:2]
    assert session.taste.choices == 0
    assert again(session).place.pair == given[0][:2]
    session.choose(*session.place.pair, "right")
    assert on_disk(session) == [(*given[0][:2], "right")]
    assert session.place.pair == before


def test_there_is_nothing_to_take_back_before_the_first_choice(session):
    with pytest.raises(Stale, match="no choice"):
        session.undo()


def test_two_pages_cannot_judge_one_pair_twice(session):
    pair = session.place.pair
    session.choose(*pair, "left")
    with pytest.raises(Stale, match="judged already"):
        session.choose(*pair, "right")
    assert on_disk(session) == [(*pair, "left")]


def test_an_answer_that_is_none_changes_nothing(session):
    place = session.place
    with pytest.raises(UserError, match="choice"):
        session.choose(*place.pair, "louder")
    assert session.place == place
    assert on_disk(session) == []


def test_each_listener_has_a_taste_and_everybody_has_a_joint_one(session, tmp_path):
    judged(session, ["left", "left"])
    session.configure(listener="ann")
    assert session.taste.choices == 0
    judged(session, ["right"])
    assert session.taste.choices == 1
    session.configure(listener="me")
    assert session.taste.choices == 2
    joint = Session(session.folder.path, LiveSettings(train=False, joint=True))
    joint._learn(None)
    assert joint.taste.choices == 3


def test_the_taste_can_be_learnt_again_from_the_file_alone(session, tmp_path):
    judged(session, [*ANSWERS, "left"])
    session.undo()
    judged(session, ["right", "left"])
    taste, policy = replay_all(session.folder.choices_file, tmp_path / "again", "me", print)
    assert policy is None
    np.testing.assert_array_equal(taste.posterior.mean, session.taste.posterior.mean)
    assert taste.predictions == session.taste.predictions
    written = (tmp_path / "again" / "tastes" / "me.json").read_bytes()
    assert written == session.folder.taste_file("me").read_bytes()


def test_a_page_says_how_far_lessons_follow_a_taste(session):
    assert learnt(session.taste)["followed"] == 0
    judged(session, ["left", *ANSWERS])
    told = learnt(session.taste)
    assert (told["guessed"], told["followed"]) == (5, round(session.taste.borne_out, 3))
    assert told["followed"] < 0.2  # five guesses may come true by chance


def test_beginning_again_puts_aside_what_can_be_replayed(session, tmp_path):
    given, mean = judged(session), session.taste.posterior.mean
    aside = session.reset()
    assert on_disk(session) == []
    assert session.taste.choices == 0
    taste, _ = replay_all(aside / "choices.jsonl", tmp_path / "again", "me", print)
    np.testing.assert_array_equal(taste.posterior.mean, mean)
    heard = {id for left, right, _ in given for id in (left, right)}
    judged(session, ["left"] * 5)
    assert not heard & {id for left, right, _ in on_disk(session) for id in (left, right)}


def test_after_beginning_again_a_server_that_starts_anew_plays_nothing_of_before(session, clips):
    given = judged(session, ["left"] * 3)
    later = [replace(clip, id=f"later-{number}", version=5) for number, clip in enumerate(clips[:6])]
    session.add(later)
    session.reset()
    found = again(session)
    past = {id for left, right, _ in given for id in (left, right)} | {clip.id for clip in later}
    assert not past & {*found.unheard, *found.place.pair}
    heard = judged(found, ["left"] * 5)
    assert not past & {id for left, right, _ in heard for id in (left, right)}


def test_clips_of_a_policy_that_was_given_up_meanwhile_are_not_taken_in(session, clips):
    later = [replace(clip, id=f"later-{number}", version=2) for number, clip in enumerate(clips[:6])]
    session.add(later, lambda: 1)
    assert not {clip.id for clip in later} & {*session.unheard}
    session.add(later, lambda: 2)
    assert {clip.id for clip in later} <= {*session.unheard}


def test_with_a_full_disk_an_answer_counts_once_and_the_next_pair_comes(session, monkeypatch):
    def full(*_: object) -> None:
        raise UserError("no space left on device")

    save, told = session.folder.save, []
    session.changed = lambda: told.append(session.place.pair)
    session.folder.save = full
    given = []
    for answer in ("left", "right", "left"):
        pair = session.place.pair
        with pytest.raises(UserError, match="no space"):
            session.choose(*pair, answer)
        assert told[-1] == session.place.pair != pair  # pages go on, too
        given.append((*pair, answer))
    with pytest.raises(UserError, match="no space"):
        session.undo()
    assert session.place.pair == given[-1][:2]
    session.folder.save = save
    found = again(session)
    assert on_disk(found) == given[:2]
    assert found.taste.predictions == replay(session.folder.choices_file, session.folder.path / "x", "me").predictions


def test_who_chooses_and_how_boldly_can_be_said_anew(session):
    judged(session, ["left"])
    found = Session(session.folder.path, LiveSettings(train=False, listener="bob ", boldness=9))
    assert (found.place.listener, found.place.boldness) == ("bob", 9)
    assert found.taste.choices == 0
    judged(found, ["right"])
    assert [c.listener for c in found.choices] == ["me", "bob"]
    assert again(session).place.boldness == 9  # nothing said: as before


def test_choices_before_the_first_policy_is_measured_are_learnt_later(tmp_path, clips):
    session = Session(tmp_path / "t", LiveSettings(train=False))
    session.add(clips[:8])
    assert session.taste is None
    judged(session, ["left", "right"])
    session.add(clips[8:])
    assert session.taste.choices == 2
    taste, _ = replay_all(session.folder.choices_file, tmp_path / "again", "me", print)
    assert taste.predictions == session.taste.predictions


@pytest.mark.parametrize("content", ["", "{", "[]", '{"listener": "a", "pair": ["../x", "b"]}', '{"boldness": 1e9}'])
def test_a_damaged_session_file_costs_no_choice(session, content):
    given = judged(session)
    (session.folder.path / module.SESSION_FILE).write_text(content)
    found = again(session)
    assert on_disk(found) == given
    assert found.place.pair is not None


def test_a_line_that_is_no_choice_is_named_and_the_others_stand(session):
    given = judged(session)
    with open(session.folder.choices_file, "ab") as sink:
        sink.write(b'{"id": "x", "time"')
    found = again(session)
    assert "line 7" in found.damaged[0]
    more = judged(found, ["left"])
    assert on_disk(found) == given + more


def test_files_of_clips_are_bounded_and_none_that_was_judged_goes(tmp_path, clips):
    session = Session(tmp_path / "t", LiveSettings(train=False, most_clips=64))
    session.add(clips[:40])
    given = judged(session, ["left"] * 4)
    for number in range(80):
        session.add([module.Clip(f"more-{number}", c.tokens, 4, c.notes, c.vector) for c in clips[:1]])
    kept = set(session.folder.clips.ids())
    assert len(kept) <= 64 + 2 * 4 + 2
    assert {id for left, right, _ in given for id in (left, right)} <= kept


def test_a_place_comes_back_as_it_was_saved(tmp_path):
    place = Place("ann", 3, True, ("a", "b"), (("c", "d"),), ("e",), ("f", "g"), 4)
    place.save(tmp_path / "session.json")
    assert Place.load(tmp_path / "session.json") == place


KILLED = """
import sys
from fastsmart.live.session import Session
from fastsmart.live.settings import LiveSettings

session = Session(sys.argv[1], LiveSettings(train=False))
while True:
    left, right = session.place.pair
    session.choose(left, right, "left")
    print(left, right, flush=True)
"""


def test_killed_at_any_instant_nothing_that_was_confirmed_is_lost(session):
    confirmed = []
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(session.folder.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            confirmed += [tuple(process.stdout.readline().split()) for _ in range(3)]
            os.kill(process.pid, signal.SIGKILL)
            confirmed += [tuple(line.split()) for line in process.stdout if len(line.split()) == 2]
    found = again(session)
    written = [(left, right) for left, right, _ in on_disk(found)]
    assert set(confirmed) <= set(written)
    assert len(written) <= len(confirmed) + 2  # the one that was being made when it was killed
    assert len({id for pair in written for id in pair}) == 2 * len(written)
    assert found.taste.choices == len(written)


def test_an_embedding_is_fitted_once_and_goes_on(tiny, clips, tmp_path):
    settings = LiveSettings(tiny, train=False, embedding=4)
    session = Session(tmp_path / "taste", settings)
    session.add(clips[:6])
    given = judged(session, ["left"])  # before anything is measured
    session.add(clips[6:])
    assert session.standard.names[-4:] == tuple(f"embedding_{k}" for k in range(1, 5))
    vectors = session.folder.clips.vectors(session.folder.clips.ids())
    assert {len(v) for v in vectors.values()} == {len(session.standard.names)}
    np.testing.assert_array_equal(vectors[given[0][0]], session.standard.measure(session.notes(given[0][0]))[0])
    judged(session)
    found = Session(session.folder.path, LiveSettings(tiny, train=False))
    np.testing.assert_array_equal(found.taste.posterior.mean, session.taste.posterior.mean)
    assert replay_all(session.folder.choices_file, tmp_path / "again", "me", print)[0].choices == len(ANSWERS) + 1
    with pytest.raises(UserError, match=r"--embedding is 2, and .* was begun with 4; leave it out"):
        Session(session.folder.path, LiveSettings(tiny, train=False, embedding=2))
