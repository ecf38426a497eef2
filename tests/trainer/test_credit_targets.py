"""One pass over a round's clips gives what separate passes would: log-probs, alternatives, and their log-probs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsmart.config import Config
from fastsmart.credit.alternatives import NO_CHOICES, choices
from fastsmart.credit.settings import CreditSettings
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.hf_format import load_policy
from fastsmart.sampling import sample
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.batch import micro_batches
from fastsmart.trainer.credit_targets import CreditTargets
from fastsmart.trainer.settings import TrainSettings
from fastsmart.trainer.update import completion_logprobs

OPTIONS = (0.9, torch.float32, "auto")


@pytest.fixture(scope="module")
def policy():
    return load_policy("pop909-tiny")


@pytest.fixture(scope="module")
def rollout(policy):
    return sample(policy, TokenBatch.pack([[1], [1]]), group=3, max_tokens=50, seed=5)


def targets_of(policy, alternatives: int) -> CreditTargets:
    trainer = SimpleNamespace(
        config=Config(credit=CreditSettings(alternatives=alternatives), train=TrainSettings(algorithm="credit")),
        settings=TrainSettings(),
        policy=policy,
        ranks=Ranks(),
        device=torch.device("cpu"),
        forward_options=OPTIONS,
        share_in_micro_batches=lambda rollout: list(micro_batches(rollout, 4, torch.device("cpu"))),
    )
    return CreditTargets(trainer, SimpleNamespace(place=(3, 0)))


@pytest.mark.parametrize("alternatives", [0, 2])
def test_a_pass_gives_log_probs_of_all_that_was_played_and_of_the_choices_that_are_given(policy, rollout, alternatives):
    targets = targets_of(policy, alternatives)
    chosen = NO_CHOICES
    if alternatives:
        chosen = choices(rollout.ids, rollout.lengths, targets.ends, targets.kinds)
    logprobs, tokens, of_tokens = targets._passed(policy, rollout, chosen)
    expected = np.zeros(rollout.ids.shape)
    with torch.no_grad():
        for row in range(len(rollout)):
            (batch,) = micro_batches(rollout.select(np.array([row])), 1, torch.device("cpu"))
            expected[row, : rollout.lengths[row]] = completion_logprobs(policy, batch, *OPTIONS).logprob
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    assert (logprobs[np.arange(rollout.ids.shape[1]) >= rollout.lengths[:, None]] == 0).all()
    assert tokens.shape == of_tokens.shape == (len(chosen), 1 + alternatives)
    if alternatives:
        assert len(chosen) > 10
        assert (tokens[:, 0] == rollout.ids[chosen.at]).all()
        assert (targets.kinds[tokens] == targets.kinds[tokens[:, :1]]).all()
        np.testing.assert_allclose(of_tokens[:, 0], logprobs[chosen.at], atol=1e-5)
        again = targets._passed(policy, rollout, chosen, tokens)
        assert (again[1] == tokens).all()
        assert (again[2] == of_tokens).all()
