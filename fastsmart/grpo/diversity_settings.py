"""What a run may choose to keep its outputs different from each other. No torch: reading a config stays instant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastsmart.errors import UserError

Stratum = Literal["key", "register", "dynamics"]
Target = Literal["tilted", "base"]


@dataclass(frozen=True)
class DiversitySettings:
    """What holds against the collapse that reward alone brings. With the defaults every part is off.

    Four parts, each by itself or together (docs/diversity.md): advantages within strata, which take the pressure off
    the shares of keys and registers; a witness that pulls the batch towards a diverse target; a controller that chooses
    the weight of the witness so that diversity stays above a floor; and rehearsal of the target's clips.

    Raises UserError naming the key when a value makes no sense.
    """

    stratify: float = 1.0
    """Share of the reward's differences between strata that stays in the advantages; 1 = plain group baseline."""

    strata: tuple[Stratum, ...] = ("key", "register", "dynamics")
    """What clips are compared within: best-fitting diatonic set, third of the base's register, of its loudness."""

    weight: float = 0.0
    """Weight of the witness beside the reward, both in units of the base's spread; where a floor is set, the first."""

    floor: float = 0.0
    """Least share of the base's pairwise diversity to keep, by a controller of the witness's weight; 0 = none."""

    target: Target = "tilted"
    """What the witness pulls towards: the most diverse weighting of base clips with more reward, or the base."""

    tilt: float = 1.0
    """Mean reward of the tilted target above the base's, in its standard deviations."""

    gate: float = 0.5
    """Quantile of the base's reward below which a clip earns nothing for being rare."""

    rehearse: int = 0
    """Clips of the target whose likelihood each step raises beside the policy loss; 0 = none."""

    rehearse_weight: float = 0.3
    """Weight of their mean negative log-likelihood, nats a token, beside the policy loss."""

    clips: int = 1024
    """Outputs of the base policy that calibration samples before the first step."""

    def __post_init__(self) -> None:
        for name in self.strata:
            if name not in get_args(Stratum):
                raise UserError(f"strata has {name!r}; choose of {', '.join(get_args(Stratum))}")
        rules = [
            ("stratify", 0.0 <= self.stratify <= 1.0, "must be from 0 to 1"),
            ("weight", 0.0 <= self.weight < math.inf, "must be 0 or above"),
            ("floor", 0.0 <= self.floor < 1.0, "must be 0 (none) or below 1"),
            ("tilt", 0.0 <= self.tilt < math.inf, "must be 0 or above"),
            ("gate", 0.0 <= self.gate < 1.0, "must be from 0 to below 1"),
            ("rehearse", self.rehearse >= 0, "must be 0 (none) or above"),
            ("rehearse_weight", 0.0 <= self.rehearse_weight < math.inf, "must be 0 or above"),
            ("clips", self.clips >= 64, "must be at least 64"),
        ]
        for key, holds, rule in rules:
            if not holds:
                raise UserError(f"{key} {rule}; got {getattr(self, key)}")
        if self.target not in get_args(Target):
            raise UserError(f"target must be one of {', '.join(get_args(Target))}; got {self.target!r}")

    @property
    def pulls(self) -> bool:
        """Whether there is a witness."""
        return self.weight > 0 or self.floor > 0

    @property
    def active(self) -> bool:
        """Whether any part is on."""
        return self.pulls or self.stratify < 1 or self.rehearse > 0
