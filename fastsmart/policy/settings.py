"""What a run may choose about its policy. No torch here, so that reading a config stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PolicySettings:
    """Which policy is tuned.

    source     : shipped name, checkpoint folder or hub id; also the reference of the KL term
    vocabulary : MidiTok JSON or preset, for a checkpoint that has no tokenizer.json; "" = its own
    device     : "auto" = CUDA where there is one, else CPU
    dtype      : of the matrix products of sampling and training; weights, head and log-softmax stay float32.
                 "auto" = bfloat16 on CUDA, float32 on CPU
    """

    source: str = "pop909-tiny"
    vocabulary: str = ""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
