"""Runs that follow each other from one base and make one policy: each is a run of its own, their sum is exact, and a
process that ends at any step goes on to the same digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import comparable, config_for, write_config
from test_sampled_rounds import PLAYS, assert_close, changes_for, ends_at, train_on_two_ranks

from fastsmart import UserError, train
from fastsmart.config import Config, with_overrides
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.trainer import rounds
from fastsmart.trainer.merged_runs import MergedRuns
from fastsmart.trainer.rounds import Rounds

pytestmark = pytest.mark.usefixtures("light_runs")
MERGE = {"merge": {"runs": 2, "scale": 1.2, "temperature": 0.8}}


def weights_of(policy) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy() for name, weight in policy.named_parameters()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two runs of credit, six steps each, in one folder."""
    out = tmp_path_factory.mktemp("merged") / "run"
    train(config_for(PLAYS, *changes_for("credit", steps=12), MERGE), out)
    return out


TILTED = [
    *changes_for("credit", steps=15, keep=10),
    {"credit": {"prompts": 6, "round_steps": 3, "clips": 5, "alternatives": 1}},
    {"merge": MERGE["merge"] | {"tilt_steps": 3, "tilt_learning_rate": 3e-5}},
    {"tilt": {"prompts": 3, "clips": 5, "best_of": 4}},
]


@pytest.fixture(scope="module")
def tilted(tmp_path_factory) -> Path:
    """The same, and three steps of tilted fine-tuning."""
    out = tmp_path_factory.mktemp("tilted") / "run"
    train(config_for(PLAYS, *TILTED), out)
    return out


