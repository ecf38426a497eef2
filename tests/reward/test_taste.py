"""Tastes: what they learn, say and keep, and the reward they are."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated_listeners import Listener

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, RewardBlend, RewardSettings, load_reward
from fastsmart.reward.taste import LOWEST, Taste, TasteReward
from fastsmart.reward.taste_features import LABELS, NOTE_FEATURES, WIDEST, Standard, feature_names, features, key_fit
from fastsmart.taste import Choice

F = len(NOTE_FEATURES)


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(400, F))


@pytest.fixture(scope="module")
def standard(table: np.ndarray) -> Standard:
    return Standard.of(table[:200])


def test_what_no_clip_of_the_base_has_is_no_obstacle(table: np.ndarray, tmp_path: Path) -> None:
    """Such as the consonance of a policy that never plays two notes at once."""
    bare = table.copy()
    bare[:, 3] = np.nan
    found = Standard.of(bare[:200])
    found.save(tmp_path / "standard.json")
    again = Standard.load(tmp_path / "standard.json")
    np.testing.assert_array_equal(again(bare[200:])[:, 3], 0)
    np.testing.assert_array_equal(np.delete(again.mean, 3), np.delete(Standard.of(table[:200]).mean, 3))


def taught(table: np.ndarray, standard: Standard, hidden: str, count: int, curved: bool = True) -> Taste:
    """A taste after some choices about random pairs, learnt ten at a time."""
    listener, rng = Listener(standard, hidden), np.random.default_rng(1)
    vectors = {f"c{i}": row for i, row in enumerate(table)}
    pairs = [rng.choice(len(table), 2, replace=False) for _ in range(count)]
    choices = [
        Choice(f"n{k}", 0.0, "", f"c{a}", f"c{b}", listener.answer(table[a], table[b], rng))
        for k, (a, b) in enumerate(pairs)
    ]
    taste = Taste.unknown(standard)
    for known in range(10, count + 1, 10):
        taste = Taste.fit(choices[:known], vectors, standard, taste, curved)
    return taste


@pytest.fixture(scope="module")
def slow(table: np.ndarray, standard: Standard) -> Taste:
    return taught(table, standard, "slow, sparse, low", 60)


def test_it_finds_what_is_liked(slow: Taste, table: np.ndarray, standard: Standard) -> None:
    told = {effect.name: effect for effect in slow.explained()}
    assert set(told) == set(NOTE_FEATURES)
    assert {name for name, e in told.items() if e.certainty > 0.99} >= {"pace", "density", "register"}
    assert [told[name].liked for name in ("pace", "density", "register")] == ["slow", "sparse", "low"]
    assert all(-1 <= e.effect <= 1 and 0.5 <= e.certainty <= 1 for e in told.values())
    utility = Listener(standard, "slow, sparse, low").utility(table[200:])
    assert np.corrcoef(utility, slow.mean(table[200:]))[0, 1] > 0.85
    assert slow.agreement > 0.7  # before each choice was seen, the first of them included
    assert slow.choices == 60


def test_a_taste_that_knows_nothing_claims_nothing(standard: Standard, table: np.ndarray) -> None:
    nothing = Taste.unknown(standard)
    assert {effect.certainty for effect in nothing.explained()} == {0.5}
    assert np.isnan(nothing.agreement)
    np.testing.assert_array_equal(nothing.mean(table), 0.0)
    assert nothing.std(table).min() > 0


def test_who_chooses_at_random_teaches_little(table: np.ndarray, standard: Standard, slow: Taste) -> None:
    noise = taught(table, standard, "at random", 60)
    assert 0.25 < noise.agreement < 0.75
    assert noise.mean(table).std() < 0.5 * slow.mean(table).std()


def foretold(taste: Taste, *rows: tuple[bool, float]) -> Taste:
    """The taste with these predictions: whether each came true, and the probability it had."""
    told = tuple((str(i), "left", "left" if came else "right", p) for i, (came, p) in enumerate(rows))
    return replace(taste, predictions=told)


def test_what_was_foretold_and_came_true_counts_by_how_sure_it_was(slow: Taste, standard: Standard) -> None:
    assert Taste.unknown(standard).borne_out == 0

    def of(*rows: tuple[bool, float]) -> float:
        return foretold(slow, *rows).borne_out

    assert of(*[(True, 0.5)] * 9) == 0  # nothing was foretold
    assert of(*[(True, 1.0)] * 9) == pytest.approx(0.9)
    assert of(*[(True, 0.9), (False, 0.9)] * 9) == 0
    assert of(*[(False, 0.9)] * 9) == 0
    assert of(*[(True, 0.6)] * 40) == 1.0  # at most
    enough = [(True, 0.95)] * 8, [(False, 0.55)] * 8
    assert of(*enough[0], *enough[1]) == pytest.approx((8 * 0.9 - 8 * 0.1) / (8 * 0.81 + 8 * 0.01 + 1))
    few = of(*[(True, 0.9)] * 3)  # which chance brings about, too
    assert few == pytest.approx(2.4 / (3 * 0.64 + 1) * (1.8**3 + 1.4**3) / 2 / 20)


def test_a_stake_on_what_it_foretold_grows_with_a_listener_and_not_by_chance(slow: Taste, standard: Standard) -> None:
    assert Taste.unknown(standard).winnings == 1
    assert slow.winnings > 1e4
    assert foretold(slow, *[(True, 1.0)] * 5000).winnings == pytest.approx(math.exp(700))  # a number all the same
    assert foretold(slow, (False, 1.0), *[(True, 1.0)] * 1200).winnings < math.inf
    rng = np.random.default_rng(0)
    ever = 0
    for _ in range(400):  # who answer at random a taste that is sure of itself
        rows = list(zip(rng.random(60) < 0.5, rng.uniform(0.5, 1.0, 60), strict=True))
        ever += max(foretold(slow, *rows[:count]).winnings for count in range(1, 61)) >= 20
    assert 0 < ever <= 0.05 * 400


def test_products_learn_what_no_linear_taste_can(table: np.ndarray, standard: Standard) -> None:
    utility = Listener(standard, "fast where high").utility(table[200:])
    curved, straight = (taught(table, standard, "fast where high", 150, curved) for curved in (True, False))
    found = [np.corrcoef(utility, t.mean(table[200:]))[0, 1] for t in (curved, straight)]
    assert found[0] > 0.75 > 0.6 > found[1]


def test_it_is_the_same_from_its_file(slow: Taste, table: np.ndarray, tmp_path: Path) -> None:
    slow.save(tmp_path / "taste.json")
    again = Taste.load(tmp_path / "taste.json")
    np.testing.assert_allclose(again.mean(table), slow.mean(table), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(again.std(table), slow.std(table), rtol=1e-9)
    assert again.predictions == slow.predictions
    assert (again.curved, again.choices, again.agreement) == (slow.curved, slow.choices, slow.agreement)
    assert again.borne_out == slow.borne_out
    assert (tmp_path / "taste.json").stat().st_size < 500_000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON"),
        (b"[]", "does not hold a taste"),
        (b'{"format": "fastsmart taste 2"}', "is damaged"),
        (None, "cannot read the taste"),
    ],
)
def test_a_file_that_is_no_taste_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "taste.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        Taste.load(path)
    assert str(path) in str(error.value)


def test_a_file_with_other_numbers_is_refused(slow: Taste, tmp_path: Path) -> None:
    path = tmp_path / "taste.json"
    slow.save(path)
    text = path.read_text()
    for old, new in (('"mean": [', '"mean": [NaN, '), ('"pace"', '"haste"'), ('"choices": 60', '"choices": "x"')):
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match="damaged"):
            Taste.load(path)


def test_a_clip_that_is_missing_is_named(standard: Standard) -> None:
    with pytest.raises(UserError, match="the clip gone"):
        Taste.fit([Choice("n", 0.0, "", "gone", "too", "left")], {}, standard)


def test_the_reward_is_bounded_worst_for_silence_and_reads_the_file(
    slow: Taste, tmp_path: Path, make_notes: Callable[..., NoteBatch], make_pieces: Callable[..., NoteBatch]
) -> None:
    slow.save(tmp_path / "taste.json")
    reward = load_reward("taste", taste=tmp_path / "taste.json")
    notes = NoteBatch.concat([make_notes([], [(0, 12, 60, 80)]), make_pieces(3, seed=0)])
    values = reward(Clips(notes))
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert values[0] == values.min() == -LOWEST
    assert not reward.needs_audio
    assert "Hacked" in (TasteReward.__doc__ or "")
    blend = RewardBlend(RewardSettings(terms={"taste": 2.0}, taste=str(tmp_path / "taste.json")))
    np.testing.assert_allclose(blend(Clips(notes)).total, 2 * values, rtol=1e-6)
    with pytest.raises(UserError, match=r"reward\.taste"):
        RewardBlend(RewardSettings(terms={"taste": 1.0}))
    with pytest.raises(UserError, match="taste_caution"):
        RewardSettings(taste_caution=-1)


def test_caution_takes_off_what_is_not_known(slow: Taste, table: np.ndarray) -> None:
    np.testing.assert_allclose(slow.cautious(table, 2.0), slow.mean(table) - 2 * slow.std(table), rtol=1e-4, atol=1e-9)
    far = slow.standard.mean + 50 * slow.standard.std
    np.testing.assert_array_equal(slow.mean(far), slow.mean(slow.standard.mean + WIDEST * slow.standard.std))


# Features


def test_features_go_the_way_they_are_called(make_notes: Callable[..., NoteBatch]) -> None:
    def clip(
        step: int = 6, length: int = 6, pitch: int = 60, velocity: int = 80, chord: tuple[int, ...] = (0,)
    ) -> list:
        return [(k * step, length, pitch + (k % 3) * 2 + c, velocity) for k in range(24) for c in chord]

    off = [(k * 12 + 6, 6, 60 + k % 3, 80) for k in range(24)]
    minor = [(k * 12, 12, 57 + p, 80) for k, p in enumerate([0, 3, 7, 0, 2, 3, 7, 8, 0, 3, 7, 0])]
    major = [(k * 12, 12, 60 + p, 80) for k, p in enumerate([0, 4, 7, 0, 2, 4, 7, 9, 0, 4, 7, 0])]
    notes = make_notes(
        clip(), clip(step=12, length=12), clip(pitch=80), clip(velocity=30), clip(chord=(0, 4, 7)),
        clip(chord=(0, 1)), off, minor, major, [],
    )  # fmt: skip
    columns = dict(zip(feature_names(), features(notes).T, strict=True))
    plain, slower, high, quiet, chords, clash, late, dark, light, empty = range(10)
    assert columns["pace"][slower] < columns["pace"][plain]
    assert columns["register"][high] > columns["register"][plain]
    assert columns["loudness"][quiet] < columns["loudness"][plain]
    assert columns["density"][chords] > columns["density"][plain] == 0
    assert columns["consonance"][chords] == 1 > columns["consonance"][clash] == 0
    assert columns["off_beat"][late] == 1 > columns["off_beat"][slower] == 0
    assert columns["minor"][dark] > 0 > columns["minor"][light]
    assert columns["length"][slower] > columns["length"][plain]
    assert np.isnan([column[empty] for column in columns.values()]).all()
    assert [key_fit(notes)[i].argmax() for i in (dark, light)] == [12 + 9, 0]
    assert set(feature_names(audio=True)) == set(LABELS)


def test_a_standard_has_unit_spread_and_refuses_too_few(table: np.ndarray, tmp_path: Path) -> None:
    standard = Standard.of(table)
    np.testing.assert_allclose(standard(table).std(axis=0), 1, atol=0.02)
    np.testing.assert_array_equal(standard(np.full(F, np.nan)), 0)
    standard.save(tmp_path / "standard.json")
    np.testing.assert_allclose(Standard.load(tmp_path / "standard.json")(table), standard(table))
    with pytest.raises(UserError, match="at least 16"):
        Standard.of(table[:3])
    (tmp_path / "standard.json").write_text("{}")
    with pytest.raises(UserError, match=r"standard\.json"):
        Standard.load(tmp_path / "standard.json")
