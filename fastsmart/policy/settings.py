"""Settings of the policy. No torch here, so that reading a config stays instant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fastsmart.errors import UserError

DEVICE = re.compile(r"[a-z]+(:\d{1,3})?")


@dataclass(frozen=True)
class PolicySettings:
    """The policy to tune."""

    source: str = "pop909-tiny"
    """Shipped name, checkpoint folder or hub id; also the reference of the KL term."""
    vocabulary: str = ""
    """MidiTok JSON or preset, for a checkpoint that has no tokenizer.json; "" = its own."""
    device: str = "auto"
    """Device of torch; "auto" = CUDA where there is one, else CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the matrix products of sampling and training; weights, head and log-softmax stay float32. "auto" =
    bfloat16 on CUDA, float32 on CPU."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("policy.source is empty; name a shipped policy, a checkpoint folder or a hub id")
        if not DEVICE.fullmatch(self.device):
            raise UserError(f"policy.device is {self.device!r}; write auto, cpu, cuda or cuda:0")
