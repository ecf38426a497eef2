"""Recorded passes against launched ones: padding, shapes that are used again, and what is held between steps."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import make_policy

from fastsmart.grpo.fused import fused_policy_loss
from fastsmart.grpo.settings import LossSettings
from fastsmart.sampling import sample
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer import recorded
from fastsmart.trainer.batch import micro_batches
from fastsmart.trainer.recorded import RecordedPasses
from fastsmart.trainer.update import completion_logprobs

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = LossSettings(loss="grpo", entropy_bonus=0.01, kernel="triton")


class Replay:
    """What a CUDA graph does: the job again, its result where it was. `jobs`: how many have been recorded."""

    jobs = 0

    def __init__(self, job):
        Replay.jobs += 1
        self.job, self.result = job, job()

    def replay(self):
        for old, new in zip(tensors(self.result), tensors(self.job()), strict=True):
            old.copy_(new)


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


@pytest.fixture
def policy(vocab):
    return make_policy(vocab).to(DEVICE)


@pytest.fixture
def passes(policy):
    def record(job):
        replay = Replay(job)
        return replay, replay.result

    Replay.jobs = 0
    return RecordedPasses(policy, torch.float32, 0.9, "triton", None if DEVICE.type == "cuda" else record)


@pytest.fixture(scope="module")
def rollout(vocab):
    drawn = sample(make_policy(vocab), TokenBatch.pack([[21, 400, 180, 330], [1], [21, 401]]), group=2, max_tokens=20)
    lengths = (drawn.lengths - 2 * np.arange(len(drawn))).astype(drawn.lengths.dtype)
    return replace(drawn, lengths=lengths)


def launched(policy, batch, reference, advantage, denominator):
    """Gradients and statistics of a micro-batch by the passes that are not recorded."""
    policy = copy.deepcopy(policy)
    ours = completion_logprobs(policy, batch, 0.9, torch.float32, "triton")
    given = ours.logprob, batch.sampler_logprobs, reference, advantage, batch.offsets
    loss, stats = fused_policy_loss(*given, SETTINGS, denominator, ours.entropy)
    loss.backward()
    return [p.grad for p in policy.parameters()], stats


def test_two_micro_batches_add_up_to_what_launched_ones_do(policy, passes, rollout):
    """The second is shorter, and one completion less: it goes into the shape of the first."""
    batches = [next(micro_batches(rollout.select(range(n)), n, DEVICE)) for n in (5, 4)]
    recorded_shapes = []
    wanted = [torch.zeros_like(p) for p in policy.parameters()]
    for batch in batches:
        advantage = torch.randn(len(batch.lengths), device=DEVICE)
        reference = passes.logprobs(batch)
        torch.testing.assert_close(
            reference, completion_logprobs(policy, batch, 0.9, torch.float32, "torch").logprob.detach(),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        reference = reference + 0.1 * torch.randn(len(reference), device=DEVICE)
        stats = passes.add_gradients(batch, reference, advantage, SETTINGS, 7.0)
        gradients, want = launched(policy, batch, reference, advantage, 7.0)
        torch.testing.assert_close(stats.sums, want.sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.peaks, want.peaks, rtol=1e-5, atol=1e-5)
        torch._foreach_add_(wanted, gradients)
        recorded_shapes.append(len(passes.shapes))
    for parameter, gradient in zip(policy.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert recorded_shapes == [1, 1]


def test_new_weights_are_seen(policy, passes, rollout):
    """Changed where they lie, as by an optimizer; and put somewhere else, as when a checkpoint is adopted."""
    (batch,) = micro_batches(rollout, 6, DEVICE)
    before = passes.logprobs(batch)
    with torch.no_grad():
        policy.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    changed = passes.logprobs(batch)
    assert not torch.equal(before, changed)
    policy.adopt({name: 2 * tensor for name, tensor in policy.state_dict().items()})
    policy.to(DEVICE)  # the tables of angles, which are made anew
    assert not torch.equal(changed, passes.logprobs(batch))
    exact = completion_logprobs(policy, batch, 0.9, torch.float32, "torch").logprob
    torch.testing.assert_close(passes.logprobs(batch), exact.detach(), rtol=1e-5, atol=1e-5)


def test_only_so_many_shapes_are_recorded(policy, passes, rollout, monkeypatch):
    monkeypatch.setattr(recorded, "MOST_SHAPES", 2)
    for completions in (1, 3, 6):
        batch = next(micro_batches(rollout, completions, DEVICE))
        exact = completion_logprobs(policy, batch, 0.9, torch.float32, "torch").logprob.detach()
        for _ in range(2):
            torch.testing.assert_close(passes.logprobs(batch), exact, rtol=1e-5, atol=1e-5)
    assert len(passes.shapes) == 2
    if DEVICE.type == "cpu":
        assert Replay.jobs == 2
