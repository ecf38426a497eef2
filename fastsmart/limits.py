"""Limits of the numbers of a configuration, told in one way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from fastsmart.errors import UserError

# Far above what anybody means, and low enough that nothing overflows or is built for ever
MOST_STEPS = 10**9
MOST_AT_ONCE = 10**6  # completions, clips, prompts, tokens
MOST_THREADS = 1024
MOST_COMPONENTS = 32  # of an embedding that a taste hears
LARGEST_SEED = 2**63 - 1
LONGEST_NAME = 255  # of a file or folder, in the file systems in use


def require_kind(value: object, kinds: type | tuple[type, ...], name: str, wanted: str) -> None:
    """Raises TypeError naming the argument of the Python face whose value is of another kind than `wanted` says."""
    numbers = {int: Integral, float: Real}  # numpy's are numbers, too
    known = tuple(numbers.get(kind, kind) for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    if not isinstance(value, known) or (isinstance(value, bool) and kinds is int):
        raise TypeError(f"{name} is {_kind(value)}; it must be {wanted}")


def require_name(value: object, name: str, wanted: str) -> None:
    """Raises TypeError as `require_kind` for what is no text or path, UserError for a name that no file can have."""
    require_kind(value, (str, Path), name, wanted)
    if any(len(part) > LONGEST_NAME for part in str(value).split("/")):
        raise UserError(f"{name} is {str(value)[:80]!r}..., too long a name for a file; give {wanted}")


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def require(settings: Any, section: str, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises UserError for the first key of the settings that is outside its limits, both included, or not a number."""
    for key, (low, high) in limits.items():
        value = getattr(settings, key)
        if not value >= low:
            raise UserError(f"{section}{key} is {value}; it must be at least {low:g}")
        if not value <= high:
            raise UserError(f"{section}{key} is {value}; it must be at most {high:,}")


def require_finite(settings: Any, section: str, *keys: str) -> None:
    """Raises UserError for the first of these keys whose value is infinite or not a number."""
    for key in keys:
        if not math.isfinite(getattr(settings, key)):
            raise UserError(f"{section}{key} is {getattr(settings, key)}; it must be a finite number")
