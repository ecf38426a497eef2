"""The optimizer batch: however it is cut, one gradient; and it is the gradient of the loss as written down."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import make_policy
from torch.utils._python_dispatch import TorchDispatchMode

from fastsmart.grpo.settings import LossSettings
from fastsmart.policy.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    scheduled_rate,
    step_if_finite,
)
from fastsmart.sampling import sample
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.batch import micro_batches
from fastsmart.trainer.update import reference_logprobs, update

PROMPTS = TokenBatch.pack([[21, 400, 180, 330], [1], [21, 401]])


@pytest.fixture(scope="module")
def batch(vocab):
    policy = make_policy(vocab)
    rollout = sample(policy, PROMPTS, group=4, max_tokens=30, temperature=0.9)
    advantage = torch.randn(len(rollout), generator=torch.Generator().manual_seed(0))
    return policy, rollout, advantage


def step(batch, settings, micro_batch, reference=None):
    policy, rollout, advantage = batch
    policy = copy.deepcopy(policy)
    optimizer = make_optimizer(policy, 1e-2, (0.9, 0.999), 0.0)
    batches = list(micro_batches(rollout, micro_batch, policy.device))
    ref_logprobs = reference_logprobs(reference or policy, batches, 0.9, torch.float32)
    change = update(
        policy,
        optimizer,
        batches,
        ref_logprobs,
        advantage,
        settings,
        temperature=0.9,
        learning_rate=1e-2,
        max_grad_norm=1e9,
    )
    return policy, optimizer, change


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "gspo", "cispo"])
def test_micro_batches_do_not_change_the_step(batch, loss):
    reference = make_policy(batch[0].vocab, seed=5)
    settings = LossSettings(loss=loss)
    (_, whole_optimizer, whole), (_, cut_optimizer, cut) = (step(batch, settings, m, reference) for m in (100, 3))
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert cut.stats["loss"] == pytest.approx(whole.stats["loss"], rel=1e-5, abs=1e-7)
    for a, b in zip(whole_optimizer.state.values(), cut_optimizer.state.values(), strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("micro_batch", [100, 3])
def test_the_kl_of_a_piece_is_the_sum_over_its_tokens(batch, micro_batch):
    """Against both policies run on one piece at a time; the pieces differ in length, so a mean of means is not it."""
    policy, rollout, advantage = batch
    lengths = (rollout.lengths - 2 * np.arange(len(rollout))).astype(rollout.lengths.dtype)
    rollout = replace(rollout, lengths=lengths)
    reference = make_policy(policy.vocab, seed=5)
    change = step((policy, rollout, advantage), LossSettings(kl="k1"), micro_batch, reference)[2]
    pieces = []
    for i in range(len(rollout)):
        ids = torch.from_numpy(rollout.sequence(i)).long()
        first = int(rollout.prompt_lengths[i])
        ours, theirs = (((p(ids[None])[0] / 0.9).log_softmax(-1)) for p in (policy, reference))
        gap = (ours - theirs)[:-1].gather(1, ids[1:, None])[first - 1 :, 0]
        pieces.append(float(gap.double().sum().detach()))
    assert change.stats["kl_per_completion"] == pytest.approx(sum(pieces) / len(pieces), rel=1e-4)


@pytest.mark.parametrize("loss", ["bnpo", "gspo", "cispo"])
def test_kernels_do_not_change_the_step(batch, loss):
    """Triton's log-probs and objective, in its interpreter or on a GPU, against the readable ones on the CPU."""
    pytest.importorskip("triton")
    policy, rollout, advantage = batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = make_policy(policy.vocab, seed=5)
    settings = LossSettings(loss=loss, entropy_bonus=0.01, mask_high=2.0)
    whole, whole_optimizer, want = step(batch, replace(settings, kernel="torch"), 5, reference)
    moved = (copy.deepcopy(policy).to(device), rollout, advantage)
    fused, fused_optimizer, got = step(moved, replace(settings, kernel="triton"), 5, reference.to(device))
    assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    assert got.stats == pytest.approx(want.stats, rel=1e-4, abs=1e-6)
    a, b = optimizer_tensors(whole_optimizer, whole), optimizer_tensors(fused_optimizer, fused)
    for name in a:
        torch.testing.assert_close(a[name], b[name].cpu(), rtol=1e-3, atol=1e-6)


