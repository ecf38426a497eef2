"""Batches and settings that tests of the loss share. Shape letters: M tokens of the batch, N completions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastsmart.grpo.settings import LossSettings

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
BASE = LossSettings(max_tokens=9)
OPTIONS = {
    "plain": {},
    "no kl": {"beta": 0.0},
    "k1": {"kl": "k1"},
    "k2": {"kl": "k2"},
    "kl times ratio": {"kl_ratio": True},
    "masked tokens": {"mask_low": 0.8, "mask_high": 1.3},
    "masked sequences": {"mask_low": 0.95, "mask_high": 1.05, "mask_level": "sequence"},
    "ratio one": {"ratio": "one"},
    "truncated": {"truncate": 1.5},
    "entropy bonus": {"entropy_bonus": 0.01},
}
CASES = [
    pytest.param(replace(BASE, loss=loss, **options), id=f"{loss}-{name}")
    for loss, (name, options) in itertools.product(LOSSES, OPTIONS.items())
    if not (loss == "cispo" and name == "truncated")
]


def batch(lengths=(4, 1, 9, 6, 0, 3), spread=0.3, seed=0):
    """Tokens of completions of the given lengths, ratios about exp(±spread), in fp64."""
    generator = torch.Generator().manual_seed(seed)
    m = sum(lengths)
    policy, gap, drift = torch.randn(3, m, dtype=torch.float64, generator=generator)
    logprob = -policy.abs() - 0.1
    return SimpleNamespace(
        logprob=logprob,
        sampler_logprobs=logprob - spread * gap,
        reference=logprob + 0.5 * drift,
        advantage=torch.randn(len(lengths), dtype=torch.float64, generator=generator),
        sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        entropy=torch.rand(m, dtype=torch.float64, generator=generator),
        lengths=torch.tensor(lengths),
    )


def select(b, completions):
    """The micro-batch of some completions, renumbered in the order given."""
    rows = torch.cat([(b.sequence == c).nonzero().squeeze(1) for c in completions])
    renumber = {c: i for i, c in enumerate(completions)}
    return SimpleNamespace(
        **{name: getattr(b, name)[rows] for name in ("logprob", "sampler_logprobs", "reference", "entropy")},
        advantage=b.advantage[list(completions)],
        sequence=torch.tensor([renumber[c] for c in b.sequence[rows].tolist()], dtype=torch.int64),
        lengths=b.lengths[list(completions)],
        rows=rows,
    )
