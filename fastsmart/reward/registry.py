"""Rewards by name. Each is imported when it is asked for, so that a symbolic run never pays for torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from fastsmart.errors import UserError
from fastsmart.limits import require_kind
from fastsmart.reward.base import Reward

# name -> (module, class)
REWARDS = {
    "audiobox": ("audiobox", "AudioboxReward"),
    "brightness": ("descriptors", "Brightness"),
    "clamp_score": ("clamp3", "ClampScore"),
    "clamp_style": ("clamp3", "ClampStyle"),
    "clamp_text": ("clamp3", "ClampText"),
    "clap_class": ("clap", "ClapClass"),
    "clap_similarity": ("clap", "ClapSimilarity"),
    "consonance": ("descriptors", "Consonance"),
    "constraint": ("constraints", "Constraint"),
    "filled_beats": ("symbolic", "FilledBeats"),
    "loudness_range": ("descriptors", "LoudnessRange"),
    "pam": ("clap", "Pam"),
    "pitch_range": ("symbolic", "PitchRange"),
    "polyphony_rate": ("symbolic", "PolyphonyRate"),
    "presence": ("symbolic", "Presence"),
    "scale_consistency": ("symbolic", "ScaleConsistency"),
    "style_margin": ("style_margin", "StyleMargin"),
    "taste": ("taste", "TasteReward"),
    "typicality": ("typicality", "Typicality"),
    "variety": ("symbolic", "Variety"),
    "warmth": ("descriptors", "Warmth"),
}
_REGISTERED: dict[str, Callable[..., Reward]] = {}  # by users, see `register`
STATISTICS_FILE = "typicality.json"  # beside a base policy
FROM_STATISTICS = ("presence", "typicality")  # measured against real pieces: they take `statistics`


def load_reward(name: str, **settings: Any) -> Reward:
    """The reward of that name, ready to score.

    `audiobox` takes `checkpoint` and what else `AudioboxReward` has; `clap_similarity`, `clap_class` and `pam` take
    `model` and their texts; `clamp_style`, `clamp_score` and `clamp_text` take `checkpoint` and the style or text that
    is wanted; `presence` and `typicality` take `statistics`, the path of the JSON beside the base model; by default
    those of the first shipped policy; `taste` takes the path of its file and `caution`; `constraint` takes
    the keys of `ConstraintSettings`; the others take nothing.

    Raises UserError for an unknown name, and for a checkpoint or statistics file that cannot be read; TypeError naming
    a setting that the reward does not have or that is missing.
    """
    require_kind(name, str, "name", "the name of a reward")
    make = reward_class(name)
    if name in FROM_STATISTICS and "statistics" not in settings:
        settings["statistics"] = shipped_statistics()
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise TypeError(f"load_reward({name!r}): {error}; it takes {_taken(make)}") from error
    return make(**settings)


def reward_class(name: str) -> Callable[..., Reward]:
    """The class of that name, or what else was registered; raises UserError for an unknown name."""
    require_known(name, "")
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, attribute = REWARDS[name]
    return getattr(import_module(f"fastsmart.reward.{module}"), attribute)


def shipped_statistics() -> Path:
    """The statistics of real pieces of the first shipped policy; raises UserError where none is installed."""
    from fastsmart.policy.hf_format import shipped_file, shipped_policies

    shipped = shipped_policies()
    if not shipped:
        raise UserError(
            "no policy is shipped with this installation; name the statistics of real pieces to compare with"
        )
    return shipped_file(shipped[0], STATISTICS_FILE)


def _taken(make: Callable[..., Reward]) -> str:
    return ", ".join(inspect.signature(make).parameters) or "no settings"


def register(reward: type[Reward]) -> type[Reward]:
    """Make a class known by its `name` in this process, to `load_reward` and to `reward.terms` of a config.

    Use it as a decorator. A run makes the class by its `from_settings` where it has one, else without arguments. One of
    the same name registered before is replaced. A run with such a reward is resumed by a program that registers it too.

    Raises UserError for a name that a reward of fastsmart has.
    """
    if reward.name in REWARDS:
        raise UserError(f"fastsmart has a reward {reward.name!r}; choose another name for {reward.__name__}")
    _REGISTERED[reward.name] = reward
    return reward


def require_known(name: str, key: str) -> None:
    """Raise UserError with the nearest valid name unless `name` is a reward; `key` says where it was written."""
    known = [*REWARDS, *_REGISTERED]
    if name in known:
        return
    nearest = get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    raise UserError(f"{key}no reward is called {name!r}; {hint}")
