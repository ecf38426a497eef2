"""The mean of a policy's weights over the steps of a run.

Weights averaged along a run have less of the noise of its last steps (Polyak and Juditsky 1992, SIAM Journal on Control
and Optimization 30); an exponential mean forgets the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastsmart.policy.transformer import Policy


class WeightAverage:
    """Exponential mean of the weights after each step, without the bias of its beginning; never sampled from.

    After t steps it is sum_s decay^(t - s) w_s / sum_s decay^(t - s), over s = 1 .. t: with decay 0 the last weights.

    weights : float32 on the CPU, by name
    steps   : t
    """

    def __init__(self, decay: float, weights: Mapping[str, torch.Tensor] | None = None, steps: int = 0) -> None:
        self.decay, self.steps = decay, steps
        self.weights = {name: weight.float().cpu() for name, weight in (weights or {}).items()}

    @torch.no_grad()
    def add(self, policy: Policy) -> None:
        """Take in the weights after one more step."""
        self.steps += 1
        share = (1 - self.decay) / (1 - self.decay**self.steps)
        for name, weight in policy.named_parameters():
            new = weight.detach().to("cpu", torch.float32)
            self.weights[name] = new.clone() if self.steps == 1 else torch.lerp(self.weights[name], new, share)
