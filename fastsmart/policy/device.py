"""Device and dtype that "auto" stands for on this machine."""

from __future__ import annotations

import torch

from fastsmart.errors import UserError
from fastsmart.policy.settings import PolicySettings


def resolved_device(settings: PolicySettings) -> torch.device:
    """The device "auto" stands for on this machine; raises UserError for one it lacks."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(settings.device, "policy.device")


def usable_device(name: str, key: str) -> torch.device:
    """The device of that name; raises UserError, naming the key it was given by, where this machine lacks it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key} is {name[:80]!r}, which does not work here: {reason[:300]}; write cpu or cuda"
        ) from error
    return device


def resolved_dtype(settings: PolicySettings) -> torch.dtype:
    """The dtype "auto" stands for on this machine."""
    if settings.dtype == "auto":
        return torch.bfloat16 if resolved_device(settings).type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)
