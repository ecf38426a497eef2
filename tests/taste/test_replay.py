"""Clips on disk, the next pair, and the same choices making the same taste."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_notes import made, melody
from simulated_listeners import Listener

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch
from fastsmart.reward.taste_features import feature_names, features
from fastsmart.taste import Choice, Clip, Standard, Taste, TasteFolder, append_choice, next_pair, replay

CLIPS = 60


@pytest.fixture(scope="module")
def notes() -> NoteBatch:
    return made([melody(seed) for seed in range(CLIPS)])


@pytest.fixture
def folder(tmp_path: Path, notes: NoteBatch) -> TasteFolder:
    """A folder with a standard and clips."""
    made_here = TasteFolder(tmp_path / "taste")
    made_here.write_standard(Standard.of(notes))
    for i in range(CLIPS):
        made_here.clips.save(Clip.of(f"c{i}", np.arange(5), 2, notes.select([i]), version=i))
    return made_here


def listen(folder: TasteFolder, count: int, listener: str = "ann") -> Taste:
    """Answer pairs as the page would: choose the pair, keep the answer, learn."""
    standard = folder.standard()
    hears, random = Listener(standard, "slow, sparse, low"), np.random.default_rng(0)
    vectors = folder.clips.vectors(folder.clips.ids())
    taste, seen = Taste.unknown(standard), set[str]()
    for k in range(count):
        pair = next_pair(taste, vectors, seen)
        assert pair is not None
        seen |= set(pair)
        answer = hears.answer(vectors[pair[0]], vectors[pair[1]], random)
        append_choice(folder.choices_file, Choice(f"{listener[0]}{k}", float(k), listener, *pair, answer))
        taste = folder.next_taste([c for c in folder.choices().choices if c.listener == listener], standard, taste)
    return taste


def test_a_clip_comes_back_as_it_was(folder: TasteFolder, notes: NoteBatch) -> None:
    clip = folder.clips.load("c3")
    assert (clip.id, clip.prompt, clip.version) == ("c3", 2, 3)
    for name, value in vars(notes.select([3])).items():
        np.testing.assert_array_equal(getattr(clip.notes, name), value)
    np.testing.assert_array_equal(clip.vector, features(notes)[3])
    np.testing.assert_array_equal(clip.tokens, np.arange(5))
    assert folder.clips.ids() == sorted(f"c{i}" for i in range(CLIPS))


def test_a_clip_has_the_same_features_and_utility_whichever_are_beside_it(notes: NoteBatch) -> None:
    taste = Taste.unknown(Standard.of(notes))
    together = features(notes)
    for i in range(CLIPS):
        alone = features(notes.select([i]))
        np.testing.assert_array_equal(alone[0], together[i])
        assert (taste.mean(alone)[0], taste.std(alone)[0]) == (taste.mean(together)[i], taste.std(together)[i])


def test_a_clip_that_is_damaged_or_no_clip_is_named(folder: TasteFolder) -> None:
    path = folder.clips.path("c3")
    for content in (b"", b"\x00" * 7, path.read_bytes()[:100], path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"c3\.safetensors is damaged"):
            folder.clips.load("c3")
    with pytest.raises(UserError, match="cannot read the clip"):
        folder.clips.load("gone")
    for name in ("../c3", "", "c3/", "a" * 65, ".hidden"):
        with pytest.raises(UserError, match="is no id of a clip"):
            folder.clips.load(name)


def test_replay_makes_the_same_taste_to_the_last_digit(folder: TasteFolder, tmp_path: Path) -> None:
    there = listen(folder, 12)
    again = replay(folder.choices_file, tmp_path / "again")
    np.testing.assert_array_equal(again.posterior.mean, there.posterior.mean)
    np.testing.assert_array_equal(again.posterior.covariance, there.posterior.covariance)
    assert again.predictions == there.predictions
    assert again.agreement == there.agreement
    kept = TasteFolder(tmp_path / "again").taste_file()
    folder.save(there)
    assert kept.read_bytes() == folder.taste_file().read_bytes()


def test_listeners_have_one_taste_each_or_a_joint_one(folder: TasteFolder, tmp_path: Path) -> None:
    ann = listen(folder, 4, "ann")
    listen(folder, 3, "b/../b")
    assert replay(folder.choices_file, tmp_path / "a", "ann").choices == 4
    assert replay(folder.choices_file, tmp_path / "b").choices == 7
    path = folder.save(ann, "b/../b")
    assert path.parent == folder.path / "tastes"
    assert folder.taste_file("b") != folder.taste_file("B/../b") != path
    with pytest.raises(UserError, match=r"carl has not chosen anything .*ann"):
        replay(folder.choices_file, tmp_path / "c", "carl")
    with pytest.raises(UserError, match="no file of choices"):
        replay(tmp_path / "none.jsonl", tmp_path / "c")


def test_a_file_without_one_choice_is_refused(folder: TasteFolder, tmp_path: Path) -> None:
    folder.choices_file.write_text("garbage\n{}\n")
    with pytest.raises(UserError, match=r"jsonl holds no choice; line 1 of choices\.jsonl is cut short or no JSON"):
        replay(folder.choices_file, tmp_path / "out")
    folder.choices_file.write_text("")
    with pytest.raises(UserError, match="holds no choice; name"):
        replay(folder.choices_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_taken_back_is_not_learnt_from(folder: TasteFolder, tmp_path: Path) -> None:
    listen(folder, 6)
    before = replay(folder.choices_file, tmp_path / "before")
    append_choice(folder.choices_file, Choice("more", 9.0, "ann", "c0", "c1", "left"))
    append_choice(folder.choices_file, Choice("back", 9.0, "ann", undo="more"))
    after = replay(folder.choices_file, tmp_path / "after")
    np.testing.assert_array_equal(after.posterior.mean, before.posterior.mean)
    assert after.predictions == before.predictions


# Pairs


def test_no_clip_is_played_twice_and_none_is_left_over(notes: NoteBatch) -> None:
    standard = Standard.of(notes)
    vectors = {f"c{i}": row for i, row in enumerate(features(notes)[:9])}
    taste, seen = Taste.unknown(standard), set[str]()
    while pair := next_pair(taste, vectors, seen):
        assert not seen & set(pair)
        assert pair[0] != pair[1]
        seen |= set(pair)
    assert len(seen) == 8


def test_the_pair_that_tells_most_is_played(notes: NoteBatch) -> None:
    """Of a listener known to like it slow nothing is learnt from slow against fast, and much from loud against soft."""
    names, standard = feature_names(), Standard.of(notes)
    taste = Taste.unknown(standard)
    mean, covariance = taste.posterior.mean.copy(), taste.posterior.covariance.copy()
    pace, loudness = names.index("pace"), names.index("loudness")
    mean[pace], covariance[pace, pace] = -5.0, 1e-6
    covariance[loudness, loudness] = 4.0
    sure = Taste(standard, type(taste.posterior)(mean, covariance), True)

    def at(name: str, z: float) -> np.ndarray:
        return standard.mean + z * standard.std * (np.array(names) == name)

    clips = {"slow": at("pace", -2), "fast": at("pace", 2), "loud": at("loudness", 1.5), "soft": at("loudness", -1.5)}
    for known in (0, 3, 8, 10):
        assert set(next_pair(replace(sure, choices=known), clips, ()) or ()) == {"loud", "soft"}
    for known in (7, 11, 39):  # a check
        assert set(next_pair(replace(sure, choices=known), clips, ()) or ()) == {"slow", "fast"}


def test_left_does_not_tell_which_is_better(notes: NoteBatch, make_vectors: Callable[[int], dict]) -> None:
    taste = Taste.unknown(Standard.of(notes))
    sides = []
    for k in range(40):
        pair = next_pair(taste, make_vectors(k), ())
        assert pair is not None
        assert pair == next_pair(taste, dict(reversed(make_vectors(k).items())), ())
        sides.append(pair[0] < pair[1])
    assert 8 < sum(sides) < 32


@pytest.fixture
def make_vectors() -> Callable[[int], dict]:
    def make(k: int) -> dict:
        rng = np.random.default_rng(k)
        return {f"x{k}": rng.normal(size=len(feature_names())), f"y{k}": rng.normal(size=len(feature_names()))}

    return make
