"""Checkpoints a run goes on from: policy, optimizer and a record, each in a folder that is never rewritten."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_folder, os_errors_as_user_errors, read_file
from fastsmart.policy.hf_format import STATE_FILE, load_policy, save_tensors, step_folders, step_of, write_policy
from fastsmart.policy.optimizer import load_optimizer_tensors, moments, optimizer_tensors
from fastsmart.policy.transformer import Policy

OPTIMIZER_FILE = "optimizer.safetensors"
PREVIOUS_FILE = "previous.safetensors"
AVERAGE_FILE = "average.safetensors"
BEST_KEY = "held_out_reward"  # of the record: what the best checkpoint has most of
KEPT_KEY = "held_out_diversity_kept"  # of the record: held-out diversity as a share of the untrained policy's
BEST_LINK = "best"
Name = TypeVar("Name", bound=Hashable)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A run's state in host memory, out of reach of the steps that follow.

    previous : the policy of the step before, which a run that samples one step ahead resumes with
    average  : mean weights by name, never written to again; None = none are kept
    """

    step: int
    policy: Policy
    optimizer: dict[str, torch.Tensor]
    record: dict[str, Any]
    previous: Policy | None = None
    average: dict[str, torch.Tensor] | None = None

    @staticmethod
    def of(
        step: int,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        record: dict[str, Any] | None = None,
        previous: Policy | None = None,
        average: Mapping[str, torch.Tensor] | None = None,
    ) -> Snapshot:
        """Copy everything to host memory."""
        tensors = optimizer_tensors(optimizer, policy)
        return Snapshot(
            step,
            _on_host(policy),
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()},
            dict(record or {}),
            _on_host(previous) if previous is not None else None,
            dict(average) if average else None,
        )


class Checkpoints:
    """The folders `step-000040` below `folder`; each is also a checkpoint that `load_policy` reads.

    The last `keep` stay, and the best, to which the link `best` points: the one with the highest held-out reward among
    those whose diversity is at or above the floor (see `best_of`).

    floor       : least share of the untrained policy's held-out diversity that the best must have; 0 = none
    average     : mean weights of the checkpoint that was loaded, by name; empty where it has none
    passed_over : what `load` found damaged, and why; for this object these are no checkpoints
    """

    def __init__(self, folder: Path, keep: int = 1, floor: float = 0.0) -> None:
        self.folder, self.keep, self.floor = folder, keep, floor
        self.passed_over: dict[Path, str] = {}
        self._previous: dict[str, torch.Tensor] = {}
        self.average: dict[str, torch.Tensor] = {}

    def all(self) -> list[Path]:
        """Whole checkpoints as far as their names tell, oldest first."""
        return [path for path in step_folders(self.folder) if path not in self.passed_over]

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 where there is none."""
        found = self.all()
        return step_of(found[-1]) if found else 0

    def best(self) -> tuple[Path | None, float]:
        """The best checkpoint and its held-out reward; (None, -inf) where none can be."""
        evaluated: dict[Path, tuple[float, float | None]] = {}
        for path in self.all():
            with suppress(UserError):  # of a damaged one nothing is known
                record = _record(path)
                evaluated[path] = record.get(BEST_KEY, math.nan), record.get(KEPT_KEY)
        best = best_of(evaluated, self.floor)
        return best, evaluated[best][0] if best else float("-inf")

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
        self._previous = {}
        with atomic_folder(target) as part, os_errors_as_user_errors(target):
            write_policy(snapshot.policy, part)
            save_tensors(snapshot.optimizer, part / OPTIMIZER_FILE)
            if snapshot.previous is not None:
                weights = {name: p.detach() for name, p in snapshot.previous.named_parameters()}
                save_tensors(weights, part / PREVIOUS_FILE)
            if snapshot.average is not None:
                save_tensors(snapshot.average, part / AVERAGE_FILE)
            (part / STATE_FILE).write_text(json.dumps({**snapshot.record, "step": snapshot.step}), encoding="utf-8")
        self.passed_over.pop(target, None)  # a whole one has taken its place
        best, _ = self.best()
        if best:
            self._point_to(best)
        stay = {*self.all()[-self.keep :], best}
        for old in [*(path for path in self.all() if path not in stay), *self.folder.glob(".step-*")]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put the newest checkpoint that can be read into policy and optimizer; its record, empty where there is none.

        Damaged ones are `passed_over`. Raises UserError when all are damaged, or it is of a policy of another size.
        """
        for path in reversed(step_folders(self.folder, whole=False)):
            if path in self.passed_over:
                continue
            try:
                stored, tensors, self._previous, self.average, record = _read(path)
                same = stored.size == policy.size
                if same:
                    load_optimizer_tensors(optimizer, policy, tensors)
            except UserError as error:
                self.passed_over[path] = str(error)
                continue
            if not same:
                raise UserError(f"{path} holds a policy of another size than the one this run is about")
            policy.load_state_dict(stored.state_dict())
            return record
        torn = [path for path in self.passed_over if (path / STATE_FILE).is_file()]
        if torn:
            raise UserError(
                f"no checkpoint in {self.folder} can be read ({self.passed_over[torn[0]]}); put back a copy, or remove "
                f"{self.folder} to begin again at step 0"
            )
        return {}

    def previous(self, policy: Policy) -> Policy | None:
        """The policy of the step before the checkpoint that was loaded, placed like `policy`; None where it was not
        saved."""
        if not self._previous:
            return None
        previous = copy.deepcopy(policy)
        previous.load_state_dict(self._previous, strict=False)  # it has a tied head once
        self._previous = {}
        return previous

    def _point_to(self, best: Path) -> None:
        link, part = self.folder / BEST_LINK, self.folder / f".{BEST_LINK}"
        with os_errors_as_user_errors(link):
            part.unlink(missing_ok=True)
            os.symlink(best.name, part)
            part.replace(link)


