"""Prompts in, completions out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastsmart.errors import UserError
from fastsmart.limits import LARGEST_SEED, require_kind
from fastsmart.sampling.rollout import Completion, Engine, RandomStream, Rollout
from fastsmart.sampling.settings import ENGINES, SamplingSettings
from fastsmart.tokens.token_batch import TokenBatch

if TYPE_CHECKING:
    import torch

    from fastsmart.policy.transformer import Policy
    from fastsmart.tokens.prompts import Prompts

__all__ = ["ENGINES", "Completion", "Engine", "RandomStream", "Rollout", "SamplingSettings", "make_engine", "sample"]


def make_engine(
    settings: SamplingSettings,
    policy: Policy,
    version: int = 0,
    dtype: torch.dtype | None = None,
    completions: int | None = None,
) -> Engine:
    """The sampling engine the settings name, holding the policy's weights, computing in `dtype` (None = their own).

    completions : the most that one call will ask for, where that is known; memory is not held for more

    Raises UserError for an engine this installation lacks.
    """
    dtype = dtype or policy.lm_head.weight.dtype
    if settings.engine == "native":
        from fastsmart.sampling.native import NativeEngine

        return NativeEngine(policy, version, dtype)
    if settings.vllm.server:
        from fastsmart.sampling.vllm_server import RemoteEngine

        return RemoteEngine(policy, version, dtype, settings)
    from fastsmart.sampling.vllm import VllmEngine

    if completions:
        settings = replace(settings, max_rows=min(settings.max_rows, completions))
    return VllmEngine(policy, version, dtype, settings)


def sample(
    policy: Policy,
    prompts: TokenBatch | Prompts,
    group: int = 1,
    max_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    engine: str = "native",
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
) -> Rollout:
    """Draw `group` completions of each prompt; the same arguments give the same rollout.

    Raises UserError for a number out of range, TypeError naming an argument that is of another kind.
    """
    from fastsmart.policy.transformer import Policy
    from fastsmart.tokens.prompts import Prompts

    require_kind(policy, Policy, "policy", "what load_policy gives")
    require_kind(prompts, (TokenBatch, Prompts), "prompts", "what the functions of fastsmart.prompts give")
    for name, number in (("group", group), ("max_tokens", max_tokens), ("seed", seed), ("top_k", top_k)):
        require_kind(number, int, name, "a whole number")
    for name, real in (("temperature", temperature), ("top_p", top_p), ("guidance", guidance)):
        require_kind(real, (int, float), name, "a number")
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed is {seed}; it must be from 0 to {LARGEST_SEED:,}")
    prompts = prompts if isinstance(prompts, TokenBatch) else prompts.tokens
    settings = SamplingSettings(engine, group, max_tokens, float(temperature), top_k, float(top_p), float(guidance))
    sampler = make_engine(settings, policy, completions=len(prompts) * group)
    try:
        return Rollout.gather(sampler.stream(prompts, settings, (seed,)), prompts, group)
    finally:
        sampler.close()
