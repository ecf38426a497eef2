"""The judges of styles: what they hear, and what they must not hear."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_notes import made, melody
from styled_pieces import STYLES, styled_clip, styled_clips

from fastsmart.errors import UserError
from fastsmart.music.style_counts import FEATURES, masked, style_counts
from fastsmart.music.style_forest import grow_forest, load_forest
from fastsmart.music.style_information import bits, heard_styles
from fastsmart.music.styles import fit_judge, isotonic, load_judge
from fastsmart.notes import NoteBatch
from fastsmart.reward.base import Clips
from fastsmart.reward.style_margin import LOWEST, MEDIANS, StyleMargin


def pieces(first: int, count: int) -> tuple[NoteBatch, list[str]]:
    """`count` clips of each invented style, seeds from `first` on."""
    batches = [styled_clips(style, range(first, first + count)) for style in STYLES]
    return NoteBatch.concat(batches), [style for style in STYLES for _ in range(count)]


@pytest.fixture(scope="module")
def judge():
    return fit_judge(*pieces(0, 40), *pieces(100, 20), about={MEDIANS: {"drone": 2.0, "march": 2.0}})


def accuracy(judge, notes, style) -> float:
    heard = [judge.styles[s] for s in judge(notes).argmax(1)]
    return float(np.mean([a == b for a, b in zip(heard, style, strict=True)]))


def test_both_judges_tell_two_styles_apart_in_other_pieces(judge, tmp_path):
    notes, style = pieces(200, 30)
    assert accuracy(judge, notes, style) == 1.0
    forest = grow_forest(*pieces(0, 40), trees=10)
    assert accuracy(forest, notes, style) > 0.95
    judge.save(tmp_path / "judge.json")
    forest.save(tmp_path / "forest.npz")
    for made_, read in ((judge, load_judge(tmp_path / "judge.json")), (forest, load_forest(tmp_path / "forest.npz"))):
        assert read.styles == STYLES
        np.testing.assert_allclose(read(notes), made_(notes), atol=2e-3)
        np.testing.assert_allclose(made_(notes).sum(1), 1.0, atol=1e-6)
        np.testing.assert_allclose(made_(NoteBatch.empty(2)), 0.5)


def played(notes: NoteBatch, seed: int) -> NoteBatch:
    """The same notes as a pianist might play them: a twelfth of a beat early or late, and not as long."""
    random = np.random.default_rng(seed)
    late = random.integers(-1, 2, len(notes.onset_tick))
    onset = np.maximum(notes.onset_tick + late, 0).astype(np.int32)
    shorter = np.maximum(notes.duration_tick - random.integers(0, 2, len(onset)), 1).astype(np.int32)
    velocity = random.integers(20, 120, len(onset)).astype(np.uint8)
    return replace(notes, onset_tick=onset, duration_tick=shorter, velocity=velocity)


def slower(notes: NoteBatch) -> NoteBatch:
    return replace(notes, onset_s=notes.onset_s * 1.7, duration_s=notes.duration_s * 1.7, end_s=notes.end_s * 1.7)


def quieter(notes: NoteBatch) -> NoteBatch:
    return replace(notes, velocity=notes.velocity // 2)


@pytest.mark.parametrize("change", [slower, quieter], ids=["tempo", "velocity"])
def test_velocity_and_tempo_change_no_count(change):
    notes, _ = pieces(0, 10)
    assert np.array_equal(style_counts(masked(notes)), style_counts(masked(change(notes))))


def test_a_judge_of_what_velocity_tempo_and_source_separate_is_at_chance():
    def source(first: int, count: int) -> tuple[NoteBatch, list[str]]:
        """Scores, and the hands of a pianist on other pieces of both styles."""
        scores, _ = pieces(first, count)
        hands = slower(played(pieces(first + 1000, count)[0], first))
        return NoteBatch.concat([scores, hands]), ["score"] * len(scores) + ["played"] * len(hands)

    judge = fit_judge(*source(0, 60), *source(200, 60))
    assert 0.4 < accuracy(judge, *source(400, 100)) < 0.6


def test_keys_are_not_heard():
    clip = styled_clip("march", 3)
    higher = [(onset, length, pitch + 5) for onset, length, pitch in clip]
    low, high = style_counts(masked(made([clip, higher])))
    # all but the register and the halves of the keyboard
    assert (~np.isclose(low, high)).mean() < 0.1


def test_counts_are_finite_for_any_clip_and_one_clip_does_not_change_another_s():
    odd = [[], [(0, 1, 60)], [(0, 4, 60), (0, 4, 60)], [(5, 700, 21), (4000, 1, 108)], melody(1), melody(2, 120)]
    table = style_counts(masked(made(odd)))
    assert np.isfinite(table).all()
    assert table.shape == (len(odd), FEATURES)
    assert not table[0].any()
    for i, clip in enumerate(odd):
        np.testing.assert_array_equal(style_counts(masked(made([clip])))[0], table[i])


def test_isotonic_regression_is_rising_and_between_its_ends():
    random = np.random.default_rng(0)
    x = random.random(400)
    given, found = isotonic(x, random.random(400) < x**2, np.ones(400))
    assert (np.diff(given) >= 0).all()
    assert (np.diff(found) >= 0).all()
    assert (given[0], found[0], given[-1], found[-1]) == (0, 0, 1, 1)
    assert np.abs(np.interp([0.3, 0.5, 0.8], given, found) - [0.09, 0.25, 0.64]).max() < 0.15


def test_information_is_that_of_the_channel_and_nothing_where_styles_are_not_heard():
    styles, random = ("a", "b", "c", "d"), np.random.default_rng(1)
    assert bits(np.eye(4)) == pytest.approx(2.0)
    assert bits(np.ones((4, 4))) == pytest.approx(0.0)
    # a symmetric channel that keeps a style with probability 0.7 (Cover and Thomas 2006, section 7.2)
    expected = 2 + 0.7 * np.log2(0.7) + 0.3 * np.log2(0.1)
    asked = [style for style in styles for _ in range(500)]
    kept = random.random(2000) < 0.7
    other = [styles[(styles.index(s) + int(k)) % 4] for s, k in zip(asked, random.integers(1, 4, 2000), strict=True)]
    heard = [s if k else o for s, k, o in zip(asked, kept, other, strict=True)]
    found = heard_styles(styles, asked, heard, range(2000))
    interval = found.information.estimate()
    assert interval.low < expected < interval.high
    assert abs(found.information.value - expected) < 0.06
    assert found.recall["a"].value == pytest.approx(0.7, abs=0.06)
    # of few clips the plain bits of noise are far from 0, the corrected ones are not
    noise = [styles[int(k)] for k in random.integers(0, 4, 60)]
    few = heard_styles(styles, [styles[i % 4] for i in range(60)], noise, range(60))
    assert bits(few.confusion) > 0.05
    assert few.information.estimate().low == 0.0


def test_alike_clips_of_one_work_make_the_interval_wider():
    styles, random = ("a", "b"), np.random.default_rng(2)
    right = np.repeat(random.random(40) < 0.75, 20)
    asked = [styles[i // 400] for i in range(800)]
    heard = [s if k else styles[1 - styles.index(s)] for s, k in zip(asked, right, strict=True)]
    alone = heard_styles(styles, asked, heard, range(800)).balanced.estimate()
    works = heard_styles(styles, asked, heard, [i // 20 for i in range(800)]).balanced.estimate()
    assert works.high - works.low > 3 * (alone.high - alone.low)


def test_the_margin_pays_for_the_style_asked_for_and_no_more_than_real_pieces_have(judge):
    reward = StyleMargin(judge)
    notes, style = pieces(300, 10)
    own = reward(Clips(notes, asked=tuple(style)))
    other = reward(Clips(notes, asked=tuple(style[::-1])))
    assert own.dtype == np.float32
    assert own.max() == 2.0
    assert (own > other).all()
    assert other.min() >= LOWEST
    assert not reward(Clips(notes)).any()
    assert not reward(Clips(notes, asked=("opera",) * len(notes))).any()
    assert reward(Clips(NoteBatch.empty(2), asked=("march", ""))).tolist() == [pytest.approx(LOWEST), 0.0]


@pytest.mark.parametrize("change", ["styles", "weights", "knots"])
def test_a_damaged_judge_is_named(judge, tmp_path, change):
    path = tmp_path / "judge.json"
    judge.save(path)
    tree = json.loads(path.read_text())
    tree[change] = tree[change][:1]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"judge\.json is a"):
        load_judge(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"judge\.json is no judge of styles"):
        load_judge(path)
