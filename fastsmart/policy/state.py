"""Checkpoints a run goes on from: policy, optimizer and a record, each in a folder that is never rewritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastsmart.errors import UserError
from fastsmart.files import atomic_folder, os_errors_as_user_errors
from fastsmart.policy.checkpoint import load_policy, save_tensors, write_policy
from fastsmart.policy.optimizer import load_optimizer_tensors, optimizer_tensors
from fastsmart.policy.transformer import Policy

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"


class Checkpoints:
    """The folders `step-000040` below `folder`; each is also a checkpoint that `load_policy` reads."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if (p / STATE_FILE).is_file())

    @property
    def step(self) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        found = self.all()
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def save(
        self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, record: dict[str, Any] | None = None
    ) -> None:
        """Write a checkpoint, then drop the oldest beyond `keep` and what a killed process left half-written.

        Raises UserError when the disk is full; the earlier checkpoints then stay.
        """
        target = self.folder / f"step-{step:06d}"
        with atomic_folder(target) as part, os_errors_as_user_errors(target):
            write_policy(policy, part)
            save_tensors(optimizer_tensors(optimizer, policy), part / OPTIMIZER_FILE)
            (part / STATE_FILE).write_text(json.dumps({**(record or {}), "step": step}), encoding="utf-8")
        for old in [*self.all()[: -self.keep], *self.folder.glob(".step-*")]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put the newest checkpoint into policy and optimizer; its record, empty where there is none.

        Raises UserError when it is damaged or of a policy of another size.
        """
        found = self.all()
        if not found:
            return {}
        stored = load_policy(found[-1])
        if stored.size != policy.size:
            raise UserError(f"{found[-1]} holds a policy of another size than the one this run is about")
        try:
            tensors = load_file(found[-1] / OPTIMIZER_FILE)
            record = json.loads((found[-1] / STATE_FILE).read_text(encoding="utf-8"))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{found[-1]} is damaged ({error}); remove it to resume from the one before") from error
        with torch.no_grad():
            for ours, theirs in zip(policy.parameters(), stored.parameters(), strict=True):
                ours.copy_(theirs)
        load_optimizer_tensors(optimizer, policy, tensors)
        return record
