"""Small things many tests need: a vocabulary, a tiny policy, a folder of MIDI files, a soundfont."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsmart.audio import find_soundfont
from fastsmart.policy.checkpoint import save_policy
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)  # as on the smallest machine we support; more only wait for each other


@pytest.fixture(scope="session")
def vocab() -> Vocabulary:
    return load_vocabulary("smart")


def make_policy(vocab: Vocabulary, seed: int = 0, spread: float = 8.0, **size: int) -> Policy:
    """A small policy with weights far enough from zero that its distributions are far from uniform."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4} | size
    policy = Policy(PolicySize(len(vocab), **shape), vocab).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    return policy.eval()


@pytest.fixture
def policy(vocab: Vocabulary) -> Policy:
    return make_policy(vocab)


@pytest.fixture
def checkpoint(policy: Policy, tmp_path: Path) -> Path:
    """A saved tiny policy."""
    save_policy(policy, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def soundfont() -> Path:
    return find_soundfont()
