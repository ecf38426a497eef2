"""What "auto" stands for on this machine: where a policy computes, and in which dtype."""

from __future__ import annotations

import torch

from fastsmart.errors import UserError
from fastsmart.policy.settings import PolicySettings


def resolved_device(settings: PolicySettings) -> torch.device:
    """The device "auto" stands for on this machine; raises UserError for one it lacks."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(settings.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"policy.device is {settings.device!r}, which does not work here: {reason}") from error
    return device


def resolved_dtype(settings: PolicySettings) -> torch.dtype:
    """The dtype "auto" stands for on this machine."""
    if settings.dtype == "auto":
        return torch.bfloat16 if resolved_device(settings).type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)
