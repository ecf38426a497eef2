"""What a run of tilted fine-tuning may choose. No torch here, so that reading a config stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsmart.errors import UserError
from fastsmart.limits import MOST_AT_ONCE, MOST_STEPS, require, require_finite

LIMITS = {
    **dict.fromkeys(("prompts", "clips"), (1, MOST_AT_ONCE)),
    "round_steps": (0, MOST_STEPS),
    "best_of": (2, MOST_AT_ONCE),
}


@dataclass(frozen=True)
class TiltSettings:
    """Fine-tuning by likelihood on the policy's own clips, which are weighted by reward (train.algorithm = "tilt")."""

    prompts: int = 256
    """Prompts whose clips are sampled; each gets sampling.group completions, those of train.prompts prompts side by
    side."""
    round_steps: int = 0
    """Optimizer steps after which clips are sampled anew, from the policy as it is by then; 0 = clips of the base are
    sampled once."""
    clips: int = 64
    """Clips of a step, drawn by their weights."""
    weights: Literal["best-of-n", "diverse"] = "best-of-n"
    """Weights of the clips: "best-of-n" = how often each would be the best of best_of draws among its prompt's;
    "diverse" = of all weights that reach the wanted mean reward, the most diverse ones, over the clips of all prompts
    (fastsmart.music.reweighting)."""
    best_of: int = 8
    """Draws whose best is wanted; with "diverse", times its share that a clip may weigh at most."""
    gain: float = 1.0
    """Of "diverse": the wanted mean reward above that of the clips, in their standard deviations. Where that is more
    than clips have, as with a gate that few pass, the weights are the most diverse ones of the best clips."""

    def __post_init__(self) -> None:
        require(self, "tilt.", LIMITS)
        require_finite(self, "tilt.", "gain")
        if not self.gain >= 0:
            raise UserError(f"tilt.gain is {self.gain}; it must be 0 or above")
