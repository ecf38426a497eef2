"""Check of the tensors of a checkpoint against those of the network that should be in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


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
