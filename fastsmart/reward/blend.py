"""Several rewards as one: every term computed once and logged on its own. Shape letters: N clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastsmart.errors import UserError
from fastsmart.reward.base import Clips, Reward, Scores
from fastsmart.reward.registry import FROM_STATISTICS, load_reward

if TYPE_CHECKING:
    from fastsmart.reward.settings import RewardSettings

STD_FLOOR = 1e-4  # added to a group's standard deviation, as in the advantages of GRPO


class RewardBlend:
    """The rewards of a run, loaded once.

    settings   : which rewards, with what weights
    statistics : statistics of real pieces to use where `settings.typicality` names none
    device     : where a reward that is a network runs ("cpu", "cuda", "cuda:1", ...)

    Raises UserError when there is no term, or a term's checkpoint or statistics cannot be read.
    """

    def __init__(self, settings: RewardSettings, statistics: str | Path = "", device: str = "cpu") -> None:
        if not any(settings.terms.values()):
            raise UserError("reward.terms weighs no reward; name at least one, such as reward.terms.consonance=1")
        self.weights = dict(settings.terms)
        self.rewards: dict[str, Reward] = {
            name: load_reward(name, **_arguments(name, settings, statistics, device)) for name in settings.terms
        }

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
        return Scores(terms, _weighted_sum(terms, self.weights))


def combine(
    terms: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    group_index: np.ndarray,
    normalize: Literal["none", "group"],
) -> np.ndarray:
    """The number the policy is trained on, float32 [N]; NaN where a weighted term is NaN.

    With "none" it is the weighted sum of the terms. With "group" every term is first centred and divided by its
    standard deviation (n - 1 in the denominator, plus 1e-4) among the clips of its group that could be scored, so that
    a weight means the same for a term of any scale (the decoupled normalisation of GDPO, arXiv 2601.05242). A clip that
    is the only one scored in its group gets 0.

    terms       : float32 [N] by name
    weights     : by name; terms of weight 0 are left out
    group_index : int [N], equal for the clips of one group
    """
    if normalize == "group":
        groups, group_of = np.unique(group_index, return_inverse=True)
        terms = {name: _standardise(values, group_of, len(groups)) for name, values in terms.items() if weights[name]}
    return _weighted_sum(terms, weights)


def _standardise(values: np.ndarray, group_of: np.ndarray, groups: int) -> np.ndarray:
    scored = ~np.isnan(values)
    filled = np.where(scored, values, 0.0).astype(np.float64)
    count = np.bincount(group_of, scored, groups)
    mean = np.bincount(group_of, filled, groups) / np.maximum(count, 1)
    centred = np.where(scored, values - mean[group_of], 0.0)
    std = np.sqrt(np.bincount(group_of, centred**2, groups) / np.maximum(count - 1, 1))
    return np.where(scored, centred / (std[group_of] + STD_FLOOR), np.nan)


def _weighted_sum(terms: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Sum of weight x term over the terms that have a weight, float32 [N]; 0 x NaN is nothing, not NaN."""
    weighted = [weights[name] * values.astype(np.float64) for name, values in terms.items() if weights[name]]
    return np.sum(weighted, axis=0).astype(np.float32)


def _arguments(name: str, settings: RewardSettings, statistics: str | Path, device: str) -> dict[str, Any]:
    if name == "audiobox":
        return {
            "checkpoint": settings.audiobox_checkpoint,
            "axes": settings.audiobox_axes,
            "batch_size": settings.audiobox_batch,
            "dtype": settings.audiobox_dtype,
            "device": device,
        }
    if name == "clap_similarity":
        return {"model": settings.clap_model, "prompt": settings.clap_prompt, "device": device}
    if name == "clap_class":
        return {
            "model": settings.clap_model,
            "classes": settings.clap_classes,
            "wanted": settings.clap_class,
            "device": device,
        }
    if name == "pam":
        pairs = {"pairs": settings.pam_pairs} if settings.pam_pairs else {}
        return {"model": settings.clap_model, "device": device, **pairs}
    if name in FROM_STATISTICS:
        path = settings.typicality or statistics
        if not path:
            raise UserError(
                f"reward.terms.{name} compares with real pieces, but the base model came without their statistics; "
                f"name the file in reward.typicality"
            )
        return {"statistics": path} | ({"ceiling": settings.typicality_ceiling} if name == "typicality" else {})
    return {}
