"""Training on vLLM end to end; and a sampler that holds other weights than the trainer is caught, before and during."""

import json
from pathlib import Path

import pytest
import torch
from tiny_policy import make_policy
from vllm_policy import make_vllm_policy

from fastsmart import Config, UserError, train
from fastsmart.config import merged
from fastsmart.policy.hf_format import save_policy
from fastsmart.run.display import Silent
from fastsmart.sampling import make_engine
from fastsmart.sampling import vllm as vllm_engine
from fastsmart.sampling.native import NativeEngine
from fastsmart.tokens.prompts import make_prompts
from fastsmart.trainer.parity import check_engine, mismatch_limit
from fastsmart.trainer.rollout_worker import RolloutWorker

pytestmark = pytest.mark.usefixtures("light_runs")
LEFT_OUT = "model.layers.1.mlp.down_proj.weight"
SMALL = {
    "prompts": {"time_signatures": ["4/4"]},
    "sampling": {"group": 4, "max_tokens": 60},
    "reward": {"terms": {"variety": 1.0, "filled_beats": 1.0}},
    "train": {
        "steps": 6,
        "prompts": 2,
        "eval_every": 0,
        "eval_prompts": 4,
        "save_every": 0,
        "listen": 0,
        "learning_rate": 1e-3,
        "schedule": "constant",
        "threads": 1,
    },
}


