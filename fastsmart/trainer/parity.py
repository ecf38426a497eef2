"""Do sampler and trainer hold the same policy? Asked once before training, and of every step (`Update.mismatch`).

The measure is NeMo-RL's token_mult_prob_error: the mean over tokens of exp |log p_trainer - log p_sampler|, 1 where the
two agree.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.policy.transformer import Policy
from fastsmart.sampling import Engine, RandomStream, Rollout
from fastsmart.tokens.prompts import make_prompts
from fastsmart.trainer.batch import micro_batches
from fastsmart.trainer.update import Update, completion_logprobs

PROMPTS, GROUP, TOKENS = 4, 2, 64  # of the check at most
# Measured on a CPU with vLLM 0.32: 1.0000005 in float32, 1.006 to 1.008 in bfloat16 with a float32 head
LIMITS = {torch.float32: 1.001, torch.bfloat16: 1.05}


def mismatch_limit(config: Config, dtype: torch.dtype) -> float:
    """The error above which sampler and trainer count as different: what the run says, else by dtype."""
    return config.train.mismatch_limit or LIMITS[dtype]


def check_engine(engine: Engine, policy: Policy, config: Config, version: int, dtype: torch.dtype) -> float:
    """The error on a small batch of the run's own prompts.

    Raises UserError when it is beyond the limit, naming the first tensor that differs, or when the engine draws with
    another version than `version`.
    """
    prompts = make_prompts(config.prompts, policy.vocab, "train", 0, min(PROMPTS, config.train.prompts))
    settings = replace(config.sampling, group=GROUP, max_tokens=min(TOKENS, config.sampling.max_tokens))
    rollout = Rollout.gather(
        engine.stream(prompts, settings, (config.train.seed, RandomStream.PARITY)), prompts, settings.group
    )
    if rollout.version != version:
        raise UserError(
            f"the sampler draws with version {rollout.version} of the policy, training is at {version}; start it again"
        )
    error = token_mult_prob_error(policy, rollout, config, dtype)
    limit = mismatch_limit(config, dtype)
    if not error <= limit:
        raise UserError(
            f"{disagreement(error, limit)}: {_culprit(engine, policy)}; training would learn from wrong ratios, "
            "so it does not begin"
        )
    return error


@torch.no_grad()
def token_mult_prob_error(policy: Policy, rollout: Rollout, config: Config, dtype: torch.dtype) -> float:
    """mean exp |log p_trainer - log p_sampler| over the tokens of a rollout."""
    gaps = [
        completion_logprobs(policy, batch, config.sampling.temperature, dtype).logprob - batch.sampler_logprobs
        for batch in micro_batches(rollout, config.train.micro_batch, policy.device)
    ]
    return float(torch.cat(gaps).abs().exp().mean())


def health_warning(engine: Engine, policy: Policy, change: Update, limit: float) -> str:
    """Warning about a step of which `Update.mismatch` is true, for the user.

    The engine is to hold the policy as it is now, so that a tensor that did not arrive can be named.
    """
    return f"{disagreement(change.stats['token_mult_prob_error'], limit)}: {_culprit(engine, policy)}"


def disagreement(error: float, limit: float) -> str:
    return f"sampler and trainer disagree about the policy (token_mult_prob_error {error:.6g}, limit {limit:g})"


def _culprit(engine: Engine, policy: Policy) -> str:
    name = engine.first_difference(policy)
    if name:
        return f"{name} is the first tensor that differs"
    return "their tensors are the same, so one of them computes differently; try --engine native"
