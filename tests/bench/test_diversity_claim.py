"""The claim of docs/diversity-protocol.md, judged from values that are known."""

import numpy as np
import pytest
from diversity_claim import (
    DISTANCES,
    FAULTS,
    GAIN,
    PRIMARY,
    above_curve,
    gain_test,
    lower_bound,
    retained,
    second_question,
    side_conditions,
    verdict,
)
from scipy import stats

NAMES = (*PRIMARY, *(f"rarefied_{name}_distance_across" for name in DISTANCES))


def seed_values(gain: float, share: float) -> dict[str, dict[str, float]]:
    """Values of three policies where the candidate retains so much of the gain and of every diversity."""
    reward = {"base": 5.0, "unconstrained": 7.0, "candidate": 5.0 + 2 * gain}
    others = {n: {"base": 4.0, "unconstrained": 1.0, "candidate": 4.0 * share} for n in NAMES}
    notes = {"base": 50.0, "unconstrained": 90.0, "candidate": 60.0}
    faults = {n: {"base": 0.01, "unconstrained": 0.02, "candidate": 0.0} for n in FAULTS}
    return {"reward": reward, "notes": notes} | others | faults


def test_the_bound_is_where_a_t_test_to_one_side_says_so():
    values = [0.93, 0.97, 0.91, 0.95, 0.96]
    test = stats.ttest_1samp(values, lower_bound(values), alternative="greater")
    assert test.pvalue == pytest.approx(0.05)
    assert np.isnan(lower_bound([0.9]))


def test_what_is_retained_is_of_the_gain_and_of_the_base():
    found = retained(seed_values(0.5, 0.75), "candidate", 7.0)
    assert found[GAIN] == pytest.approx(0.5)
    assert all(found[name] == pytest.approx(0.75) for name in NAMES)


@pytest.mark.parametrize(
    ("gain", "share", "holds"), [(0.95, 0.95, True), (0.91, 0.95, False), (0.95, 0.91, False), (0.85, 1.2, False)]
)
def test_it_holds_where_every_bound_does(gain, share, holds):
    """Over seeds that differ by as much as 0.04, a mean of 0.91 is not surely above 0.90."""
    values = [seed_values(gain + d, share + d) for d in (-0.02, -0.01, 0.0, 0.01, 0.02)]
    rewards = {label: [v["reward"][label] for v in values] for label in ("candidate", "unconstrained", "base")}
    seeds = [retained(v, "candidate", 7.0) for v in values]
    assert verdict(seeds, gain_test(*rewards.values()))["primary_hold"] is holds


def test_the_gain_is_tested_as_welch_has_it():
    """Against scipy's: with the base known, it is a test of two samples, one of them scaled."""
    tuned, free, base = [6.53, 6.52, 6.55, 6.51, 6.54], [6.65, 6.60, 6.63, 6.66, 6.58, 6.62, 6.64], [5.35, 5.35]
    found = gain_test(tuned, free, base)
    assert found["share"] == pytest.approx((np.mean(tuned) - 5.35) / (np.mean(free) - 5.35))
    others = 0.9 * np.array(free) + 0.1 * 5.35
    welch = stats.ttest_ind(tuned, others + found["lower_bound"], equal_var=False, alternative="greater")
    assert welch.pvalue == pytest.approx(0.05)
    assert found["above"] == pytest.approx(np.mean(tuned) - others.mean())
    noisy = gain_test(tuned, free, [5.25, 5.45])
    assert noisy["lower_bound"] < found["lower_bound"]


def test_each_side_condition_is_told_by_itself():
    """A distance that shrinks, too few notes, too many, and clips without a score."""
    met = side_conditions([seed_values(1.0, 1.0)] * 2, "candidate", 60.0)
    assert len(met) == 5
    assert all(met.values())
    for name, value, condition in (
        ("rarefied_dynamics_distance_across", 3.0, "distances"),
        ("notes", 49.0, "notes, not fewer than the base"),
        ("notes", 66.1, "notes, at most a tenth more than best of four"),
        (FAULTS[1], 0.02, f"no more {FAULTS[1]}"),
    ):
        values = seed_values(1.0, 1.0)
        values[name]["candidate"] = value
        found = side_conditions([values] * 2, "candidate", 60.0)
        assert [name for name, holds in found.items() if not holds] == [condition]
    assert (
        side_conditions([seed_values(1.0, 1.0)], "candidate", None)["notes, at most a tenth more than best of four"]
        is None
    )


def test_the_curve_of_best_of_n_is_read_at_the_reward_of_the_policy():
    """Base 5.0 with 4.0, best of two 6.0 with 3.0, of four 6.5 with 2.8; the candidate at 5.5 or beyond the last."""
    curve = [
        {"reward": {"value": reward}, "diversity": {name: {"value": value} for name in PRIMARY}}
        for reward, value in ((5.0, 4.0), (6.0, 3.0), (6.5, 2.8))
    ]
    inside, beyond = seed_values(0.25, 0.9), seed_values(0.9, 0.75)
    assert above_curve(inside, "candidate", curve) == pytest.approx(dict.fromkeys(PRIMARY, (3.6 - 3.5) / 4))
    assert above_curve(beyond, "candidate", curve) == pytest.approx(dict.fromkeys(PRIMARY, (3.0 - 2.8) / 4))


@pytest.mark.parametrize(("spread", "above"), [(0.005, True), (0.03, False)])
def test_a_policy_is_above_the_curve_where_both_bounds_are(spread, above):
    seeds = [dict.fromkeys(PRIMARY, 0.02 + d * spread) for d in (-1, 0, 1)]
    assert second_question(seeds)["above"] is above
    assert not second_question([s | {PRIMARY[1]: -0.01} for s in seeds])["above"]