def config_for(folder: Path, policy, engine: str, **changes: dict) -> Config:
    save_policy(policy, folder / "policy")
    tree = {"policy": {"source": str(folder / "policy")}, "sampling": {"engine": engine}, **changes}
    return merged(merged(Config(), SMALL), tree)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Listening(Silent):
    """Keeps what a person would be told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def leave_out(monkeypatch, engine: str, after: int = 0) -> None:
    """From the sync of version `after` on, LEFT_OUT is not sent."""
    if engine == "native":
        build, load, of_the_run = NativeEngine.__init__, NativeEngine.load, []

        def built(self, *arguments, **named):
            build(self, *arguments, **named)
            of_the_run.append(self)
            if not after and self is of_the_run[0]:
                self.weights.layers[1].down.weight.zero_()

        def partial(self, policy, version):
            held = self.weights.layers[1].down.weight.clone()
            load(self, policy, version)
            if version >= after and self is of_the_run[0]:
                self.weights.layers[1].down.weight.copy_(held)

        monkeypatch.setattr(NativeEngine, "__init__", built)
        monkeypatch.setattr(NativeEngine, "load", partial)
        return
    everything, syncs = vllm_engine.weights_of, []

    def without(policy):
        syncs.append(1)
        return ((n, t) for n, t in everything(policy) if len(syncs) <= after or n != LEFT_OUT)

    monkeypatch.setattr(vllm_engine, "weights_of", without)


@pytest.fixture(params=["native", "vllm"])
def engine_and_policy(request, vocab):
    return request.param, (make_policy if request.param == "native" else make_vllm_policy)(vocab)


def test_six_steps_on_vllm_from_prompt_to_checkpoint(vocab, tmp_path):
    config = config_for(tmp_path, make_vllm_policy(vocab), "vllm")
    listening = Listening()
    result = train(config, tmp_path / "run", display=listening)
    assert (result.step, result.exit_code) == (6, 0)
    steps = [line for line in lines(tmp_path / "run") if line["step"]]
    assert len(steps) == 6
    for line in steps:  # in float32 sampler and trainer agree to 1e-4 on every token, after each sync
        assert line["logprob_gap_max"] < 1e-4
        assert line["token_mult_prob_error"] < 1.00001
    assert steps[-1]["kl"] > 1e-5, "the policy did not move"
    assert listening.messages == []


@pytest.mark.slow
def test_a_run_on_vllm_resumes_with_the_same_metrics(vocab, tmp_path):
    config = config_for(tmp_path, make_vllm_policy(vocab), "vllm", train={"steps": 2, "save_every": 1})
    train(config, tmp_path / "whole")
    train(merged(config, {"train": {"steps": 2}}), tmp_path / "cut")
    for later in (tmp_path / "cut" / "checkpoints").glob("step-000002"):
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    train(config, tmp_path / "cut", resume=True)
    whole, cut = (
        [line | {"time": None, "health": None} for line in lines(tmp_path / name)] for name in ("whole", "cut")
    )
    assert whole == cut


def test_training_refuses_to_begin_with_a_tensor_that_did_not_arrive(engine_and_policy, tmp_path, monkeypatch):
    engine, policy = engine_and_policy
    leave_out(monkeypatch, engine)
    with pytest.raises(UserError, match=f"disagree about the policy .*: {LEFT_OUT} is the first tensor that differs"):
        train(config_for(tmp_path, policy, engine), tmp_path / "run")


def test_a_tensor_that_no_longer_arrives_trips_the_health_metric(engine_and_policy, tmp_path, monkeypatch):
    engine, policy = engine_and_policy
    leave_out(monkeypatch, engine, after=2)
    listening = Listening()
    train(config_for(tmp_path, policy, engine, train={"steps": 12}), tmp_path / "run", display=listening)
    errors = [line["token_mult_prob_error"] for line in lines(tmp_path / "run") if line["step"]]
    assert max(errors[:2]) < 1.00001
    assert errors[-1] > 1.001
    assert listening.messages
    assert f"{LEFT_OUT} is the first tensor that differs" in listening.messages[-1]
    assert "limit 1.001" in listening.messages[-1]


def test_the_limit_follows_the_dtype_unless_the_run_says_otherwise(vocab, tmp_path):
    config = config_for(tmp_path, make_policy(vocab), "native")
    assert mismatch_limit(config, torch.float32) == 1.001
    assert mismatch_limit(config, torch.bfloat16) == 1.05
    assert mismatch_limit(merged(config, {"train": {"mismatch_limit": 1.2}}), torch.float32) == 1.2
    with pytest.raises(UserError, match=r"train\.mismatch_limit is 0\.9"):
        merged(config, {"train": {"mismatch_limit": 0.9}})


def test_the_same_tensors_computing_something_else_are_told_apart(vocab, tmp_path):
    policy = make_policy(vocab)
    config = config_for(tmp_path, policy, "native")
    engine = make_engine(config.sampling, policy, version=3)
    assert check_engine(engine, policy, config, 3, torch.float32) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(UserError, match="version 3 of the policy, training is at 4"):
        check_engine(engine, policy, config, 4, torch.float32)
    engine.weights.rope = engine.weights.rope.roll(1, 0)  # its rotary table
    with pytest.raises(UserError, match="their tensors are the same"):
        check_engine(engine, policy, config, 3, torch.float32)


def test_first_completions_reach_the_renderer_before_the_last_is_sampled(vocab, tmp_path, soundfont):
    policy = make_vllm_policy(vocab)
    change = {"reward": {"terms": {"consonance": 1.0}}, "audio": {"workers": 1, "soundfont": str(soundfont)}}
    config = config_for(tmp_path, policy, "vllm", train={"prompts": 4}, **change)
    with RolloutWorker(config, policy, "", torch.float32) as worker:
        worker.engine.eos = 60  # a token this policy draws now and then, so that lengths differ
        under_way: list[int] = []  # completions vLLM is still sampling when each clip reaches the renderer
        submit = worker.pool.submit

        def noting(index, notes, piece=0):
            under_way.append(worker.engine.engine.get_num_unfinished_requests())
            submit(index, notes, piece)

        worker.pool.submit = noting
        prompts = make_prompts(config.prompts, vocab, "train", 0, 4)
        scored = worker.generate(prompts, config.sampling, (0,))
    assert len(under_way) == len(scored.rollout) == 16
    assert under_way[0] > 10
    assert under_way[-1] == 0
