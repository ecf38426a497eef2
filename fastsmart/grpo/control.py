"""A proportional-integral controller of a multiplier, as constrained reinforcement learning uses it.

Maximising reward with diversity kept above a floor gives each constraint a Lagrange multiplier. Raising it by the
integral of the violation alone oscillates; a proportional part damps that (Stooke et al. 2020, arXiv 2007.03964), and
limits on the integral keep it from winding up while the multiplier is at its bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHING = 0.8  # share of the running mean that stays, a step


@dataclass(frozen=True)
class Controller:
    """The multiplier of one constraint `measure >= floor`, as it stands.

    integral : of the violation, 0 .. most
    running  : exponential mean of the measure; None before the first step
    weight   : the multiplier, 0 .. most
    """

    integral: float
    running: float | None = None
    weight: float = 0.0

    def step(
        self, measure: float, floor: float, proportional: float = 8.0, integral: float = 1.0, most: float = 4.0
    ) -> Controller:
        """The controller after one more measurement; what cannot be measured (NaN) leaves it as it is."""
        if math.isnan(measure):
            return self
        running = measure if self.running is None else SMOOTHING * self.running + (1 - SMOOTHING) * measure
        error = floor - running
        total = min(max(self.integral + integral * error, 0.0), most)
        return Controller(total, running, min(max(total + proportional * error, 0.0), most))
