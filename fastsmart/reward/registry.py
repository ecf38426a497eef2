"""Rewards by name. Each is imported when it is asked for, so that a symbolic run never pays for torch."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from fastsmart.errors import UserError
from fastsmart.reward.base import Reward

# name -> (module, class)
REWARDS = {
    "audiobox": ("audiobox", "AudioboxReward"),
    "brightness": ("descriptors", "Brightness"),
    "clap_class": ("clap", "ClapClass"),
    "clap_similarity": ("clap", "ClapSimilarity"),
    "consonance": ("descriptors", "Consonance"),
    "filled_beats": ("symbolic", "FilledBeats"),
    "loudness_range": ("descriptors", "LoudnessRange"),
    "pam": ("clap", "Pam"),
    "pitch_range": ("symbolic", "PitchRange"),
    "polyphony_rate": ("symbolic", "PolyphonyRate"),
    "presence": ("symbolic", "Presence"),
    "scale_consistency": ("symbolic", "ScaleConsistency"),
    "typicality": ("typicality", "Typicality"),
    "variety": ("symbolic", "Variety"),
    "warmth": ("descriptors", "Warmth"),
}
FROM_STATISTICS = ("presence", "typicality")  # measured against real pieces: they take `statistics`


def load_reward(name: str, **settings: Any) -> Reward:
    """The reward of that name, ready to score.

    `audiobox` takes `checkpoint` and what else `AudioboxReward` has; `clap_similarity`, `clap_class` and `pam` take
    `model` and their texts; `presence` and `typicality` take `statistics`, the path of the JSON beside the base model;
    the others take nothing.

    Raises UserError for an unknown name, and for a checkpoint or statistics file that cannot be read.
    """
    require_known(name, "")
    module, attribute = REWARDS[name]
    return getattr(import_module(f"fastsmart.reward.{module}"), attribute)(**settings)


def require_known(name: str, key: str) -> None:
    """Raise UserError with the nearest valid name unless `name` is a reward; `key` says where it was written."""
    if name in REWARDS:
        return
    nearest = get_close_matches(name, REWARDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(REWARDS)}"
    raise UserError(f"{key}no reward is called {name!r}; {hint}")
