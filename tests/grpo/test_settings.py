"""The section [diversity] refuses what makes no sense, with its key."""

import pytest

from fastsmart.config import Config, merged
from fastsmart.errors import UserError
from fastsmart.grpo.settings import DiversitySettings


def test_by_default_no_part_is_on():
    assert not DiversitySettings().active
    assert DiversitySettings(stratify=0.25).active
    assert DiversitySettings(weight=0.5).pulls
    assert DiversitySettings(floor=0.9).pulls


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stratify": 1.5}, "diversity.stratify"),
        ({"floor": 1.0}, "diversity.floor"),
        ({"weight": -1.0}, "diversity.weight"),
        ({"weight": float("inf")}, "diversity.weight"),
        ({"gate": 1.0}, "diversity.gate"),
        ({"clips": 10}, "diversity.clips"),
        ({"strata": ["keys"]}, "diversity.strata"),
        ({"target": "best"}, "diversity.target"),
    ],
)
def test_nonsense_is_refused_with_its_key(change, named):
    with pytest.raises(UserError, match=named):
        merged(Config(), {"diversity": change})


def test_single_completions_need_strata_to_be_compared_within():
    with pytest.raises(UserError, match=r"diversity\.stratify"):
        merged(Config(), {"sampling": {"group": 1}})
    assert merged(Config(), {"sampling": {"group": 1}, "diversity": {"stratify": 0.0}}).sampling.group == 1


def test_rewards_normalised_by_group_have_no_fixed_unit():
    with pytest.raises(UserError, match=r"reward\.normalize"):
        merged(Config(), {"reward": {"normalize": "group"}, "diversity": {"stratify": 0.5}})
