"""Several runs after each other from one base, whose changes of weights make one policy.

What runs on different prompts have in common is what the reward asks for; what each has by chance makes outputs alike
and is mostly gone from their mean. Averages of separately tuned policies have more reward at the same divergence than
any of them (Rame et al. 2024, "WARP: On the benefits of weight averaged rewarded policies", arXiv 2406.16768).
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.files import atomic_folder, make_folder, os_errors_as_user_errors
from fastsmart.policy.blend import blended, cooled
from fastsmart.policy.hf_format import load_policy, write_policy
from fastsmart.policy.optimizer import forget_moments
from fastsmart.policy.transformer import Policy

FOLDER = "merged"  # in the run's folder; below it a checkpoint for each run


class MergedRuns:
    """The runs of a folder one after the other, and the policy that they make (see `MergeSettings`).

    The policy of each run's last step is kept in `merged/run-1` and so on, as a checkpoint like any other.

    steps : of each run
    end   : steps of all of them, after which tilted fine-tuning begins
    """

    def __init__(self, config: Config, folder: Path, ranks: Ranks) -> None:
        self.train, self.settings, self.folder, self.ranks = config.train, config.merge, folder / FOLDER, ranks
        self.end = config.train.steps - config.merge.tilt_steps
        self.steps = self.end // config.merge.runs

    def course(self, step: int) -> tuple[int, int, float]:
        """Place in the course of the learning rate of the step that follows so many of all: step, steps and peak. Each
        run has the whole course, and the fine-tuning has."""
        peak = self.train.learning_rate
        if self.settings.tilt_steps and step >= self.end:
            return step - self.end, self.settings.tilt_steps, self.settings.tilt_learning_rate or peak
        return step % self.steps if self.settings.runs > 1 else step, self.steps, peak

    def begins(self, step: int) -> bool:
        """Whether another run begins after so many steps of all; not the first, which begins from the base anyway."""
        return 0 < step < self.end and step % self.steps == 0

    def restart(self, policy: Policy, base: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Put policy and optimizer back to where the first run began."""
        policy.load_state_dict(base.state_dict())
        forget_moments(optimizer)

    def after_step(self, step: int, policy: Policy, base: Policy) -> None:
        """Keep the policy of a run that has ended, and make the last one's that of all runs.

        Raises UserError where one cannot be written, or an earlier one not be read.
        """
        run, rest = divmod(step, self.steps)
        if rest or run > self.settings.runs:
            return
        if self.ranks.leader:
            make_folder(self.folder)
            with atomic_folder(self._kept(run)) as part, os_errors_as_user_errors(self._kept(run)):
                write_policy(policy, part)
        self.ranks.broadcast(run)  # written
        if run == self.settings.runs:
            policy.load_state_dict(self._merged(base).state_dict())

    def _merged(self, base: Policy) -> Policy:
        policies = []
        for run in range(1, self.settings.runs + 1):
            try:
                policies.append(load_policy(self._kept(run), device=base.device))
            except UserError as error:
                raise UserError(f"the policy of run {run} is needed for the merged one: {error}") from error
        share = self.settings.scale / self.settings.runs
        merged = blended(base, base, 0, [(policy, share) for policy in policies])
        return cooled(merged, self.settings.temperature)

    def _kept(self, run: int) -> Path:
        return self.folder / f"run-{run}"
