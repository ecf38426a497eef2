"""What a musician can state, as a gate."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fastsmart.config import Config, read_config, to_toml, with_overrides
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, RewardBlend, RewardSettings, load_reward
from fastsmart.reward.constraints import NEAR, share_met
from fastsmart.reward.settings import ConstraintSettings, parsed_key

C_MAJOR = [(k * 6, 6, p, 80) for k, p in enumerate([60, 64, 67, 72, 65, 69, 67, 62, 64, 60, 67, 60])]


def chord(beat: int, *pitches: int) -> list[tuple[int, int, int, int]]:
    return [(12 * beat, 12, pitch, 80) for pitch in pitches]


OPENING = chord(0, 48, 60, 64, 67, 72) + chord(1, 43, 62, 65, 67)  # tonic, dominant seventh
CADENCE = OPENING + chord(2, 48, 64, 72)


def score(notes: NoteBatch, **keys: object) -> np.ndarray:
    return load_reward("constraint", **keys)(Clips(notes))


def test_a_clip_passes_or_stays_below_a_half(make_notes: Callable[..., NoteBatch]) -> None:
    high = [(t, d, p + 24, v) for t, d, p, v in C_MAJOR]
    values = score(make_notes(C_MAJOR, high, C_MAJOR[:6] + high[6:], []), lowest=48, highest=83)
    assert values.dtype == np.float32
    assert values[0] == 1
    assert values[1] < values[2] < NEAR  # nearer is better, and yet fails
    assert values[3] == 0
    assert share_met(values) == 0.25


def test_key(make_notes: Callable[..., NoteBatch]) -> None:
    up = [(t, d, p + 1, v) for t, d, p, v in C_MAJOR]
    values = score(make_notes(C_MAJOR, up, [(0, 6, 61, 80), *C_MAJOR[1:]]), key="C major")
    assert values[0] == 1
    assert values[1] < NEAR
    assert values[2] == 1  # one note in twelve is outside, less than a tenth
    assert score(make_notes(up), key="Db major")[0] == score(make_notes(up), key="C# major")[0] == 1
    assert score(make_notes(C_MAJOR), key="A minor")[0] < NEAR  # the same notes, another tonic
    assert parsed_key("Bb minor") == (10, True)


def test_metre(make_notes: Callable[..., NoteBatch]) -> None:
    plain = make_notes(C_MAJOR, C_MAJOR, C_MAJOR)
    tick = np.array([0, 0, 30], np.int32)
    meters = np.array([[3, 4], [3, 4], [4, 4]], np.int32)
    notes = replace(plain, meter_tick=tick, meter=meters, meter_offsets=np.array([0, 1, 3, 3]))
    assert (score(notes, metre="3/4") == 1).tolist() == [True, False, False]
    assert (score(notes, metre="4/4") == 1).tolist() == [False, False, True]  # without any it is 4/4


@pytest.mark.parametrize(
    ("ticks", "meters", "metre"),
    [
        ([0, 67], [[3, 4], [4, 4]], "3/4"),  # the second comes after the last onset
        ([0, 0], [[4, 4], [3, 4]], "3/4"),  # the first is superseded at once
        ([6], [[3, 4]], ""),  # the first notes come before any: 4/4, then 3/4
    ],
)
def test_the_metre_is_that_of_what_is_heard(
    make_notes: Callable[..., NoteBatch], ticks: list[int], meters: list[list[int]], metre: str
) -> None:
    plain, kinds = make_notes(C_MAJOR), np.array(meters, np.int32)
    notes = replace(plain, meter_tick=np.array(ticks, np.int32), meter=kinds, meter_offsets=np.array([0, len(ticks)]))
    assert [m for m in ("3/4", "4/4") if score(notes, metre=m)[0] == 1] == ([metre] if metre else [])


def test_a_metre_that_no_prompt_begins_in_is_refused() -> None:
    asked = ["reward.terms.constraint=1", 'reward.constraint.metre="3/4"']
    with pytest.raises(UserError, match=r"every prompt begins in another \(4/4\); set prompts.time_signatures"):
        with_overrides(Config(), [*asked, 'prompts.time_signatures=["4/4"]'])
    with_overrides(Config(), [*asked, 'prompts.time_signatures=["4/4", "3/4"]'])


def test_density_and_voices(make_notes: Callable[..., NoteBatch]) -> None:
    notes = make_notes(C_MAJOR)  # twelve notes in three seconds
    for least, most, passes in ((3, 5, True), (4, 4, True), (5, 9, False), (1, 3, False), (0, 3, False), (3, 0, True)):
        assert (score(notes, least_density=least, most_density=most)[0] == 1) == passes
    one_after_the_other = make_notes(chord(0, 60, 64, 67) + chord(1, 60, 64))  # one begins where the other ends
    assert (score(one_after_the_other, voices=3) == 1).all()
    assert (score(one_after_the_other, voices=2) < NEAR).all()


def test_cadence(make_notes: Callable[..., NoteBatch]) -> None:
    deceptive, inverted = OPENING + chord(2, 45, 64, 72), OPENING + chord(2, 40, 60, 72)
    repeated = chord(0, 48, 60, 64, 67, 72) + chord(1, 48, 67, 72)  # nothing before the tonic
    hanging = OPENING
    values = score(make_notes(CADENCE, deceptive, hanging, inverted, repeated), key="C major", cadence=True)
    assert (values == 1).tolist() == [True, False, False, False, False]
    assert (score(make_notes(CADENCE), cadence=True) == 1).all()  # in the key that fits best


def test_all_of_them_must_hold(make_notes: Callable[..., NoteBatch]) -> None:
    keys = {"key": "C major", "metre": "4/4", "lowest": 48, "highest": 84, "least_density": 3, "most_density": 5}
    assert score(make_notes(C_MAJOR), **keys)[0] == 1
    for wrong in ({"key": "F# major"}, {"metre": "3/4"}, {"lowest": 62}, {"least_density": 4.5}):
        assert score(make_notes(C_MAJOR), **keys | wrong)[0] < NEAR


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"key": "H major"}, "key is 'H major'"),
        ({"key": "C"}, "key is 'C'"),
        ({"metre": "3-4"}, "metre is '3-4'"),
        ({"lowest": 80, "highest": 60}, "lowest 80"),
        ({"least_density": 3.0, "most_density": 2.0}, "least_density"),
        ({"voices": -1}, "voices is -1"),
        ({"key_share": 0.0}, "key_share is"),
    ],
)
def test_what_makes_no_sense_is_named(keys: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ConstraintSettings(**keys)


def test_settings_go_through_toml_and_the_blend(tmp_path, make_notes: Callable[..., NoteBatch]) -> None:
    texts = ["reward.terms={constraint=1}", 'reward.constraint.key="C major"', "reward.constraint.voices=2"]
    config = with_overrides(Config(), texts)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_config(tmp_path / "config.toml") == config
    assert RewardBlend(config.reward)(Clips(make_notes(C_MAJOR))).total.tolist() == [1.0]
    with pytest.raises(UserError, match=r"reward\.constraint\.key is 'H'"):
        with_overrides(Config(), ["reward.constraint.key=H"])
    with pytest.raises(UserError, match="asks for nothing"):
        RewardBlend(RewardSettings(terms={"constraint": 1.0}))
