"""The mean of the weights: that of torch, kept in checkpoints, and without a trace in what a run does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_run import SYMBOLIC, comparable, config_for
from tiny_policy import make_policy
from torch.optim.swa_utils import AveragedModel

from fastsmart import UserError, train
from fastsmart.config import Config, merged
from fastsmart.policy.average import WeightAverage
from fastsmart.policy.blend import write_blends
from fastsmart.policy.checkpoints import averaged_policy
from fastsmart.policy.hf_format import load_policy

pytestmark = pytest.mark.usefixtures("light_runs")
DECAY = 0.8


def moved(policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_it_is_the_mean_that_torch_makes_and_that_the_formula_says(vocab):
    policy = make_policy(vocab)
    ours = WeightAverage(DECAY)
    theirs = AveragedModel(policy, avg_fn=lambda mean, w, n: mean + (1 - DECAY) / (1 - DECAY ** (n + 1)) * (w - mean))
    seen = []
    for step in range(7):
        moved(policy, step)
        ours.add(policy)
        theirs.update_parameters(policy)
        seen.append(policy.lm_head.weight.detach().double().clone())
    for name, weight in theirs.module.named_parameters():
        torch.testing.assert_close(ours.weights[name], weight.detach(), rtol=1e-5, atol=1e-6)
    shares = DECAY ** torch.arange(6, -1, -1, dtype=torch.float64)
    expected = sum(s * w for s, w in zip(shares / shares.sum(), seen, strict=True))
    torch.testing.assert_close(ours.weights["lm_head.weight"], expected.float(), rtol=1e-5, atol=1e-6)


def test_it_keeps_no_hold_of_the_weights_it_has_seen(policy):
    average = WeightAverage(0.0)
    average.add(policy)
    before = average.weights["lm_head.weight"].clone()
    kept = average.weights
    moved(policy, 1)
    assert torch.equal(kept["lm_head.weight"], before)
    average.add(policy)  # with decay 0 it is the last weights
    assert torch.equal(average.weights["lm_head.weight"], policy.lm_head.weight)


def test_a_run_with_it_does_the_same_and_resumes_it_exactly(checkpoint, tmp_path):
    steps = {"steps": 4, "eval_every": 0, "save_every": 2, "listen": 0}
    for name, decay in (("without", 0.0), ("with", DECAY)):
        train(config_for(checkpoint, SYMBOLIC, {"train": {**steps, "average": decay}}), tmp_path / name)
    assert comparable(tmp_path / "with") == comparable(tmp_path / "without")
    last = tmp_path / "with" / "checkpoints" / "step-000004"
    assert json.loads((last / "state.json").read_text())["averaged_steps"] == 4
    other = tmp_path / "without" / "checkpoints" / "step-000004"
    assert (last / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert not (other / "average.safetensors").exists()
    average = (last / "average.safetensors").read_bytes()
    shutil.rmtree(last)
    metrics = tmp_path / "with" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    train(config_for(checkpoint, SYMBOLIC, {"train": {**steps, "average": DECAY}}), tmp_path / "with", resume=True)
    assert (last / "average.safetensors").read_bytes() == average

    (written,) = write_blends(str(checkpoint), str(tmp_path / "with"), [1.0], tmp_path / "b", average=True)
    mean, blend = averaged_policy(last), load_policy(written)
    assert all(torch.equal(a, b) for a, b in zip(mean.parameters(), blend.parameters(), strict=True))
    with pytest.raises(UserError, match="has no average of weights"):
        averaged_policy(other)
    (last / "average.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is damaged"):
        averaged_policy(last)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_makes_no_sense_is_named(decay):
    with pytest.raises(UserError, match=r"train\.average"):
        merged(Config(), {"train": {"average": decay}})
