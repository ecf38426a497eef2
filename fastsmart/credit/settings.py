"""What a run that gives credit to single notes may choose. No torch here, so that reading a config stays instant."""

from __future__ import annotations

from dataclasses import dataclass

from fastsmart.errors import UserError
from fastsmart.limits import MOST_AT_ONCE, MOST_STEPS, require, require_finite

LIMITS = {
    **dict.fromkeys(("prompts", "clips"), (1, MOST_AT_ONCE)),
    "round_steps": (1, MOST_STEPS),
    "alternatives": (0, 64),
    "window": (1, 1000),
}


@dataclass(frozen=True)
class CreditSettings:
    """Regression of log-ratios on the advantages of single notes (train.algorithm = "credit")."""

    prompts: int = 256
    """Prompts of a round; each gets sampling.group completions, those of train.prompts prompts side by side."""
    round_steps: int = 32
    """Optimizer steps of a round; the next round samples anew, from the policy as it is by then."""
    clips: int = 64
    """Clips of a step, none twice before all have been taken."""
    window: int = 4
    """Rounds, the present one included, whose clips the value of a prefix is fitted to."""
    alternatives: int = 0
    """Other pitches, velocities and durations, drawn by the policy, that those of a note are judged against."""
    strength: float = 1.0
    """Nats by which a round is to raise a clip that is better by one standard deviation of the base's reward."""
    pull: float = 0.0
    """Share of its log-ratio to the base that a note is to give back in a round; with one above 0 the policy settles
    where each note's log-ratio to the base is strength / pull times its advantage."""
    goal: float = 1000.0
    """Mean reward of a round that is enough, in standard deviations of the first round's above its mean. Within one
    standard deviation of it strength and learning rate fall to 0; beyond it notes give back of their log-ratio to the
    base the share by which the gain is too much. The default is never reached."""
    neutral: tuple[str, ...] = ()
    """Features of a clip (`fastsmart.music.features`) that are to earn less: of the reward, what they foretell is taken
    out before notes are judged, so that outputs need not move to where it is highest."""
    neutral_share: float = 1.0
    """Share of it that is taken out; 1 = such features earn nothing."""

    def __post_init__(self) -> None:
        require(self, "credit.", LIMITS)
        require_finite(self, "credit.", "strength", "pull", "goal", "neutral_share")
        if self.goal < 0:
            raise UserError(f"credit.goal is {self.goal}; it must be 0 or above")
        if not self.strength > 0:
            raise UserError(f"credit.strength is {self.strength}; it must be above 0")
        for key in ("pull", "neutral_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"credit.{key} is {getattr(self, key)}; it must be from 0 to 1")
