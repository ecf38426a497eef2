"""A phrase and its answers: told note by note, and the same in the end."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from made_notes import made, melody

from fastsmart.errors import UserError
from fastsmart.live.answers import WAYS, played_notes
from fastsmart.live.session import Session
from fastsmart.live.settings import LiveSettings
from fastsmart.live.studio import Studio
from fastsmart.study.sound import note_rows

PLAYED = [[0.1, 0.4, 60, 80], [0.6, 0.4, 64, 90], [1.1, 0.9, 67, 70]]


@pytest.fixture
def told(tmp_path, clips):
    """A studio of the shipped policy, and all that its pages are told."""
    studio = Studio.open(tmp_path / "taste", LiveSettings(train=False, max_tokens=48))
    studio.session.add(clips)
    events: list[tuple[str, dict]] = []
    studio.answers.publish = lambda kind, content: events.append((kind, content))
    yield studio, events
    studio.close()


def test_every_note_is_told_once_and_they_make_the_clip(told, tmp_path):
    studio, events = told
    made([melody(3, 8)]).to_midi(0, tmp_path / "m.mid")
    studio.answers.take((tmp_path / "m.mid").read_bytes(), "m.mid")
    phrase = studio.answers.phrase
    studio.answers.answer()
    ids = studio.session.place.phrase
    assert len(ids) == WAYS
    assert studio.session.place.pair == ids[:2]
    for id in ids:
        clip = studio.session.clip(id)
        rows = list(note_rows(clip.notes, 0))
        own = int(phrase.notes.counts[0])
        assert rows[:own] == list(note_rows(phrase.notes, 0))
        heard = [note for _, told in events if told["id"] == id for note in told["notes"]]
        # a tempo that changes while a note sounds lengthens or shortens what had been told of it
        assert [[onset, *rest] for onset, _, *rest in rows[own:]] == [[onset, *rest] for onset, _, *rest in heard]
        np.testing.assert_array_equal(clip.tokens[: clip.prompt], phrase.ids)


def test_an_answer_that_is_chosen_is_a_choice_like_any_other(told, tmp_path):
    studio, _ = told
    free = studio.session.place.pair
    studio.answers.take_played(PLAYED, 100.0)
    studio.answers.answer()
    first = studio.session.place.pair
    studio.session.choose(*first, "right")
    assert studio.session.taste.choices == 1
    second = studio.session.place.pair
    assert set(first) | set(second) == set(studio.session.place.phrase)
    found = Session(studio.session.folder.path, studio.session.settings)
    assert found.place.pair == second
    studio.answers.drop()
    assert not studio.session.place.phrase
    assert not set(studio.session.place.pair) & {*free, *first, *second}


def test_when_all_answers_have_been_heard_there_are_more(told):
    studio, _ = told
    studio.answers.take_played(PLAYED, 100.0)
    studio.answers.answer()
    first = studio.session.place.phrase
    for _ in range(WAYS // 2):
        studio.session.choose(*studio.session.place.pair, "left")
    until = time.monotonic() + 300
    while not (pair := studio.session.place.pair) or not all(map(studio.session.has, pair)):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not set(pair) & set(first)


def test_so_many_bars_of_a_phrase_are_so_many_after_a_start_anew(told, tmp_path):
    studio, _ = told
    made([melody(2, 400)]).to_midi(0, tmp_path / "long.mid")
    studio.answers.take((tmp_path / "long.mid").read_bytes(), "long.mid", bars=2)
    before = studio.answers.phrase
    studio.answers.answer()
    studio.close()
    found = Studio.open(studio.session.folder.path, studio.session.settings)
    np.testing.assert_array_equal(found.answers.phrase.ids, before.ids)
    assert found.session.place == studio.session.place
    found.close()


def test_what_was_played_keeps_its_notes_and_tempo():
    notes = played_notes(PLAYED, 90.0)
    assert notes.pitch.tolist() == [60, 64, 67]
    assert notes.onset_s[0] == 0
    np.testing.assert_allclose(np.diff(notes.onset_s), [0.5, 0.5])
    assert notes.tempo_bpm.tolist() == [90.0]
    np.testing.assert_allclose(notes.onset_tick / notes.ticks_per_beat * 60 / 90, notes.onset_s, atol=1e-3)


@pytest.mark.parametrize(
    "rows",
    [
        *([], [[0, 1, 60]], [[0, 0, 60, 80]], [[-1, 1, 60, 80]], [[0, 1, 128, 80]], "x", [1]),
        *([[0, 1, 60, math.inf]], [[0, 1, 60, math.nan]], [[0, 1, 60, 10**400]], [[0, 1, 60, -1]]),
    ],
)
def test_what_nobody_can_play_is_refused(rows):
    with pytest.raises(UserError, match="play again"):
        played_notes(rows, 100.0)


def test_a_phrase_that_cannot_be_read_leaves_the_one_before(told, tmp_path):
    studio, _ = told
    studio.answers.take_played(PLAYED, 100.0)
    before = studio.answers.phrase
    with pytest.raises(UserError, match=r"cannot read .*mine\.mid"):
        studio.answers.take(b"nothing", "mine.mid")
    assert studio.answers.phrase is before
