"""Agreement with TRL 1.16's DPOTrainer: its own `_compute_loss`, loss type "sigmoid", on the same log-probs.

Only the model is replaced: it gives the tokens' log-probs. TRL has no penalty on the chosen completion (DPO-Positive),
so ours is compared without; its mean over pairs and metrics are ours.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("trl", reason="TRL is a development dependency: pip install -e .[dev]")
from accelerate import Accelerator
from trl import DPOTrainer

from fastsmart.dpo.losses import completion_sums, pair_loss

PAIRS, TOKENS = 6, 12  # pairs, longest completion
BETA = 0.1


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs and those of the reference, float64 [2 PAIRS, TOKENS], and which tokens there are; chosen first."""
    generator = torch.Generator().manual_seed(seed)
    ours, gap = torch.randn(2, 2 * PAIRS, TOKENS, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (2 * PAIRS,), generator=generator)
    logprob = -ours.abs() - 0.1
    return logprob, logprob + 2 * gap, torch.arange(TOKENS) < lengths[:, None]


def trl_loss(logprob: torch.Tensor, reference: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """TRL's loss and its metrics; the trainer is made without its __init__ and given what `_compute_loss` reads."""

    outputs = SimpleNamespace(
        log_probs=torch.where(there, logprob, 0.0),
        entropy=torch.zeros_like(logprob),
        mean_logits=torch.zeros_like(logprob),
        is_top1=torch.zeros_like(logprob, dtype=torch.bool),
    )
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.accelerator = Accelerator(cpu=True)
    trainer.model = torch.nn.Identity()  # in training mode
    trainer.precompute_ref_logps = True  # as we do
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.ld_alpha, trainer.f_divergence_type, trainer.beta = None, "reverse_kl", BETA
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = ["sigmoid"], [1.0], 0.0
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    mask = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.int64), there.long()], dim=1)  # one token of prompt
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = torch.where(there, reference, 0.0).sum(1).chunk(2)
    loss = trainer._compute_loss(lambda **_: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("seed", range(3))
def test_without_penalty_the_loss_is_that_of_trl_in_value_and_gradient(seed):
    logprob, reference, there = batch(seed)
    theirs = logprob.clone().requires_grad_()
    expected, metrics = trl_loss(theirs, reference, there)
    expected.backward()
    ours = logprob.clone().requires_grad_()
    sequence = torch.repeat_interleave(torch.arange(2 * PAIRS), there.sum(1))
    sums = completion_sums(ours[there], sequence, 2 * PAIRS)
    base = completion_sums(reference[there], sequence, 2 * PAIRS)
    found = pair_loss(sums[:PAIRS], sums[PAIRS:], base[:PAIRS], base[PAIRS:], BETA, 0.0)
    found.loss.mean().backward()
    torch.testing.assert_close(found.loss.mean(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    assert ours.grad.abs().max() > 1e-4
    assert BETA * found.chosen.mean().item() == pytest.approx(metrics["rewards/chosen"])
    assert BETA * found.rejected.mean().item() == pytest.approx(metrics["rewards/rejected"])
    assert (found.chosen > found.rejected).double().mean().item() == pytest.approx(metrics["rewards/accuracies"])
