"""Agreement with TRL 1.16's GRPOTrainer: its own `_compute_loss` on the same tensors.

Only its forward pass is replaced. Where TRL means something else by a name, and what is done about it here:
* normaliser: TRL divides grpo, bnpo and dr_grpo by what the micro-batch holds and then by the number of micro-batches,
  so its bnpo changes with the split; dapo and cispo by the tokens of the whole batch, as we always do. Compared on one
  micro-batch, where they agree; dapo and cispo also on a batch in two unequal parts.
* gspo is TRL's loss_type "grpo" with importance_sampling_level "sequence".
* cispo: TRL's epsilon_high is the cap itself and there is no lower bound: 1 + clip_high, and clip_low = 1.
  Its clip statistic counts positive advantages only, ours every token the cap acts on: not compared.
* KL: TRL has k3 only, and multiplies it by the ratio unless use_bias_correction_kl is off; k1 and k2 have no
  counterpart. For gspo it multiplies by the sequence's ratio; so do we. Its logged KL has that factor, ours never has.
* entropy bonus: TRL's is always a mean over tokens, ours has the loss's weights and denominator: compared for bnpo.
* `delta` is our truncate. TRL's vLLM correction multiplies by a second, constant ratio (trainer before the step to
  vLLM); ours has one ratio. Masking by it agrees where TRL's first ratio is 1; truncating it has no counterpart here.
* Statistics of gspo: TRL averages over completions, ours over tokens: compared for the token-level losses.

Shape letters: B completions, T longest completion, M their tokens.
"""

import itertools
import os
from collections import defaultdict
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("trl", reason="TRL is a development dependency: pip install -e .[dev]")
from accelerate import Accelerator
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import nanstd

from fastsmart.grpo.advantages import group_advantages
from fastsmart.grpo.losses import LossSettings, loss_denominator, policy_loss

B, T = 8, 12


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return GRPOConfig(output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to=[])


def batch(spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy, gap, drift = torch.randn(3, B, T, dtype=torch.float64, generator=generator)
    logprob = -policy.abs() - 0.1
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    return SimpleNamespace(
        logprob=logprob,
        sampler_logprobs=logprob - spread * gap,
        reference=logprob + 0.5 * drift,
        entropy=torch.rand(B, T, dtype=torch.float64, generator=generator),
        advantage=torch.randn(B, dtype=torch.float64, generator=generator),
        mask=(torch.arange(T) < lengths[:, None]),
        lengths=lengths,
    )


def trl_loss(arguments, b, s, rows=slice(None), steps=1, sampler_logprobs="sampler_logprobs", importance=None):
    """TRL's loss of the completions `rows`, its gradient with respect to every log-prob, and its metrics.

    The trainer is made without its __init__ (which wants a model, a tokenizer and a data set) and given what
    `_compute_loss` reads, translated from our settings; its forward pass returns the batch's log-probs.
    """
    logprob = b.logprob.clone().requires_grad_()
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.args = arguments
    trainer.args.use_bias_correction_kl = s.kl_ratio
    trainer.args.delta = s.truncate or None
    trainer.args.steps_per_generation = steps
    trainer.accelerator = Accelerator(cpu=True)
    trainer.model = torch.nn.Identity()  # in training mode
    trainer.current_gradient_accumulation_steps = steps
    trainer.loss_type = {"gspo": "grpo"}.get(s.loss, s.loss)
    trainer.importance_sampling_level = "sequence" if s.loss == "gspo" else "token"
    trainer.epsilon_low = s.clip_low
    trainer.epsilon_high = 1 + s.clip_high if s.loss == "cispo" else s.clip_high
    trainer.beta = s.beta
    trainer.max_completion_length = s.max_tokens
    trainer.top_entropy_quantile = 1.0
    trainer.off_policy_mask_threshold = None
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = importance is not None
    trainer._entropy_bonus_enabled = s.entropy_bonus > 0
    trainer.use_adaptive_entropy = False
    trainer.entropy_coef = s.entropy_bonus
    trainer.aux_loss_enabled = False
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprob[rows], b.entropy[rows], None)
    nothing = torch.zeros(len(b.mask[rows]), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(b.mask[rows], dtype=torch.int64),
        "completion_mask": b.mask[rows].long(),
        "advantages": b.advantage[rows],
        "ref_per_token_logps": b.reference[rows],
        "num_items_in_batch": b.lengths.sum(),
        "importance_sampling_ratio": importance,
    }
    if sampler_logprobs is not None:
        inputs["old_per_token_logps"] = getattr(b, sampler_logprobs)[rows]
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), logprob.grad, metrics


