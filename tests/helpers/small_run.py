"""Runs small enough for tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastsmart.config import Config, merged

SMALL = {
    "prompts": {"time_signatures": ["4/4"]},
    "sampling": {"group": 4, "max_tokens": 60},
    "reward": {"terms": {"consonance": 1.0, "variety": 0.5}, "normalize": "group"},
    "train": {
        "steps": 6,
        "prompts": 2,
        "eval_every": 2,
        "eval_prompts": 4,
        "save_every": 2,
        "keep": 2,
        "listen": 1,
        "learning_rate": 1e-3,
        "threads": 1,  # the tensors are small: a second thread would only wait
    },
    "audio": {"workers": 2},
}
SYMBOLIC = {"reward": {"terms": {"variety": 1.0, "filled_beats": 1.0}}}


def config_for(checkpoint: Path, *changes: dict) -> Config:
    config = merged(Config(), SMALL)
    for change in ({"policy": {"source": str(checkpoint)}}, *changes):
        config = merged(config, change)
    return config


def comparable(run: Path) -> list[dict]:
    """The metrics without the times, which are the one thing a rerun may change."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time")
        line.pop("health")
    return lines


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "fastsmart", "train", "--out", str(out), *options]


def write_config(folder: Path, checkpoint: Path, *changes: dict) -> Path:
    import tomli_w  # a development dependency, which a GPU machine may lack

    tree: dict = {**SMALL, "policy": {"source": str(checkpoint)}}
    for change in changes:
        for section, keys in change.items():
            tree[section] = {**tree.get(section, {}), **keys}
    path = folder / "small.toml"
    path.write_text(tomli_w.dumps(tree))
    return path
