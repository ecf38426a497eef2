"""The training algorithms by the name that train.algorithm gives them; none of them knows another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastsmart.trainer.algorithm import Algorithm, InTurn
from fastsmart.trainer.credit import Credit
from fastsmart.trainer.dpo import Dpo
from fastsmart.trainer.grpo import Grpo
from fastsmart.trainer.tilt import Tilt
from fastsmart.trainer.trainer import Trainer

ALGORITHMS: dict[str, Callable[[Trainer, Path], Algorithm]] = {"grpo": Grpo, "tilt": Tilt, "dpo": Dpo, "credit": Credit}


def make_algorithm(trainer: Trainer, folder: Path) -> Algorithm:
    """The algorithm of a trainer whose engine holds the policy; `folder` is the run's."""
    name = trainer.settings.algorithm
    algorithm = ALGORITHMS[name](trainer, folder)
    if not trainer.merge or not trainer.config.merge.tilt_steps:
        return algorithm
    end = trainer.merge.end
    rounds = 0 if name == "grpo" else end // getattr(trainer.config, name).round_steps
    return InTurn(algorithm, Tilt(trainer, folder, (end, rounds)), end, trainer)