def best_of(evaluated: Mapping[Name, tuple[float, float | None]], floor: float) -> Name | None:
    """Name of the best of several evaluated policies: of those that keep the floor the one with most reward, the first
    where several have as much; None where none keeps it, or no reward is known.

    evaluated : held-out reward, and diversity as a share of the untrained policy's (None = not measured, which passes)
    floor     : least share; 0 = none
    """
    feasible = {
        name: reward
        for name, (reward, kept) in evaluated.items()
        if math.isfinite(reward) and (floor <= 0 or kept is None or kept >= floor)
    }
    return max(feasible, key=lambda name: feasible[name], default=None)


def _on_host(policy: Policy) -> Policy:
    with torch.no_grad():
        return copy.deepcopy(policy).to("cpu")


def _read(checkpoint: Path) -> tuple[Policy, Tensors, Tensors, Tensors, dict[str, Any]]:
    """All of a checkpoint: policy, tensors of the optimizer, weights of the step before, mean weights, record; nothing
    is changed by it. Raises UserError where any of it is damaged."""
    record, policy = _record(checkpoint), load_policy(checkpoint)
    shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
    tensors = _tensors(checkpoint / OPTIMIZER_FILE)
    wanted = {key: shape for name, shape in shapes.items() for key, shape in moments(name, shape).items()}
    if tensors:  # none before its first step
        _require(checkpoint / OPTIMIZER_FILE, tensors, wanted)
    previous, average = (
        _weights(checkpoint / name, shapes) if (checkpoint / name).exists() else {}
        for name in (PREVIOUS_FILE, AVERAGE_FILE)
    )
    return policy, tensors, previous, average, record


def averaged_policy(checkpoint: Path) -> Policy:
    """The policy of a checkpoint with its mean weights; raises UserError where it has none, or they are damaged."""
    policy = load_policy(checkpoint)
    path = checkpoint / AVERAGE_FILE
    if not path.is_file():
        raise UserError(f"{checkpoint} has no average of weights; train with --set train.average=0.9")
    shapes = {name: parameter.shape for name, parameter in policy.named_parameters()}
    policy.load_state_dict(_weights(path, shapes), strict=False)  # it has a tied head once
    return policy


def _weights(path: Path, shapes: Mapping[str, torch.Size]) -> Tensors:
    """Weights of a policy of these shapes from a safetensors file; raises UserError where it is damaged."""
    tensors = _tensors(path)
    _require(path, tensors, dict(shapes))
    return tensors


def _record(checkpoint: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_file(checkpoint / STATE_FILE).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_damaged(checkpoint / STATE_FILE, error)) from error
    if not isinstance(record, dict) or record.get("step") != step_of(checkpoint):
        raise UserError(_damaged(checkpoint / STATE_FILE, "it does not say the step its folder is named after"))
    for key in (BEST_KEY, KEPT_KEY):
        if not isinstance(record.get(key, 0.0), int | float):
            raise UserError(_damaged(checkpoint / STATE_FILE, f"its {key} is no number"))
    return record


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(_damaged(path, error)) from error


def _require(path: Path, tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            raise UserError(_damaged(path, f"{name} is not there, or of another shape"))


def _damaged(path: Path, reason: object) -> str:
    return f"{path} is damaged ({reason})"
