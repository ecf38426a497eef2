"""A small evaluation to look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from listeners import made

from fastsmart import Config
from fastsmart.config import merged
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.study.evaluate import evaluate
from fastsmart.study.evaluation import Evaluation
from fastsmart.tokens.styles import Styles


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory) -> Evaluation:
    """The shipped policy and a sharper copy of it on eight slow prompts, heard through one soundfont."""
    folder: Path = tmp_path_factory.mktemp("evaluation")
    tuned = load_policy("pop909-tiny")
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.2)
    save_policy(tuned, folder / "tuned")
    small = {
        "prompts": {"time_signatures": ["4/4"], "tempo_min": 50.0, "tempo_max": 70.0},
        "sampling": {"max_tokens": 150},
        "reward": {"terms": {"consonance": 1.0, "variety": 1.0}},
        "audio": {"workers": 1},
    }
    sources = ["base=pop909-tiny", str(folder / "tuned")]
    return evaluate(sources, folder / "e", merged(Config(), small), 8, 2)


@pytest.fixture(scope="session")
def long_enough(evaluation):
    """Prompts on which both tiny policies play five seconds."""
    ends = [evaluation.outputs(label).notes(evaluation.vocab).end_s for label in ("base", "tuned")]
    assert (np.stack(ends) >= 5).all(axis=0).sum() >= 3
    return evaluation


@pytest.fixture(scope="session")
def rating_test(long_enough, tmp_path_factory):
    return made(long_enough, tmp_path_factory.mktemp("rating") / "t")


@pytest.fixture(scope="session")
def sets_test(long_enough, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    settings = {"design": "sets", "prompts": 4, "set_size": 2, "repeats": 1, "checks": 1}
    return made(long_enough, folder / "t", **settings)


@pytest.fixture(scope="session")
def styles_test(tmp_path_factory):
    """Two policies that were asked for two styles, none of which they have learnt."""
    folder = tmp_path_factory.mktemp("styles")
    policy = load_policy("pop909-tiny")
    policy.vocab = replace(policy.vocab, styles=Styles((("march", "INF1_None"), ("waltz", "INF2_None"))))
    save_policy(policy, folder / "base")
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.2)
    save_policy(policy, folder / "tuned")
    small = {
        "prompts": {"time_signatures": ["4/4"], "tempo_min": 50.0, "tempo_max": 70.0, "styles": ["march", "waltz"]},
        "sampling": {"max_tokens": 150},
        "reward": {"terms": {"variety": 1.0}},
        "audio": {"workers": 1},
    }
    sources = [str(folder / "base"), str(folder / "tuned")]
    found = evaluate(sources, folder / "e", merged(Config(), small), 12, 0)
    return made(found, folder / "t", design="styles", prompts=4, repeats=1, checks=1)
