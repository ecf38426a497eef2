"""Checkpoints a run goes on from: policy, optimizer and a record, each in a folder that is never rewritten."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_folder, os_errors_as_user_errors
from fastsmart.policy.hf_format import load_policy, save_tensors, write_policy
from fastsmart.policy.optimizer import load_optimizer_tensors, optimizer_tensors
from fastsmart.policy.transformer import Policy

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
PREVIOUS_FILE = "previous.safetensors"
BEST_KEY = "held_out_reward"  # of the record: what the best checkpoint has most of
BEST_LINK = "best"


@dataclass(frozen=True)
class Snapshot:
    """A run's state in host memory, out of reach of the steps that follow.

    previous : the policy of the step before, which a run that samples one step ahead resumes with
    """

    step: int
    policy: Policy
    optimizer: dict[str, torch.Tensor]
    record: dict[str, Any]
    previous: Policy | None = None

    @staticmethod
    def of(
        step: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        record: dict[str, Any] | None = None,
        previous: Policy | None = None,
    ) -> Snapshot:
        """Copy everything to host memory."""
        tensors = optimizer_tensors(optimizer, policy)
        return Snapshot(
            step,
            _on_host(policy),
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()},
            dict(record or {}),
            _on_host(previous) if previous is not None else None,
        )


class Checkpoints:
    """The folders `step-000040` below `folder`; each is also a checkpoint that `load_policy` reads.

    The last `keep` stay, and the best: the one whose record has the highest "held_out_reward", to which the link
    `best` points.
    """

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

    def best(self) -> tuple[Path | None, float]:
        """The checkpoint with the highest held-out reward, and that reward; (None, -inf) where none was evaluated."""
        rewards = {path: _record(path).get(BEST_KEY) for path in self.all()}
        evaluated = {path: reward for path, reward in rewards.items() if reward is not None}
        path = max(evaluated, key=lambda path: evaluated[path], default=None)
        return path, evaluated[path] if path else float("-inf")

    def save(
        self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, record: dict[str, Any] | None = None
    ) -> None:
        """`write` the present state."""
        self.write(Snapshot.of(step, policy, optimizer, record))

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, then drop those that need not stay and what a killed process left half-written.

        Raises UserError when the disk is full; the earlier checkpoints then stay.
        """
        target = self.folder / f"step-{snapshot.step:06d}"
        with atomic_folder(target) as part, os_errors_as_user_errors(target):
            write_policy(snapshot.policy, part)
            save_tensors(snapshot.optimizer, part / OPTIMIZER_FILE)
            if snapshot.previous is not None:
                weights = {name: p.detach() for name, p in snapshot.previous.named_parameters()}
                save_tensors(weights, part / PREVIOUS_FILE)
            (part / STATE_FILE).write_text(json.dumps({**snapshot.record, "step": snapshot.step}), encoding="utf-8")
        best, _ = self.best()
        if best:
            self._point_to(best)
        stay = {*self.all()[-self.keep :], best}
        for old in [*(path for path in self.all() if path not in stay), *self.folder.glob(".step-*")]:
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
        tensors, record = _tensors(found[-1] / OPTIMIZER_FILE), _record(found[-1])
        with torch.no_grad():
            for ours, theirs in zip(policy.parameters(), stored.parameters(), strict=True):
                ours.copy_(theirs)
        load_optimizer_tensors(optimizer, policy, tensors)
        return record

    def previous(self, policy: Policy) -> Policy | None:
        """The policy of the step before the newest checkpoint, placed like `policy`; None where it was not saved."""
        found = self.all()
        if not found or not (found[-1] / PREVIOUS_FILE).exists():
            return None
        tensors, previous = _tensors(found[-1] / PREVIOUS_FILE), copy.deepcopy(policy)
        with torch.no_grad():
            for name, parameter in previous.named_parameters():
                parameter.copy_(tensors[name])
        return previous

    def _point_to(self, best: Path) -> None:
        link, part = self.folder / BEST_LINK, self.folder / f".{BEST_LINK}"
        with os_errors_as_user_errors(link):
            part.unlink(missing_ok=True)
            os.symlink(best.name, part)
            part.replace(link)


def _on_host(policy: Policy) -> Policy:
    with torch.no_grad():
        return copy.deepcopy(policy).to("cpu")


def _record(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(_damaged(checkpoint, error)) from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(_damaged(path.parent, error)) from error


def _damaged(checkpoint: Path, error: Exception) -> str:
    return f"{checkpoint} is damaged ({error}); remove it to resume from the one before"


def policy_source(text: str) -> str:
    """What a person names as a policy: a run folder stands for its newest checkpoint, all else for itself.

    Raises UserError for a run that has no checkpoint yet.
    """
    if (Path(text) / "policy" / "config.json").is_file():  # a pre-training run: its best
        return str(Path(text) / "policy")
    found = Checkpoints(Path(text) / "checkpoints").all()
    if not found and (Path(text) / "config.toml").is_file():
        raise UserError(f"the run in {text} has no checkpoint yet")
    return str(found[-1]) if found else text