def our_loss(b, s, rows=slice(None)):
    """Ours on the packed tokens of the same completions; the gradient unpacked again."""
    logprob = b.logprob.clone().requires_grad_()
    mask = b.mask[rows]
    sequence = mask.nonzero()[:, 0]
    packed = [x[rows][mask] for x in (logprob, b.sampler_logprobs, b.reference)]
    denominator = loss_denominator(b.lengths, s)
    loss, stats = policy_loss(*packed, b.advantage[rows], sequence, s, denominator, b.entropy[rows][mask])
    loss.backward()
    return loss.detach(), logprob.grad, stats.means()


def agree(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-12)
    assert ours[1].abs().max() > 0


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
KLS = {"none": {"beta": 0.0}, "k3": {"beta": 0.04}, "k3 times ratio": {"beta": 0.04, "kl_ratio": True}}
CLIPS = {"symmetric": {}, "higher": {"clip_high": 0.28}, "truncated": {"truncate": 1.3}}


def settings_for(loss, **options):
    if loss == "cispo":
        options |= {"clip_low": 1.0, "truncate": 0.0}
    return LossSettings(loss=loss, max_tokens=T, **options)


@pytest.mark.parametrize(("loss", "kl", "clip"), list(itertools.product(LOSSES, KLS, CLIPS)))
@pytest.mark.parametrize("spread", [0.3, 0.0], ids=["off policy", "on policy"])
def test_loss_and_gradient(arguments, loss, kl, clip, spread):
    b, s = batch(spread), settings_for(loss, **KLS[kl], **CLIPS[clip])
    ours, theirs = our_loss(b, s), trl_loss(arguments, b, s)
    agree(ours, theirs)
    if loss in ("grpo", "bnpo", "dr_grpo", "dapo"):
        assert ours[2]["entropy"] == pytest.approx(theirs[2]["entropy"])
        if kl == "k3":
            assert ours[2]["kl"] == pytest.approx(theirs[2]["kl"])
        if spread:
            assert ours[2]["clipped_low"] > 0
            assert ours[2]["clipped_high"] > 0
        assert ours[2]["clipped_low"] == pytest.approx(theirs[2]["clip_ratio/low_mean"])
        assert ours[2]["clipped_high"] == pytest.approx(theirs[2]["clip_ratio/high_mean"])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_paper_run_has_ratio_one(arguments, loss):
    """Without old log-probs TRL divides the policy by itself, whatever the samples came from; so does ratio = "one"."""
    b, s = batch(), settings_for(loss, ratio="one")
    agree(our_loss(b, s), trl_loss(arguments, b, s, sampler_logprobs=None))


@pytest.mark.parametrize("loss", ["dapo", "cispo"])
def test_two_micro_batches(arguments, loss):
    b, s = batch(), settings_for(loss)
    for rows in (slice(0, 3), slice(3, B)):
        # TRL's token count spans a generation of `steps_per_generation` micro-batches: one optimizer step here
        agree(our_loss(b, s, rows), trl_loss(arguments, b, s, rows, steps=2))


def test_entropy_bonus(arguments):
    b, s = batch(), settings_for("bnpo", entropy_bonus=0.01)
    agree(our_loss(b, s), trl_loss(arguments, b, s))


def test_masking_by_the_sampler_mismatch(arguments):
    """TRL, first step after sampling: ratio 1 times the constant trainer/vLLM ratio, 0 where that is out of bounds.

    The value and the gradient are those of our one ratio, with the clip out of the way.
    """
    b = batch(spread=0.5)
    s = settings_for("bnpo", mask_low=0.7, mask_high=1.5, clip_low=1.0, clip_high=1e6)
    ratio = (b.logprob - b.sampler_logprobs).exp()
    importance = ratio.masked_fill((ratio < 0.7) | (ratio > 1.5), 0.0)
    assert 0 < our_loss(b, s)[2]["masked"] < 1
    agree(our_loss(b, s), trl_loss(arguments, b, s, sampler_logprobs=None, importance=importance))


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("failed", [(), (3,), (0, 1, 9)])
def test_advantages(scale, failed):
    """TRL's formula (grpo_trainer.py, "sum_then_normalize"), with its own nanstd; rewards of 6 groups of 8.

    TRL divides a group with a single scorable completion by a NaN std and then writes 0; ours is 0 from the start.
    """
    reward = torch.randn(48, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    reward[list(failed)] = torch.nan
    reward[16:23] = torch.nan  # a group with one scorable completion
    reward[24:32] = 0.5  # a group in which all are alike
    grouped = reward.view(-1, 8)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(8)
    std = {
        "none": torch.ones(48, dtype=torch.float64),
        "group": nanstd(grouped, dim=1).repeat_interleave(8) + 1e-4,
        "batch": nanstd(reward).expand(48) + 1e-4,
    }[scale]
    want = torch.nan_to_num((reward - mean) / std, nan=0.0)
    got = group_advantages(reward, torch.arange(48) // 8, scale)
    torch.testing.assert_close(got, want.float())
