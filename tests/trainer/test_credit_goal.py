"""How far a run by credit goes: to its goal, and back where it has come further."""

from __future__ import annotations

import pytest

from fastsmart.config import Config, read_config, to_toml, with_overrides
from fastsmart.credit.settings import CreditSettings
from fastsmart.trainer.credit import Course


def test_without_a_goal_every_round_learns_alike() -> None:
    settings = CreditSettings(strength=3.0, pull=0.1)
    assert {Course.of(settings, gain) for gain in (-1.0, 0.0, 2.0, 50.0)} == {Course(3.0, 0.1, 1.0)}


@pytest.mark.parametrize(
    ("gain", "strength", "pull", "pace"),
    [
        (-0.3, 3.0, 0.0, 1.0),
        (0.0, 3.0, 0.0, 1.0),
        (0.5, 1.5, 0.0, 0.5),
        (1.0, 0.0, 0.0, 0.0),
        (1.25, 0.0, 0.2, 0.25),  # a fifth of what was gained is too much
        (4.0, 0.0, 0.75, 1.0),
    ],
)
def test_near_a_goal_it_learns_slowly_and_beyond_it_gives_back(
    gain: float, strength: float, pull: float, pace: float
) -> None:
    found = Course.of(CreditSettings(strength=3.0, goal=1.0), gain)
    assert (found.strength, found.pull, found.pace) == pytest.approx((strength, pull, pace))


def test_with_the_base_as_its_goal_all_is_given_back() -> None:
    settings = CreditSettings(goal=0.0)
    assert Course.of(settings, 0.4) == Course(0.0, 1.0, 0.4)
    assert Course.of(settings, 0.0).pace == 0.0


def test_no_goal_survives_the_file(tmp_path) -> None:
    for told in (["train.algorithm=credit"], ["train.algorithm=credit", "credit.goal=1.5"]):
        config = with_overrides(Config(), ["policy.source=pop909-tiny", "reward.terms.variety=1", *told])
        (tmp_path / "config.toml").write_text(to_toml(config))
        assert read_config(tmp_path / "config.toml") == config
