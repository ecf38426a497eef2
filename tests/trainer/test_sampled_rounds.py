"""Runs that learn in rounds, by DPO and by tilted fine-tuning: nothing is moved by nothing, and a run that ends at any
instant of a round goes on to the same digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import started
from small_run import SYMBOLIC, command, comparable, config_for, write_config

from fastsmart import UserError, train
from fastsmart.config import Config
from fastsmart.dpo.settings import DpoSettings
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.hf_format import load_policy
from fastsmart.reward import RewardBlend, register
from fastsmart.sampling import Rollout
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer import credit_targets, dpo, rounds
from fastsmart.trainer.dpo import pair_batches
from fastsmart.trainer.rollout_worker import RolloutWorker
from fastsmart.trainer.rounds import Rounds
from fastsmart.trainer.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("light_runs")
DPO = TrainSettings(algorithm="dpo")
PLAYS = Path("pop909-tiny")  # a random policy plays next to nothing, so that all its clips score the same
SETTINGS = {
    "dpo": {"prompts": 3, "round_steps": 3, "pairs": 4, "keep": 0.25, "fewest_notes": 0},
    "tilt": {"prompts": 3, "round_steps": 3, "clips": 5, "best_of": 4},
    "credit": {"prompts": 6, "round_steps": 3, "clips": 5, "pull": 0.1, "neutral": ["mean_pitch"], "alternatives": 2},
}


def changes_for(algorithm: str, **train_keys) -> list[dict]:
    keys = {"algorithm": algorithm, "eval_every": 0, "eval_prompts": 2, "listen": 0, "save_every": 0, "prompts": 2}
    return [
        SYMBOLIC,
        {"reward": {**SYMBOLIC["reward"], "normalize": "none"}},
        {"train": keys | {"steps": 6, "micro_batch": 4} | train_keys},
        {"sampling": {"group": 4, "max_tokens": 40}},
        {algorithm: SETTINGS[algorithm]},
    ]


def weights(run: Path) -> bytes:
    return (sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors").read_bytes()


class Killed(Exception):
    """Stands for whatever ends a run."""


def ends_at(monkeypatch, owner, name: str, call: int) -> None:
    """Let the run end at the `call`-th call of this function, counted from 1."""
    honest, calls = getattr(owner, name), iter(range(1, 10**6))

    def function(*args, **kwargs):
        if next(calls) == call:
            raise Killed(name)
        return honest(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


# One evaluation, then two calls of the sampler for the first round: the second round is that of the calls 4 and 5
INSTANTS = {
    "sampling": (RolloutWorker, "generate", 5),
    "scoring": (RewardBlend, "__call__", 5),
    "the reference": (dpo, "reference_logprobs", 2),
    "a step": (rounds, "step_on_gradients", 5),
    "the first step": (rounds, "step_on_gradients", 1),
    "a step of tilt": (rounds, "step_on_gradients", 5),
    "a step of credit": (rounds, "step_on_gradients", 5),
    "the value of credit": (credit_targets, "explained", 3),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of runs that nothing ended, by algorithm."""
    folder = tmp_path_factory.mktemp("rounds")
    for algorithm in SETTINGS:
        train(config_for(PLAYS, *changes_for(algorithm)), folder / algorithm)
    return folder


@pytest.mark.parametrize("instant", INSTANTS)
def test_ended_in_any_phase_of_a_round_it_goes_on_to_the_same_digits(whole, tmp_path, monkeypatch, instant):
    algorithm = next((name for name in SETTINGS if name in instant), "dpo")
    config, out = config_for(PLAYS, *changes_for(algorithm)), tmp_path / "run"
    with monkeypatch.context() as patch:
        ends_at(patch, *INSTANTS[instant])
        with pytest.raises(Killed):
            train(config, out)
    done = len(comparable(out)) - 1
    assert done == {"the first step": 0}.get(instant, 4 if "step" in instant else 3)
    train(config, out, resume=True)
    assert comparable(out) == comparable(whole / algorithm)
    assert weights(out) == weights(whole / algorithm)


