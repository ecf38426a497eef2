"""Advantages with diversity in them, computed by another hand; and that every part of the formula is looked at: each
way of getting it wrong makes the comparison fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_base import batch_of, made_base
from scipy.spatial.distance import cdist

from fastsmart.grpo.advantages import group_advantages
from fastsmart.grpo.settings import DiversitySettings
from fastsmart.grpo.strata import stratified_advantages
from fastsmart.grpo.witness import gated, witness
from fastsmart.music.histograms import BINS
from fastsmart.music.likeness import split_rows
from fastsmart.trainer import diversity_control
from fastsmart.trainer.batch import Batch, micro_batches
from fastsmart.trainer.diversity_control import DIATONIC, DiversityControl
from fastsmart.trainer.rehearsal import rehearse
from fastsmart.trainer.update import completion_logprobs

SETTINGS = DiversitySettings(stratify=0.25, weight=0.8, gate=0.5)


def a_narrow_batch(base: dict[str, np.ndarray]) -> Batch:
    """Twelve groups of four, a third of all clips the same one."""
    chosen = np.arange(48)
    chosen[::3] = 100
    return batch_of(base, chosen, np.repeat(np.arange(12), 4))


def labels_of(base: dict[str, np.ndarray], batch: Batch) -> list[np.ndarray]:
    """Key, register and dynamics of each clip."""
    assert batch.rows is not None
    rows, all_rows = split_rows(batch.rows), split_rows(base["rows"])
    labels = [np.array([max(range(12), key=lambda k: np.roll(DIATONIC, k) @ row[:12]) for row in rows["pitch_class"]])]
    for name in ("register", "dynamics"):
        centres, own = ((t[name][:, :-1] * np.arange(BINS[name])).sum(1) for t in (all_rows, rows))
        labels.append((own[:, None] >= np.quantile(centres, [1 / 3, 2 / 3])).sum(1))
    return labels


def expected_advantages(control: DiversityControl, base: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
    """[N], by statsmodels' regression and scipy's distances, clip by clip."""
    import statsmodels.api as sm

    assert batch.rows is not None
    settings, reward = control.settings, batch.scores.total.astype(np.float64)
    unit = base["reward"].astype(np.float64).std()
    dummies = [np.eye(13)[label][:, np.unique(label)[1:]] for label in labels_of(base, batch)]
    fit = sm.OLS(reward, sm.add_constant(np.concatenate(dummies, axis=1))).fit()
    of_reward = fit.resid * len(reward) / fit.df_resid / unit
    of_reward += settings.stratify * (fit.fittedvalues - reward.mean()) / unit

    def similar(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ours, theirs = split_rows(a.astype(np.float64)), split_rows(b.astype(np.float64))
        return np.mean([1 - cdist(ours[name], theirs[name], "cityblock") / 2 for name in BINS], axis=0)

    to_base, to_batch = similar(batch.rows, base["rows"]), similar(batch.rows, batch.rows)
    bar = np.quantile(base["reward"].astype(np.float64), settings.gate)
    value = []
    for i in range(len(reward)):
        others = [to_batch[i, j] for j in range(len(reward)) if batch.group[j] != batch.group[i]]
        w = float(to_base[i] @ control.weights) - float(np.mean(others))
        value.append(0.0 if w > 0 and (reward[i] < bar or batch.notes[i] < 16) else w)
    spread = similar(base["rows"], base["rows"]).mean(1).std()
    of_diversity = (np.array(value) - np.mean(value)) / spread
    return (of_reward + settings.weight * of_diversity) / (1 + settings.weight)


def compared() -> None:
    base = made_base()
    control, batch = DiversityControl(SETTINGS, base), a_narrow_batch(base)
    expected = expected_advantages(control, base, batch)
    np.testing.assert_allclose(control.advantages(batch)[0].numpy(), expected, atol=2e-3)


def test_advantages_are_those_of_the_formula_by_another_hand():
    compared()


def of_past_rewards(reward, labels, between, unit):
    """Strata whose means are those of an earlier step."""
    past = np.random.default_rng(9).permutation(reward)
    fit = past - stratified_advantages(past, labels, 0.0, 1.0)
    return (reward - fit + between * (fit - reward.mean())) / unit


SELF = np.eye(48, dtype=bool)
MUTATIONS = {
    "sign of the witness": {"witness": lambda *a: -witness(*a)},
    "no gate": {"gated": lambda value, good: value},
    "the clip itself in the pool": {
        "witness": lambda a, q, b, counted: witness(a, q, b, counted | np.eye(48, dtype=bool))
    },
    "spread of the batch": {"stratified_advantages": lambda r, ls, b, unit: stratified_advantages(r, ls, b, r.std())},
    "witness within strata too": {
        "gated": lambda value, good: stratified_advantages(
            gated(value, good), labels_of(made_base(), a_narrow_batch(made_base())), 0.0, 1.0
        )
    },
    "strata of past steps": {"stratified_advantages": of_past_rewards},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_way_of_getting_it_wrong_is_seen(monkeypatch, mutation):
    for name, function in MUTATIONS[mutation].items():
        monkeypatch.setattr(diversity_control, name, function)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compared()


def test_with_rehearsal_alone_advantages_are_those_of_a_plain_run_bit_for_bit():
    base = made_base()
    batch = a_narrow_batch(base)
    control = DiversityControl(DiversitySettings(rehearse=4), base)
    control.unit = 1.0
    reward = torch.from_numpy(batch.scores.total.astype(np.float64))
    plain = group_advantages(reward, torch.from_numpy(batch.group), "none")
    assert torch.equal(control.advantages(batch)[0], plain.float())


def test_rehearsal_alone_comes_to_the_shares_of_the_target(policy):
    """Clips of one token after one prompt: the policy's shares of them become the target's weights."""
    kinds, base = 6, made_base(120)
    token = 30 + np.arange(120) % kinds
    base["ids"] = np.zeros((120, 6), np.int32)
    base["ids"][:, :4], base["ids"][:, 4] = [5, 6, 7, 8], token
    base["lengths"] = np.ones(120, np.float32)
    control = DiversityControl(DiversitySettings(rehearse=256), base)
    wanted = np.array([control.weights[token == 30 + k].sum() for k in range(kinds)])
    assert wanted.max() > 1.5 * wanted.min()
    optimizer, steps = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0), 200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        drawn = control.rehearsal(0, step)
        batches = list(micro_batches(drawn, 256, torch.device("cpu")))
        rehearse(policy, batches, int(drawn.lengths.sum()), 1.0, 1.0, torch.float32)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logprob = completion_logprobs(policy, batches[0], 1.0, torch.float32).logprob
    found = dict(zip(batches[0].ids.tolist(), logprob.exp().tolist(), strict=True))
    assert sum(abs(found[30 + k] - wanted[k]) for k in range(kinds)) / 2 < 0.03
