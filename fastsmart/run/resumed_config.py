"""Keys that a run may be given anew when it goes on, and the config that follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fastsmart.config import Config, merged
from fastsmart.errors import UserError

# Of these the numbers of a step do not depend, but for the learning rate, whose course ends with train.steps
CHANGEABLE = (
    *("train.steps", "train.eval_every", "train.save_every", "train.keep", "train.listen", "train.threads"),
    *("train.writers", "audio.workers", "audio.clip_timeout_s"),
)

# and of a run of GRPO that a listener teaches, what changes with what has been learnt about her; others keep scores of
# samples from round to round, which would be of two tastes
TAUGHT = ("reward.taste", "reward.taste_caution", "grpo.beta")


def differences(own: Config, wanted: Config) -> dict[str, Any]:
    """The keys whose values differ, such as `train.steps`, with those of `wanted`."""
    ours = dict(_values(own))
    return {key: value for key, value in _values(wanted) if value != ours[key]}


def resumed_config(own: Config, changes: Mapping[str, Any], path: Path, step: int) -> Config:
    """The config that the run in `path`, which is at `step`, goes on with.

    changes : new values of keys, such as {"train.steps": 400}

    Raises UserError naming keys that a run keeps from beginning to end, and for steps that are done already.
    """
    taught = "taste" in own.reward.terms and own.train.algorithm == "grpo"
    changeable = (*CHANGEABLE, *TAUGHT) if taught else CHANGEABLE
    fixed = [key for key in changes if key not in changeable]
    if fixed:
        raise UserError(
            f"{path} holds a run with other settings ({', '.join(fixed)}); leave these out to go on with its own "
            f"config.toml, or choose another --out: only {', '.join(changeable)} may change"
        )
    steps = changes.get("train.steps", own.train.steps)
    if own.merge.active and steps != own.train.steps:
        raise UserError(
            f"the run in {path} merges its policies after step {own.train.steps}; leave train.steps as it is"
        )
    if isinstance(steps, int) and steps < own.train.steps and steps <= step:
        raise UserError(f"train.steps is {steps}, but the run in {path} has done {step} already; choose more than that")
    tree: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return merged(own, tree)


def changes_in_words(own: Config, changed: Config) -> list[str]:
    """A sentence for every key that has another value now."""
    before = dict(_values(own))
    return [f"{key} is {value!r} from here on, was {before[key]!r}" for key, value in differences(own, changed).items()]


def _values(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if is_dataclass(value):
            yield from _values(value, f"{name}.")
        else:
            yield name, value
