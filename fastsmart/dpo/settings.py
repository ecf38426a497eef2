"""What a run of direct preference optimisation may choose. No torch here, so that reading a config stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsmart.errors import UserError
from fastsmart.limits import MOST_AT_ONCE, MOST_STEPS, require, require_finite

LIMITS = {
    **dict.fromkeys(("prompts", "pairs"), (1, MOST_AT_ONCE)),
    "round_steps": (1, MOST_STEPS),
    "fewest_notes": (0, MOST_AT_ONCE),
}
Refused = Literal["empty", "duplicate", "cut-off"]


@dataclass(frozen=True)
class DpoSettings:
    """Rounds of sampling, choosing and preference steps (train.algorithm = "dpo").

    The defaults are those of NotaGen (Wang et al. 2025, arXiv 2502.18008) where the size of a run does not matter.
    """

    prompts: int = 64
    """Prompts of a round; each gets sampling.group completions, those of train.prompts prompts side by side."""
    round_steps: int = 32
    """Optimizer steps of a round; the next round samples anew, from the policy as it is by then."""
    pairs: int = 8
    """Pairs of a step: a chosen completion and a rejected one of the same prompt."""
    keep: float = 0.1
    """Share of a prompt's completions that is chosen, from the top, and that is rejected, from the bottom; at least one
    of each."""
    beta: float = 0.1
    """Scale of the margin in the loss: the larger, the nearer to the reference the policy stays."""
    penalty: float = 10.0
    """Weight of what the chosen completion has lost of its log-prob, DPO-Positive's lambda (Pal et al. 2024,
    arXiv 2402.13228); 0 = DPO."""
    reference: Literal["round", "base"] = "round"
    """Policy that log-probs are compared with: the one that the round was sampled from, or the base."""
    length_normalised: bool = False
    """Whether log-probs are means over a completion's tokens instead of sums."""
    refuse: tuple[Refused, ...] = ("empty", "duplicate")
    """What is never chosen: "empty" = of fewer than fewest_notes notes, "duplicate" = token by token a completion that
    is chosen already, "cut-off" = not ended by the policy itself."""
    fewest_notes: int = 8
    """Notes that a clip needs in order not to count as empty."""
    training_set: str = ""
    """Folder of MIDI files, or of an encoded dataset, copies of whose pieces are never chosen; "" = none."""
    copy_distance: float = 0.25
    """Training distance below which a clip counts as a copy: 0.25 = more than three quarters of its four-note figures
    are in one and the same piece."""

    def __post_init__(self) -> None:
        require(self, "dpo.", LIMITS)
        require_finite(self, "dpo.", "beta", "penalty", "copy_distance")
        if not 0 < self.keep <= 0.5:
            raise UserError(f"dpo.keep is {self.keep}; it must be above 0 and at most 0.5, the better half")
        if not self.beta > 0:
            raise UserError(f"dpo.beta is {self.beta}; it must be above 0")
        if not 0 <= self.copy_distance <= 1:
            raise UserError(f"dpo.copy_distance is {self.copy_distance}; it is a share, from 0 to 1")
        if not self.penalty >= 0:
            raise UserError(f"dpo.penalty is {self.penalty}; it must be 0 (plain DPO) or above")