class Waiting(TorchDispatchMode):
    """Counts the operators for which a program waits until the device has got there: they give it a number, or a shape
    that depends on numbers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        indices = args[1] if name in {"index", "index_put", "index_put_"} else []
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        if masks or name in {
            "_local_scalar_dense",
            "item",
            "is_nonzero",
            "nonzero",
            "masked_select",
            "equal",
            "unique",
        }:
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("advantage", [1.0, float("nan")], ids=["a step", "a skipped step"])
def test_a_step_waits_for_nothing_before_its_end(batch, kernel, advantage):
    if kernel == "triton":
        pytest.importorskip("triton")
    policy, rollout, _ = batch
    settings = LossSettings(kernel=kernel, entropy_bonus=0.01, mask_high=2.0)
    device = torch.device("cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu")
    given = copy.deepcopy(policy).to(device), rollout.select(range(3)), torch.full((3,), advantage)
    with Waiting() as waiting:
        _, _, change = step(given, settings, 2)
    assert change.skipped == (advantage != advantage)
    assert waiting.seen == []


def test_a_step_that_is_skipped_changes_nothing(batch):
    _, optimizer, _ = step(batch, LossSettings(beta=0.0), 100)
    policy = naive_names(batch, optimizer)
    weights = [p.detach().clone() for p in policy.parameters()]
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, policy).items()}
    for p in policy.parameters():
        p.grad = torch.full_like(p, float("inf"))
    step_if_finite(optimizer, torch.tensor(float("inf")))
    assert all(torch.equal(p, w) for p, w in zip(policy.parameters(), weights, strict=True))
    now = optimizer_tensors(optimizer, policy)
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    versions = [p._version for p in policy.parameters()]
    step_if_finite(optimizer, torch.tensor(1.0))
    assert all(p._version > v for p, v in zip(policy.parameters(), versions, strict=True))  # copies are now old
    assert not any(torch.equal(p, w) for p, w in zip(policy.parameters(), weights, strict=True))


def test_the_step_follows_the_gradient_of_the_loss_as_written_down(batch):
    policy, rollout, advantage = batch
    _, optimizer, change = step(batch, LossSettings(loss="bnpo", beta=0.0), 5)
    naive = copy.deepcopy(policy)
    total = torch.zeros(())
    for i in range(len(rollout)):
        ids = torch.from_numpy(rollout.sequence(i)).long()
        logprob = (naive(ids[None])[0] / 0.9).log_softmax(-1)
        first = int(rollout.prompt_lengths[i])
        chosen = logprob[first - 1 : -1].gather(-1, ids[first:, None])[:, 0]
        total = total - (advantage[i] * chosen).sum()  # on-policy, the clipped ratio has the gradient of REINFORCE
    (total / float(rollout.lengths.sum())).backward()
    norm = torch.stack([p.grad.norm() for p in naive.parameters()]).norm()
    assert change.grad_norm == pytest.approx(float(norm), rel=1e-4)
    moments = optimizer_tensors(optimizer, naive_names(batch, optimizer))
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(moments[f"{name}.exp_avg"], 0.1 * parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_step_leaves_the_embedding_of_pad_as_it_is(batch):
    policy, rollout, advantage = batch
    pad, ids = policy.vocab.pad_id, rollout.ids.copy()
    ids[:, 5] = pad
    after, _, change = step((policy, replace(rollout, ids=ids), advantage), LossSettings(), 100)
    moved = (after.model.embed_tokens.weight != policy.model.embed_tokens.weight).any(dim=1)
    assert change.grad_norm > 0
    assert moved.any()
    assert not moved[pad]
    assert (after.lm_head.weight[pad] != policy.lm_head.weight[pad]).any()


def naive_names(batch, optimizer):
    """A policy whose parameters are the optimizer's, to ask for its state by name."""
    policy = copy.deepcopy(batch[0])
    held = iter([p for group in optimizer.param_groups for p in group["params"]])
    decayed = [n for n, p in policy.named_parameters() if p.dim() == 2 and "proj" in n]
    plain = [n for n, _ in policy.named_parameters() if n not in decayed]
    for name in decayed + plain:
        owner, _, leaf = name.rpartition(".")
        setattr(policy.get_submodule(owner), leaf, next(held))
    return policy


def test_every_completion_token_is_in_exactly_one_micro_batch(batch):
    _, rollout, _ = batch
    seen = list(micro_batches(rollout, 5, torch.device("cpu")))
    assert sorted(i for m in seen for i in m.completions.tolist()) == list(range(len(rollout)))
    for m in seen:
        for row, i in enumerate(m.completions):
            mine = m.sequence == row
            length = int(rollout.lengths[i])
            assert m.ids[mine].tolist() == rollout.ids[i, :length].tolist()
            torch.testing.assert_close(m.sampler_logprobs[mine], torch.from_numpy(rollout.logprobs[i, :length]))
            where = m.gather_index[mine] - row * m.rows.shape[1]
            assert where.tolist() == list(range(rollout.prompt_lengths[i] - 1, rollout.prompt_lengths[i] - 1 + length))


def test_optimizer_state_comes_back_under_its_names(batch):
    policy, optimizer, _ = step(batch, LossSettings(beta=0.0), 100)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, policy).items()}
    other = copy.deepcopy(policy)
    other_optimizer = make_optimizer(other, 1e-2, (0.9, 0.999), 0.0)
    load_optimizer_tensors(other_optimizer, other, tensors)
    for p, q in zip(policy.parameters(), other.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    other_optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), other.parameters(), strict=True))


def test_schedules():
    assert [scheduled_rate(s, 4, 1.0, "linear") for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [scheduled_rate(s, 4, 1.0, "constant") for s in range(4)] == [1.0] * 4
    assert scheduled_rate(0, 100, 1.0, "cosine", warmup=9) == pytest.approx(0.1)
    assert scheduled_rate(100, 100, 1.0, "cosine", warmup=9, floor=0.1) == pytest.approx(0.1)
