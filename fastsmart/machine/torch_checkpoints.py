"""Checkpoints that torch has saved: read without running anything, and held against the network they should be of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsmart.errors import UserError


def read_plain(path: Path, way_out: str, mapped: bool = False) -> Any:
    """Content of a file of torch.save, of tensors and plain values only; nothing in the file is run.

    way_out : the end of the sentence that is said of any other file
    mapped  : tensors stay on the disk until they are read; for files in torch's format since 1.6

    Raises UserError for a file that is damaged, cut short or of another kind.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch's reader raises whatever a file of another kind leads it to
        raise UserError(
            f"{path} is not a complete checkpoint of plain tensors (nothing in it was run); {way_out}"
        ) from error


def first_difference(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The first way in which tensors differ from the shapes they should have, in words; "" = in none.

    A tensor is wrong that is missing, unknown, of another shape, no tensor of floats, or not finite throughout.
    """
    for name in sorted(state.keys() | expected.keys()):
        if name not in state:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is unknown"
        if not isinstance(state[name], Tensor) or not state[name].is_floating_point():
            return f"{name} is no tensor of floats"
        if tuple(state[name].shape) != expected[name]:
            return f"{name} has the shape {tuple(state[name].shape)} and not {expected[name]}"
        if not state[name].isfinite().all():
            return f"{name} holds numbers that are not finite"
    return ""
