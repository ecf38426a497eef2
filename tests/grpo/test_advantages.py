"""Group-relative advantages against numpy, one group at a time. Shape letters: N completions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmart.errors import UserError
from fastsmart.grpo.advantages import group_advantages, group_moments, normalised_sum


def by_hand(reward, group, scale, eps=1e-4):
    """The definition, with a loop and numpy's nan-functions."""
    reward, group = np.asarray(reward, np.float64), np.asarray(group)
    result = np.zeros(len(reward))
    scored = np.isfinite(reward)
    for g in np.unique(group):
        rows = scored & (group == g)
        if not rows.any():
            continue
        centred = reward[rows] - reward[rows].mean()
        among = reward[scored] if scale == "batch" else reward[rows]
        std = among.std(ddof=1) if len(among) > 1 else 0.0
        result[rows] = centred if scale == "none" else centred / (std + eps)
    return result


rewards = st.one_of(st.floats(-10, 10, width=32), st.sampled_from([float("nan"), float("inf"), 0.0]))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(rewards, st.integers(-3, 3)), min_size=0, max_size=24),
    scale=st.sampled_from(["none", "group", "batch"]),
)
def test_equals_the_definition(rows, scale):
    reward = torch.tensor([r for r, _ in rows], dtype=torch.float32)
    group = torch.tensor([g for _, g in rows], dtype=torch.int64)
    got = group_advantages(reward, group, scale)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), by_hand(reward.numpy(), group.numpy(), scale), rtol=1e-5, atol=1e-6)


def test_worked_example():
    """The numbers in the SMART repository's own diagram, where the advantages are not scaled."""
    reward, group = torch.tensor([7.1, 5.5, 6.1, 8.1]), torch.zeros(4, dtype=torch.int64)
    np.testing.assert_allclose(group_advantages(reward, group, "none"), [0.4, -1.2, -0.6, 1.4], atol=1e-6)
    std = np.std([7.1, 5.5, 6.1, 8.1], ddof=1)
    np.testing.assert_allclose(
        group_advantages(reward, group, "group"), np.array([0.4, -1.2, -0.6, 1.4]) / (std + 1e-4), rtol=1e-6
    )


def test_a_failed_reward_moves_nobody():
    reward = torch.tensor([1.0, 2.0, 3.0, float("nan")])
    group = torch.zeros(4, dtype=torch.int64)
    got = group_advantages(reward, group, "group")
    assert got[3] == 0
    torch.testing.assert_close(got[:3], group_advantages(reward[:3], group[:3], "group"))


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_nothing_to_compare_is_zero(scale):
    nan = float("nan")
    reward = torch.tensor([5.0, nan, nan, nan, 0.1, 0.1, 0.1])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 2])  # one scorable, none scorable, all equal
    assert torch.equal(group_advantages(reward, group, scale), torch.zeros(7))
    assert group_advantages(reward[:0], group[:0], scale).shape == (0,)


def test_order_of_completions_and_names_of_groups_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    reward, group = torch.randn(64, generator=generator), torch.arange(64) // 8
    order = torch.randperm(64, generator=generator)
    for scale in ("none", "group", "batch"):
        want = group_advantages(reward, group, scale)
        got = group_advantages(reward[order], 1000 - 7 * group[order], scale)
        torch.testing.assert_close(got, want[order])


def test_moments_are_torchs_own():
    reward = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    group = torch.arange(24) % 3
    moments = group_moments(reward, group)
    for k in range(3):
        torch.testing.assert_close(moments.mean[k], reward[group == k].mean())
        torch.testing.assert_close(moments.std[k], reward[group == k].std())
    assert moments.count.tolist() == [8, 8, 8]


def test_refuses_an_unknown_scale_and_shapes_that_differ():
    with pytest.raises(UserError, match='"none", "group" or "batch"; got "std"'):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), "std")
    with pytest.raises(ValueError, match=r"reward \[N\]"):
        group_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.int64))


def test_a_normalised_sum_agrees_with_the_formula_written_out():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([7, 3, 11], [8, 8, 4]))
    terms = {name: rng.normal(5, scale, 20).astype(np.float32) for name, scale in (("a", 1.0), ("b", 100.0))}
    terms["a"][[2, 9]] = np.nan
    weights = {"a": 1.0, "b": 0.25, "c": 0.0}
    expected = np.zeros(20)
    for name, values in terms.items():
        for g in (7, 3, 11):
            inside = values[group == g].astype(np.float64)
            standard = (inside - np.nanmean(inside)) / (np.nanstd(inside, ddof=1) + 1e-4)
            expected[group == g] += weights[name] * standard
    tensors = {name: torch.from_numpy(values) for name, values in terms.items()}
    logged = tensors | {"c": torch.full((20,), torch.nan)}  # of weight 0
    actual = normalised_sum(logged, weights, torch.from_numpy(group))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)
    assert actual.isnan().sum() == 2
    scaled = normalised_sum(tensors | {"b": tensors["b"] * 10}, weights, torch.from_numpy(group))
    np.testing.assert_allclose(scaled.numpy(), actual.numpy(), atol=1e-4)  # a term's scale is not its weight


def test_a_normalised_sum_gives_nothing_to_a_group_with_nothing_to_compare():
    terms = {"a": torch.tensor([0.3, 0.3, 0.9, torch.nan, torch.nan, torch.nan])}
    signal = normalised_sum(terms, {"a": 1.0}, torch.tensor([0, 0, 1, 1, 2, 2]))
    np.testing.assert_array_equal(signal.numpy(), [0, 0, 0, np.nan, np.nan, np.nan])
