"""The folder of a run on disk: what a person opens, and what resume needs.

config.toml      the resolved configuration            checkpoints/step-000040/   policy, optimizer and state
run.json         what it ran with: versions, machine   listen/                    before and after, MIDI and WAV
metrics.jsonl    one line a step                       before_after.md            features and rewards
curves.png
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastsmart.config import Config, read_config, to_toml
from fastsmart.errors import UserError
from fastsmart.files import atomic_folder, make_folder, os_errors_as_user_errors, write_atomic
from fastsmart.policy.checkpoint import load_policy, write_policy
from fastsmart.policy.optimizer import load_optimizer_tensors, optimizer_tensors
from fastsmart.policy.transformer import Policy

CONFIG_FILE = "config.toml"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"


class RunFolder:
    """A run's files. `step` is that of the newest checkpoint, 0 before the first."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self.listen = path / "listen"

    @staticmethod
    def create(path: str | Path, config: Config) -> RunFolder:
        """A new run; raises UserError when the folder cannot be written or already holds one."""
        path = Path(path)
        if (path / CONFIG_FILE).exists():
            raise UserError(f"{path} already holds a run; add --resume to go on with it, or choose another --out")
        make_folder(path)
        write_atomic(path / CONFIG_FILE, to_toml(config))
        return RunFolder(path, config)

    @staticmethod
    def reopen(path: str | Path) -> RunFolder:
        """A run to go on with; raises UserError when there is none, or the folder cannot be written."""
        path = Path(path)
        if not (path / CONFIG_FILE).exists():
            raise UserError(f"no run to resume in {path}; leave out --resume to start one")
        make_folder(path)
        return RunFolder(path, read_config(path / CONFIG_FILE))

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(p for p in (self.path / "checkpoints").glob("step-*") if (p / STATE_FILE).is_file())

    @property
    def step(self) -> int:
        found = self.checkpoints()
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint and drop the oldest beyond `train.keep`; raises UserError when the disk is full."""
        with atomic_folder(self.path / "checkpoints" / f"step-{step:06d}") as part:
            write_policy(policy, part)
            save_file(optimizer_tensors(optimizer, policy), part / OPTIMIZER_FILE)
            (part / STATE_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
        for old in self.checkpoints()[: -self.config.train.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
        """Put the newest checkpoint into policy and optimizer; returns its step, 0 where there is none."""
        found = self.checkpoints()
        if not found:
            return 0
        stored = load_policy(found[-1])
        if stored.size != policy.size:
            raise UserError(f"{found[-1]} holds a policy of another size than {self.config.policy.source}")
        with torch.no_grad():
            for ours, theirs in zip(policy.parameters(), stored.parameters(), strict=True):
                ours.copy_(theirs)
        load_optimizer_tensors(optimizer, policy, load_file(found[-1] / OPTIMIZER_FILE))
        return self.step

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a number that is not finite is written as null."""
        with os_errors_as_user_errors(self.path), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as sink:
            sink.write(json.dumps(_finite(line)) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """The metrics so far; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in text if line.startswith("{") and line.endswith("}")]

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be run again (all of them when there is no checkpoint)."""
        kept = [line for line in self.lines() if step and line["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
