"""Policies between a base and what was tuned from it: weights base + alpha (tuned - base).

Fine-tuned and original weights are joined by a straight line of usable policies (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models", CVPR; for reinforcement learning Rame et al. 2024, arXiv 2406.16768). Each alpha is a
policy with some of the gain and some of the loss, which costs an evaluation and no training.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_folder, make_folder, os_errors_as_user_errors
from fastsmart.policy.checkpoints import averaged_policy
from fastsmart.policy.hf_format import load_policy, policy_source, write_policy
from fastsmart.policy.transformer import Policy

BLEND_FILE = "blend.json"


def blended(base: Policy, tuned: Policy, alpha: float) -> Policy:
    """The policy of weights base + alpha (tuned - base), computed in float64; with 0 and 1 base and tuned bit for bit.

    Both are of one size and vocabulary; alpha is from 0 to 1.
    """
    policy = copy.deepcopy(tuned if alpha == 1 else base)
    if alpha in (0, 1):
        return policy
    others = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight.copy_(torch.lerp(weight.double(), others[name].double(), alpha))
    return policy


def write_blends(
    base: str, tuned: str, alphas: Sequence[float], out: str | Path, vocabulary: str = "", average: bool = False
) -> list[Path]:
    """Write a checkpoint `alpha-A` below `out` for each alpha; they say in blend.json what they are of.

    base, tuned : shipped name, checkpoint or run folder, or hub id
    vocabulary  : of a base without one of its own
    average     : take the mean weights that `train.average` has kept for the tuned ones

    Raises UserError where one cannot be loaded, the two are of different size or vocabulary, or the disk is full.
    """
    sources = policy_source(base), policy_source(tuned)
    first = load_policy(sources[0], vocabulary=vocabulary)
    second = averaged_policy(Path(sources[1])) if average else load_policy(sources[1], vocabulary=vocabulary)
    if first.size != second.size or first.vocab.tokens != second.vocab.tokens:
        what = "size" if first.size != second.size else "vocabulary"
        raise UserError(
            f"{tuned} is of another {what} than {base}, so there is nothing between them; name its own base"
        )
    written = []
    for alpha in alphas:
        folder = make_folder(out) / f"alpha-{alpha:g}"
        with atomic_folder(folder) as part, os_errors_as_user_errors(folder):
            write_policy(blended(first, second, alpha), part)
            record = {"alpha": alpha, "base": sources[0], "tuned": sources[1], "average": average}
            (part / BLEND_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        written.append(folder)
    return written


def blend_alpha(folder: str | Path) -> float | None:
    """The alpha of a checkpoint of `write_blends`; None for any other policy."""
    try:
        return float(json.loads((Path(folder) / BLEND_FILE).read_text(encoding="utf-8"))["alpha"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
