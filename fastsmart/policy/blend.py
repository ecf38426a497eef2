"""Policies between a base and what was tuned from it: weights base + alpha (tuned - base).

Fine-tuned and original weights are joined by a straight line of usable policies (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models", CVPR; for reinforcement learning Rame et al. 2024, arXiv 2406.16768). Each alpha is a
policy with some of the gain and some of the loss, which costs an evaluation and no training.

Changes of several policies that were tuned from one base can be added (Ilharco et al. 2023, "Editing models with task
arithmetic", ICLR): base + alpha (tuned - base) + sum of weight (other - base). What runs of different seeds have in
common adds up, and what each has by chance much less so.

A blend can be made to play as if it were sampled at another temperature, by the weights of its last norm: then every
sampler plays it so, and it is compared as it is meant to sound.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_folder, make_folder, os_errors_as_user_errors
from fastsmart.policy.checkpoints import averaged_policy
from fastsmart.policy.hf_format import load_policy, policy_source, write_policy
from fastsmart.policy.transformer import Policy

BLEND_FILE = "blend.json"


def blended(base: Policy, tuned: Policy, alpha: float, added: Sequence[tuple[Policy, float]] = ()) -> Policy:
    """The policy of weights base + alpha (tuned - base), computed in float64; with 0 and 1 base and tuned bit for bit.

    All are of one size and vocabulary; alpha is from 0 to 1, or beyond 1 to go further than the tuned policy did.

    added : others with the weights that their differences from the base are added with
    """
    policy = copy.deepcopy(tuned if alpha == 1 else base)
    if alpha in (0, 1) and not added:
        return policy
    first, second = dict(base.named_parameters()), dict(tuned.named_parameters())
    others = [(dict(other.named_parameters()), share) for other, share in added]
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            start = first[name].double()
            total = torch.lerp(start, second[name].double(), alpha)
            for other, share in others:
                total += share * (other[name].double() - start)
            weight.copy_(total)
    return policy


def cooled(policy: Policy, temperature: float) -> Policy:
    """The same policy, changed to play, sampled at 1, as it would at this temperature; above 0."""
    if temperature != 1:
        with torch.no_grad():
            policy.model.norm.weight.div_(temperature)  # not the head's: it may also be the embedding
    return policy


def write_blends(
    base: str,
    tuned: str,
    alphas: Sequence[float],
    out: str | Path,
    vocabulary: str = "",
    average: bool = False,
    added: Sequence[tuple[str, float]] = (),
    temperature: float = 1.0,
) -> list[Path]:
    """Write a checkpoint `alpha-A` below `out` for each alpha; they say in blend.json what they are of.

    base, tuned : shipped name, checkpoint or run folder, or hub id
    vocabulary  : of a base without one of its own
    average     : take the mean weights that `train.average` has kept for the tuned ones
    added       : others like `tuned`, with weights (see `blended`)
    temperature : above 0; sampled at 1, a blend plays as it otherwise would at this temperature

    Raises UserError where one cannot be loaded, the two are of different size or vocabulary, or the disk is full.
    """
    names = [tuned, *(name for name, _ in added)]
    sources = [policy_source(name) for name in names]
    first = load_policy(start := policy_source(base), vocabulary=vocabulary)
    policies = [averaged_policy(Path(s)) if average else load_policy(s, vocabulary=vocabulary) for s in sources]
    for name, policy in zip(names, policies, strict=True):
        if first.size != policy.size or first.vocab.tokens != policy.vocab.tokens:
            what = "size" if first.size != policy.size else "vocabulary"
            raise UserError(
                f"{name} is of another {what} than {base}, so there is nothing between them; name its own base"
            )
    shares = [share for _, share in added]
    written = []
    for alpha in alphas:
        folder = make_folder(out) / f"alpha-{alpha:g}"
        with atomic_folder(folder) as part, os_errors_as_user_errors(folder):
            policy = blended(first, policies[0], alpha, list(zip(policies[1:], shares, strict=True)))
            write_policy(cooled(policy, temperature), part)
            record: dict[str, Any] = {"alpha": alpha, "base": start, "tuned": sources[0], "average": average}
            if added:
                record["added"] = [list(pair) for pair in zip(sources[1:], shares, strict=True)]
            if temperature != 1:
                record["temperature"] = temperature
            (part / BLEND_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        written.append(folder)
    return written


def blend_alpha(folder: str | Path) -> float | None:
    """The alpha of a checkpoint of `write_blends`; None for any other policy."""
    try:
        return float(json.loads((Path(folder) / BLEND_FILE).read_text(encoding="utf-8"))["alpha"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