def test_fine_tuning_begins_with_the_merged_policy_on_a_round_of_its_own(tilted: Path) -> None:
    lines = comparable(tilted)[1:]
    assert [line["round"]["number"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    rates = [line["learning_rate"] for line in lines]
    assert rates[12:] == pytest.approx([3e-5, 2e-5, 1e-5])
    assert "weighted_reward" in lines[12]["round"]
    assert "value_r2" in lines[11]["round"]
    assert (tilted / "rounds/samples-0004.npz").is_file()
    assert not (tilted / "merged/run-3").exists()
    merged, end = (weights_of(load_policy(str(tilted / f"checkpoints/step-{step:06d}"))) for step in (12, 15))
    assert np.abs(merged["model.norm.weight"] - end["model.norm.weight"]).max() < 0.01  # still cooled
    assert any((merged[name] != end[name]).any() for name in merged)


def test_the_policy_is_the_base_and_the_mean_change_cooled(whole: Path) -> None:
    base, first, second, tuned = (
        weights_of(load_policy(str(source)))
        for source in (PLAYS, whole / "merged/run-1", whole / "merged/run-2", whole / "checkpoints/step-000012")
    )
    for name, start in base.items():
        mean = (first[name].astype(np.float64) + second[name]) / 2
        wanted = start + 1.2 * (mean - start)
        if name == "model.norm.weight":
            wanted /= 0.8
        np.testing.assert_allclose(tuned[name], wanted, rtol=2e-7, atol=2e-8)
        assert (first[name] != start).any()
        assert (first[name] != second[name]).any()


def test_what_is_evaluated_and_found_in_the_folder_is_the_merged_policy(whole: Path) -> None:
    assert comparable(whole)[-1]["eval"]["reward"]["mean"] != comparable(whole)[0]["eval"]["reward"]["mean"]
    found, merged = load_policy(str(whole)), load_policy(str(whole / "checkpoints/step-000012"))
    for ours, theirs in zip(found.parameters(), merged.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_first_run_is_the_run_alone(whole: Path, tmp_path: Path) -> None:
    train(config_for(PLAYS, *changes_for("credit", steps=6)), tmp_path / "alone")
    alone, ours = (comparable(folder)[1:7] for folder in (tmp_path / "alone", whole))
    assert [line["learning_rate"] for line in ours] == [line["learning_rate"] for line in alone]
    assert [line["loss"] for line in ours] == [line["loss"] for line in alone]
    kept = (whole / "merged/run-1/model.safetensors").read_bytes()
    assert kept == (tmp_path / "alone/checkpoints/step-000006/model.safetensors").read_bytes()


def test_the_second_run_begins_from_the_base_on_clips_of_its_own(whole: Path) -> None:
    lines = comparable(whole)[1:]
    assert [line["round"]["number"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [line["learning_rate"] for line in lines[6:]] == [line["learning_rate"] for line in lines[:6]]
    assert lines[6]["kl_per_completion"] == pytest.approx(0, abs=1e-4)
    assert lines[3]["kl_per_completion"] > 1e-3
    assert lines[6]["reward"] != lines[0]["reward"]


@pytest.mark.parametrize(
    ("name", "call"), [*(("whole", call) for call in (6, 7, 9, 12)), ("tilted", 13), ("tilted", 14)]
)
def test_ended_at_any_step_it_goes_on_to_the_same_digits(request, tmp_path: Path, monkeypatch, name, call) -> None:
    undisturbed = request.getfixturevalue(name)
    changes = TILTED if name == "tilted" else [*changes_for("credit", steps=12), MERGE]
    config, out = config_for(PLAYS, *changes), tmp_path / "run"
    with monkeypatch.context() as patch:
        ends_at(patch, rounds, "step_on_gradients", call)
        with pytest.raises(Exception, match="step_on_gradients"):
            train(config, out)
    train(config, out, resume=True)
    assert comparable(out) == comparable(undisturbed)
    last = f"checkpoints/step-{config.train.steps:06d}/model.safetensors"
    assert (out / last).read_bytes() == (undisturbed / last).read_bytes()


def test_one_run_can_be_lengthened_and_cooled(tmp_path: Path) -> None:
    merge = {"merge": {"scale": 2.0, "temperature": 0.5}}
    train(config_for(PLAYS, *changes_for("credit", steps=3), merge), tmp_path / "run")
    base, tuned, last = (
        weights_of(load_policy(str(source)))
        for source in (PLAYS, tmp_path / "run/merged/run-1", tmp_path / "run/checkpoints/step-000003")
    )
    for name, cooler in (("model.layers.0.mlp.down_proj.weight", 1), ("model.norm.weight", 2)):
        wanted = cooler * (base[name] + 2 * (tuned[name] - base[name]))
        np.testing.assert_allclose(last[name], wanted, rtol=1e-6, atol=1e-7)


def test_grpo_begins_anew_too(tmp_path: Path) -> None:
    """Steps that sample are given the base, not the policy of the run before."""
    config = config_for(
        PLAYS, *changes_for("credit")[:1], {"merge": {"runs": 2}}, {"train": {"steps": 4, "prompts": 2}}
    )
    train(config, tmp_path / "run")
    lines = comparable(tmp_path / "run")[1:]
    assert [line["learning_rate"] for line in lines[2:]] == [line["learning_rate"] for line in lines[:2]]
    assert lines[2]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[1]["kl"] > 1e-6


def test_the_value_of_a_run_is_fitted_to_its_own_rounds(policy) -> None:
    config = with_overrides(
        Config(), ["train.algorithm=credit", "train.steps=192", "merge.runs=2", "credit.round_steps=32"]
    )

    class At:
        merge = MergedRuns(config, Path("run"), Ranks())
        ranks = Ranks()

        def __init__(self, step: int) -> None:
            self.config, self.steps_done = config, step

    firsts = [Rounds(At(step), Path("run"), "credit").first for step in (0, 95, 96, 191)]  # type: ignore[arg-type]
    assert firsts == [0, 0, 3, 3]


def test_a_policy_of_an_earlier_run_that_is_gone_is_named(whole: Path, tmp_path: Path, policy) -> None:
    config = config_for(PLAYS, *changes_for("credit", steps=12), MERGE)
    merged, optimizer = MergedRuns(config, tmp_path, Ranks()), make_optimizer(policy, 1e-3, (0.9, 0.999), 0.0)
    assert not merged.begins(0)
    assert merged.begins(6)
    merged.restart(policy, policy, optimizer)
    with pytest.raises(UserError, match=r"^the policy of run 1 is needed for the merged one: .*merged/run-1"):
        merged.after_step(12, policy, policy)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["merge.runs=3"],
            r"^train\.steps is 200; less merge\.tilt_steps \(0\) it must be a multiple of merge\.runs \(3\)",
        ),
        (["merge.tilt_steps=200"], r"^train\.steps is 200; less merge\.tilt_steps \(200\) it must be"),
        (["tilt.clips=3", "merge.runs=2"], r"^tilt\.clips is set, and train\.algorithm 'grpo' does not read it"),
        (["merge.tilt_steps=100", "tilt.prompts=1000000"], r"^tilt\.prompts times sampling\.group makes 8,000,000"),
        (["merge.runs=0"], r"^merge\.runs is 0"),
        (["merge.scale=0"], r"^merge\.scale is 0\.0; it must be above 0"),
        (["merge.tilt_learning_rate=1e-4"], r"^merge\.tilt_learning_rate is set, and without merge\.tilt_steps"),
        (["merge.tilt_learning_rate=-1", "merge.tilt_steps=2"], r"^merge\.tilt_learning_rate is -1\.0; it must be 0"),
        (["merge.temperature=-1"], r"^merge\.temperature is -1\.0; it must be above 0"),
        (
            ["merge.runs=2", "train.average=0.9"],
            r"^train\.average is 0\.9, which goes on from run to run; with \[merge\]",
        ),
        (["merge.runs=2", "diversity.stratify=0.5"], r"^\[diversity\] is 'on', which goes on from run to run"),
        (
            ["merge.runs=2", "train.pipeline=one-step-off", "grpo.ratio=behaviour"],
            r"^train\.pipeline is 'one-step-off', which goes on",
        ),
        (
            ["merge.runs=2", "train.algorithm=credit", "credit.round_steps=30"],
            r"^credit\.round_steps is 30, and a run of \[merge\] takes 100 steps; make these",
        ),
        (["merge.runs=2", "train.algorithm=tilt"], r"^tilt\.round_steps is 0, and a run of"),
    ],
)
def test_what_cannot_be_merged_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        with_overrides(Config(), settings)
    assert "\n" not in str(caught.value)


def test_a_merged_run_cannot_be_made_longer(whole: Path) -> None:
    config = config_for(PLAYS, *changes_for("credit", steps=12), MERGE)
    with pytest.raises(UserError, match=r"merges its policies after step 12; leave train\.steps as it is"):
        train(config, whole, resume=True, changes={"train.steps": 24})


@pytest.mark.slow
def test_two_ranks_are_one(whole: Path, tmp_path: Path) -> None:
    settings = write_config(tmp_path, PLAYS, *changes_for("credit", steps=12), MERGE)
    train_on_two_ranks(settings, tmp_path / "two")
    assert_close(tmp_path / "two", whole)
