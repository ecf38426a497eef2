"""The parts of [diversity] in a run: off they change nothing, on they resume exactly, and their units are fixed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from made_base import batch_of, made_base
from small_run import SYMBOLIC, comparable, config_for

from fastsmart import UserError, train
from fastsmart.grpo.settings import DiversitySettings
from fastsmart.music.histograms import BINS
from fastsmart.music.likeness import split_rows
from fastsmart.trainer import diversity_control
from fastsmart.trainer.batch import micro_batches
from fastsmart.trainer.diversity_control import DiversityControl
from fastsmart.trainer.rehearsal import rehearse
from fastsmart.trainer.update import completion_logprobs

pytestmark = pytest.mark.usefixtures("light_runs")
EVERYTHING = {"stratify": 0.25, "weight": 0.5, "floor": 0.9, "clips": 64, "gate": 0.1, "rehearse": 3}
PLAIN = {"reward": {"normalize": "none"}}


def test_with_one_stratum_and_no_witness_advantages_are_centred_rewards_in_units_of_the_base():
    base, chosen = made_base(), np.arange(32)
    control = DiversityControl(DiversitySettings(weight=0.0, stratify=0.0, strata=()), base)
    found, about = control.advantages(batch_of(base, chosen))
    reward = base["reward"][chosen].astype(np.float64)
    expected = (reward - reward.mean()) * 32 / 31 / base["reward"].astype(np.float64).std()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert about["weight"] == 0.0
    assert 0.9 < about["kept"] < 1.1


def test_a_reward_in_other_units_gives_the_same_advantages():
    base, chosen = made_base(), np.arange(48)
    moved = base | {"reward": 3 * base["reward"] + 7}
    settings = DiversitySettings(stratify=0.25, weight=0.7)
    ours, theirs = (DiversityControl(settings, b).advantages(batch_of(b, chosen))[0] for b in (base, moved))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_order_of_clips_and_groups_does_not_matter():
    base, chosen, group = made_base(), np.arange(48), np.repeat(np.arange(12), 4)
    control = DiversityControl(DiversitySettings(stratify=0.0, weight=1.0), base)
    order = np.random.default_rng(1).permutation(48)
    first, _ = control.advantages(batch_of(base, chosen, group))
    moved, _ = control.advantages(batch_of(base, chosen[order], group[order]))
    torch.testing.assert_close(moved, first[order], rtol=1e-5, atol=1e-6)


def test_clips_that_are_all_alike_have_finite_advantages():
    base = made_base()
    control = DiversityControl(DiversitySettings(stratify=0.0, weight=1.0), base)
    found, about = control.advantages(batch_of(base, np.zeros(16, int)))
    assert found.isfinite().all()
    assert about["kept"] == pytest.approx(0.0, abs=1e-6)


def test_what_the_batch_has_too_much_of_is_charged_whatever_its_reward():
    """One clip 24 times among 40: with weight on the witness its copies fall behind clips of equal reward."""
    base = made_base() | {"reward": np.linspace(5, 6, 200).astype(np.float32)}
    chosen = np.concatenate([np.full(24, 100), np.arange(101, 117)])
    found, _ = DiversityControl(DiversitySettings(weight=2.0), base).advantages(
        batch_of(base, chosen, np.zeros(40, int))
    )
    assert found[:24].max() < found[24:].min()


def test_a_clip_that_could_not_be_scored_teaches_nothing():
    base = made_base()
    batch = batch_of(base, np.arange(16))
    batch.scores.total[3] = np.nan
    found, _ = DiversityControl(DiversitySettings(stratify=0.0, weight=1.0), base).advantages(batch)
    assert found[3] == 0
    assert found.isfinite().all()


def test_rewards_that_are_all_the_same_have_no_unit():
    base = made_base()
    with pytest.raises(UserError, match="all the same"):
        DiversityControl(DiversitySettings(stratify=0.0), base | {"reward": np.ones(200, np.float32)})


def test_what_is_rehearsed_are_clips_of_the_target_drawn_by_their_weights():
    base = made_base()
    control = DiversityControl(DiversitySettings(rehearse=4000), base)
    drawn = control.rehearsal(seed=0, step=3)
    first = drawn.prompt_ids[:, 0]
    which = {int(row[0]): i for i, row in enumerate(base["ids"])}
    assert len(which) < len(base["ids"])  # several begin alike: shares are of beginnings
    expected = dict.fromkeys(which, 0.0)
    for i, row in enumerate(base["ids"]):
        expected[int(row[0])] += control.weights[i]
    for start, share in expected.items():
        assert abs((first == start).mean() - share) < 0.04
    i = 7
    whole = np.concatenate([drawn.prompt_ids[i], drawn.ids[i, : drawn.lengths[i]]])
    assert any((row[: len(whole)] == whole).all() and not row[len(whole) :].any() for row in base["ids"])
    again = control.rehearsal(seed=0, step=3)
    np.testing.assert_array_equal(drawn.ids, again.ids)
    assert not np.array_equal(control.rehearsal(seed=0, step=4).ids, drawn.ids)


def test_rehearsal_alone_learns_the_clips_of_the_target(policy):
    base = made_base(64)
    control = DiversityControl(DiversitySettings(rehearse=16), base)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)
    device, kept = torch.device("cpu"), []
    for step in range(60):
        drawn = control.rehearsal(0, step)
        batches = list(micro_batches(drawn, 8, device))
        rehearse(policy, batches, int(drawn.lengths.sum()), 1.0, 1.0, torch.float32)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            logprob = torch.cat([completion_logprobs(policy, b, 1.0, torch.float32).logprob for b in batches])
        kept.append(float(logprob.mean()))
    assert kept[0] < -4
    assert kept[-1] > -1


def test_rows_come_apart_as_they_were_put_together():
    rows = split_rows(made_base()["rows"])
    assert {name: table.shape[1] for name, table in rows.items()} == {name: bins + 1 for name, bins in BINS.items()}
    for table in rows.values():
        np.testing.assert_allclose(table.sum(1), 1.0, atol=1e-5)


def test_a_run_with_everything_on_resumes_exactly(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(diversity_control, "FEWEST_NOTES", 0)  # a random policy plays few
    steps = {"steps": 4, "eval_every": 0, "save_every": 2}
    change = (SYMBOLIC, PLAIN, {"diversity": EVERYTHING, "train": steps})
    whole = tmp_path / "whole"
    train(config_for(checkpoint, *change), whole)
    lines = comparable(whole)
    assert all({"kept", "weight"} == line["diversity"].keys() for line in lines[1:])
    half = tmp_path / "half"
    shutil.copytree(whole, half, symlinks=True)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    text = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(text[:3]))
    train(config_for(checkpoint, *change), half, resume=True)
    assert comparable(half) == lines
    (half / "base.npz").unlink()
    shutil.rmtree(half / "checkpoints" / "step-000004")
    (half / "metrics.jsonl").write_text("".join(text[:3]))
    with pytest.raises(UserError, match=r"base\.npz is missing"):
        train(config_for(checkpoint, *change), half, resume=True)


def test_switched_off_nothing_is_measured(checkpoint, tmp_path):
    train(config_for(checkpoint, {"train": {"steps": 1, "eval_every": 0}}, SYMBOLIC, PLAIN), tmp_path)
    assert not (tmp_path / "base.npz").exists()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert "diversity" not in line
