"""Several rewards as one: every term computed once and logged on its own. Shape letters: N clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastsmart.errors import UserError
from fastsmart.reward.base import Clips, Reward, Scores, Surroundings
from fastsmart.reward.registry import reward_class

if TYPE_CHECKING:
    from fastsmart.reward.settings import RewardSettings


class RewardBlend:
    """The rewards of a run, loaded once.

    settings   : which rewards, with what weights
    statistics : statistics of real pieces to use where `settings.typicality` names none
    device     : where a reward that is a network runs ("cpu", "cuda", "cuda:1", ...)
    style_judge : judge of styles to use where `settings.style_judge` names none

    Raises UserError when there is no term, or a term's checkpoint or statistics cannot be read.
    """

    def __init__(
        self, settings: RewardSettings, statistics: str | Path = "", device: str = "cpu", style_judge: str | Path = ""
    ) -> None:
        if not any(settings.terms.values()):
            raise UserError("reward.terms weighs no reward; name at least one, such as reward.terms.consonance=1")
        self.weights = dict(settings.terms)
        surroundings = Surroundings(statistics, device, style_judge)
        self.rewards = {name: _configured(name, settings, surroundings) for name in settings.terms}

    @property
    def needs_audio(self) -> bool:
        """Whether any term listens to audio; if not, nothing need be rendered."""
        return any(reward.needs_audio for reward in self.rewards.values())

    def prepare(self) -> None:
        """Do beforehand what the first calls of some rewards would have to, in the thread that will make the calls."""
        for reward in self.rewards.values():
            getattr(reward, "prepare", lambda: None)()

    def __call__(self, clips: Clips) -> Scores:
        """Every term of every clip and their weighted sum, which is what is reported."""
        terms = {name: reward(clips) for name, reward in self.rewards.items()}
        # 0 x NaN is nothing, not NaN
        weighted = [w * terms[name].astype(np.float64) for name, w in self.weights.items() if w]
        return Scores(terms, np.sum(weighted, axis=0).astype(np.float32))


def _configured(name: str, settings: RewardSettings, surroundings: Surroundings) -> Reward:
    """A reward with what the settings say of it: by its `from_settings`, where it has one."""
    reward = reward_class(name)
    from_settings = getattr(reward, "from_settings", None)
    return from_settings(settings, surroundings) if from_settings else reward()
