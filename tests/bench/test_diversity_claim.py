"""The claim of docs/diversity-protocol.md, judged from values that are known."""

import numpy as np
import pytest
from diversity_claim import DISTANCES, GAIN, PRIMARY, lower_bound, retained, verdict
from scipy import stats

NAMES = (*PRIMARY, *(f"rarefied_{name}_distance_across" for name in DISTANCES))


def seed_values(gain: float, share: float) -> dict[str, dict[str, float]]:
    """Values of three policies where the candidate retains so much of the gain and of every diversity."""
    reward = {"base": 5.0, "unconstrained": 7.0, "candidate": 5.0 + 2 * gain}
    return {"reward": reward} | {n: {"base": 4.0, "unconstrained": 1.0, "candidate": 4.0 * share} for n in NAMES}


def test_the_bound_is_where_a_t_test_to_one_side_says_so():
    values = [0.93, 0.97, 0.91, 0.95, 0.96]
    test = stats.ttest_1samp(values, lower_bound(values), alternative="greater")
    assert test.pvalue == pytest.approx(0.05)
    assert np.isnan(lower_bound([0.9]))


def test_what_is_retained_is_of_the_gain_and_of_the_base():
    found = retained(seed_values(0.5, 0.75), "candidate")
    assert found[GAIN] == pytest.approx(0.5)
    assert all(found[name] == pytest.approx(0.75) for name in NAMES)


@pytest.mark.parametrize(
    ("gain", "share", "holds"), [(0.95, 0.95, True), (0.91, 0.95, False), (0.95, 0.91, False), (0.85, 1.2, False)]
)
def test_it_holds_where_every_bound_does(gain, share, holds):
    """Over seeds that differ by as much as 0.04, a mean of 0.91 is not surely above 0.90."""
    seeds = [retained(seed_values(gain + d, share + d), "candidate") for d in (-0.02, -0.01, 0.0, 0.01, 0.02)]
    assert verdict(seeds)["primary_hold"] is holds


def test_a_distance_that_shrinks_is_told():
    values = seed_values(1.0, 1.0)
    values["rarefied_dynamics_distance_across"]["candidate"] = 3.0
    found = verdict([retained(values, "candidate")] * 2)
    assert found["primary_hold"]
    assert not found["distances_hold"]