def test_the_lines_of_a_dpo_run_say_what_its_rounds_and_pairs_did(whole):
    lines = comparable(whole / "dpo")[1:]
    assert [line["round"]["number"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert [line["staleness"] for line in lines] == [0, 1, 2, 0, 1, 2]
    first = lines[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the policy is its own reference
    assert first["chosen_gain"] == pytest.approx(0, abs=1e-3)
    assert first["kl_per_completion"] == pytest.approx(0, abs=1e-4)
    assert first["token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
    assert lines[3]["kl_per_completion"] > 1e-3  # the second round's policy is another one
    for line in lines:
        assert line["round"]["chosen_reward"] > line["round"]["rejected_reward"]
        assert line["pairs"] == 4
        assert line["round"]["pairs"] == 3
        assert line["idle_completions"] == 12 - 2 * 3
    assert lines[2]["accuracy"] > first["accuracy"]
    assert lines[2]["loss"] < first["loss"]
    assert {p.name for p in (whole / "dpo" / "rounds").iterdir()} == {
        f"{name}-000{number}.npz" for name in ("samples", "reference") for number in (0, 1)
    }


def test_copies_of_training_pieces_are_never_chosen(whole, tmp_path):
    """A run whose training set holds what its first round chooses chooses something else."""
    with np.load(whole / "dpo" / "rounds" / "samples-0000.npz") as kept:
        reward, group = kept["total"], kept["group"]
        best = [int(np.flatnonzero(group == g)[reward[group == g].argmax()]) for g in range(3)]
        pieces = [np.concatenate([kept["prompt_ids"][i][: kept["prompt_lengths"][i]],
                                  kept["ids"][i][: kept["lengths"][i]]]) for i in best]  # fmt: skip
    notes = decode(TokenBatch.pack(pieces), load_policy(PLAYS).vocab)
    (tmp_path / "pieces").mkdir()
    for i in range(len(notes)):
        notes.to_midi(i, tmp_path / "pieces" / f"{i}.mid")
    *changes, own = changes_for("dpo", steps=3)
    own = {"dpo": own["dpo"] | {"training_set": str(tmp_path / "pieces")}}
    train(config_for(PLAYS, *changes, own), tmp_path / "run")
    told, before = (comparable(run)[1]["round"] for run in (tmp_path / "run", whole / "dpo"))
    assert told["refused"]["copy"] == 3
    assert "copy" not in before["refused"]
    assert told["chosen_reward"] < before["chosen_reward"]


def test_a_training_set_without_pieces_is_refused_before_any_work(tmp_path):
    (tmp_path / "nothing").mkdir()
    config = config_for(PLAYS, *changes_for("dpo"), {"dpo": {"training_set": str(tmp_path / "nothing")}})
    with pytest.raises(UserError, match=r"^dpo\.training_set .*nothing holds no MIDI files"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("rounds/*"))


def test_the_reference_is_computed_once_a_round_without_dropout(tmp_path, monkeypatch):
    honest, training = dpo.reference_logprobs, []

    def watched(policy, *args):
        training.append(policy.training)
        return honest(policy, *args)

    monkeypatch.setattr(dpo, "reference_logprobs", watched)
    train(config_for(PLAYS, *changes_for("dpo")), tmp_path / "run")
    assert training == [False, False]


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_what_is_kept_of_a_round_must_be_there_within_it(whole, tmp_path, monkeypatch, algorithm):
    config, out = config_for(PLAYS, *changes_for(algorithm, save_every=1)), tmp_path / "run"
    with monkeypatch.context() as patch:
        ends_at(patch, rounds, "step_on_gradients", 3)
        with pytest.raises(Killed):
            train(config, out)
    path = out / "rounds" / "samples-0000.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"samples-0000\.npz is missing or damaged, and step 2 of its round needs it"):
        train(config, out, resume=True)


@register
class Same:
    """One value for every clip."""

    name, needs_audio = "same_for_all", False

    def __call__(self, clips):
        return np.ones(len(clips), np.float32)


@pytest.mark.parametrize("algorithm", ["dpo", "credit"])
def test_a_reward_that_is_the_same_for_all_moves_nothing(tmp_path, algorithm):
    constant = {"reward": {"terms": {"same_for_all": 1.0}}}
    if algorithm == "credit":
        constant["credit"] = SETTINGS["credit"] | {"pull": 0.0}
    result = train(config_for(PLAYS, *changes_for(algorithm, weight_decay=0.1), constant), tmp_path / "run")
    base = load_policy(PLAYS)
    assert all(torch.equal(a, b) for a, b in zip(result.policy.parameters(), base.parameters(), strict=True))
    name = {"dpo": "pairs", "credit": "tokens"}[algorithm]
    assert [line[name] for line in comparable(tmp_path / "run")[1:]] == [0] * 6


def test_tilted_fine_tuning_makes_what_it_has_weighted_likelier(whole):
    lines = comparable(whole / "tilt")[1:]
    assert lines[2]["loss"] < lines[0]["loss"]
    assert all(line["round"]["weighted_reward"] > line["reward"] for line in lines)
    assert all(1 <= line["round"]["effective_clips"] <= 12 for line in lines)


def test_the_lines_of_a_credit_run_say_how_well_values_predict_and_the_loss_falls(whole):
    lines = comparable(whole / "credit")[1:]
    assert all(set(line["round"]) >= {"value_r2", "half_value_r2"} for line in lines)
    assert lines[0]["log_ratio"] == pytest.approx(0, abs=1e-3)  # nothing has been learnt yet
    assert lines[3]["kl_per_completion"] > 1e-3
    assert {p.name for p in (whole / "credit" / "rounds").iterdir()} == {
        f"{name}-000{number}.npz" for name in ("samples", "credit") for number in (0, 1)
    }
    with np.load(whole / "credit" / "rounds" / "credit-0001.npz", allow_pickle=False) as kept:
        target, advantage, ends = kept["target"], kept["advantage"], kept["ends"]
        chosen, wanted = kept["chosen"], kept["other_target"]
    # where all alternatives are the token itself there is nothing to learn
    assert wanted[chosen].any(axis=1).mean() > 0.5
    assert not wanted[~chosen].any()
    assert np.abs(target - advantage)[ends].max() > 1e-4  # what has been learnt is partly given back
    assert not target[~ends].any()


def test_a_micro_batch_of_pairs_is_bounded_by_its_tokens():
    random = np.random.default_rng(0)
    lengths = np.array([40] * 3 + [5] * 17, np.int32)
    ids = random.integers(1, 9, (20, 40)).astype(np.int32)
    ones, number = np.ones(20, np.int32), np.arange(20, dtype=np.int32)
    rollout = Rollout(np.ones((20, 1), np.int32), ones, ids, lengths, np.zeros((20, 40), np.float32), number, 0)
    chosen, rejected = random.permutation(10), random.permutation(10) + 10
    batches = list(pair_batches(rollout, chosen, rejected, 6, torch.device("cpu")))
    halves = [np.split(batch.completions.numpy(), 2) for batch in batches]
    found = {(int(c), int(r)) for first, second in halves for c, r in zip(first, second, strict=True)}
    assert found == set(zip(chosen.tolist(), rejected.tolist(), strict=True))
    longest = 1 + lengths[np.concatenate([chosen, rejected])].max()
    assert all(batch.rows.shape[0] * (batch.rows.shape[1] + 1) <= 6 * longest for batch in batches)
    assert max(len(batch.rows) for batch in batches) > 6  # of short ones it takes more
    # a long pair is never cut in two, and of the short ones three have as many tokens as one long completion
    alone = [len(batch.rows) for batch in pair_batches(rollout, chosen, rejected, 1, torch.device("cpu"))]
    assert alone == [2, 2, 2, 6, 6, 2]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_two_ranks_are_one(whole, tmp_path, algorithm):
    train_on_two_ranks(write_config(tmp_path, PLAYS, *changes_for(algorithm)), tmp_path / "two")
    assert_close(tmp_path / "two", whole / algorithm)


def train_on_two_ranks(settings: Path, out: Path) -> None:
    launch = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m fastsmart train"
    files = ["--out", str(out), "--config", str(settings)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 900, "env": environment, "check": False}
    done = subprocess.run([sys.executable, *launch.split(), *files], **options)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(run: Path, other: Path) -> None:
    """Every number of one run's metrics is the other's, but for rounding."""
    ours, theirs = comparable(other), comparable(run)
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert dict(numbers(two)) == pytest.approx(dict(numbers(one)), rel=1e-4, abs=1e-4), one["step"]


def numbers(value, path=""):
    """Every number of a line under its path; the share of chosen completions that fell is one of rounding at first."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}/{key}")
    elif value is not None and not path.endswith(("penalised", "accuracy")):
        yield path, float(value)


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_digits(whole, tmp_path):
    settings, killed = str(write_config(tmp_path, PLAYS, *changes_for("dpo"))), tmp_path / "run"
    random, options = np.random.default_rng(), ["--config", settings]
    for _ in range(3):
        with started(command(killed, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            begun = time.monotonic()
            while process.poll() is None and not (killed / "metrics.jsonl").exists() and time.monotonic() - begun < 300:
                time.sleep(0.02)
            time.sleep(random.uniform(0.0, 2.0))
            process.send_signal(signal.SIGKILL)
        options = ["--resume"] if (killed / "config.toml").exists() else options
    subprocess.run(command(killed, *options), check=True, capture_output=True, timeout=600)
    assert comparable(killed) == comparable(whole / "dpo")
    assert weights(killed) == weights(whole / "dpo")
    state = json.loads((sorted((killed / "checkpoints").glob("step-*"))[-1] / "state.json").read_text())
    assert state["step"] == 6


def test_a_round_needs_a_prompt_for_each_rank(tmp_path):
    few = SimpleNamespace(config=Config(dpo=DpoSettings(prompts=3), train=DPO), ranks=Ranks(0, 4))
    with pytest.raises(UserError, match=r"dpo\.prompts is 3, fewer than the 4 ranks"):
        Rounds(few, tmp_path, "dpo")


def test_a_neutral_feature_that_there_is_not_is_refused_before_anything_is_sampled(tmp_path):
    changes = [*changes_for("credit"), {"credit": {**SETTINGS["credit"], "neutral": ["mean_pitch", "loudness"]}}]
    with pytest.raises(UserError, match=r"^credit\.neutral has 'loudness'; choose of notes, .*mean_pitch"):
        train(config_for(PLAYS, *changes), tmp_path / "run")
    assert not list((tmp_path / "run").glob("rounds/samples*"))


def test_clips_too_short_for_a_note_move_nothing(tmp_path):
    changes = [*changes_for("credit", steps=2, average=0.0), {"sampling": {"group": 4, "max_tokens": 1}}]
    train(config_for(PLAYS, *changes), tmp_path / "run")
    before, after = load_policy("pop909-tiny"), load_policy(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
