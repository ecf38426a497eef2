"""fastsmart: fine-tunes symbolic-music transformers by reinforcement learning on how the music sounds.

    import fastsmart as fs
    policy  = fs.load_policy("pop909-tiny")
    prompts = fs.prompts.procedural(policy.vocab, 4, seed=0, time_signatures=["4/4"])
    rollout = fs.sample(policy, prompts, group=2)
    notes   = fs.decode(rollout.sequences(), policy.vocab, max_seconds=10.0)
    notes.to_midi(0, "first.mid")

Names are imported when they are first used, so that `import fastsmart` is instant. Where torch is not imported yet, it
sets GOMP_SPINCOUNT, so that the threads torch computes with do not hold a core while they wait; a GOMP_SPINCOUNT or
OMP_WAIT_POLICY of yours is left alone. `fastsmart.machine.politeness.begin()` after it, before torch, is quicker on an
idle machine and as polite; commands do that.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastsmart.machine.hardware import wait_politely

if TYPE_CHECKING:
    from fastsmart import presets as presets
    from fastsmart.audio import render as render
    from fastsmart.config import Config as Config
    from fastsmart.errors import UserError as UserError
    from fastsmart.policy.hf_format import load_policy as load_policy
    from fastsmart.policy.hf_format import save_policy as save_policy
    from fastsmart.reward import Clips as Clips
    from fastsmart.reward import load_reward as load_reward
    from fastsmart.sampling import sample as sample
    from fastsmart.tokens import prompts as prompts
    from fastsmart.tokens.decode import decode as decode
    from fastsmart.tokens.vocabulary import load_vocabulary as load_vocabulary
    from fastsmart.trainer.loop import train as train

_HOME = {
    "Clips": "fastsmart.reward",
    "Config": "fastsmart.config",
    "UserError": "fastsmart.errors",
    "decode": "fastsmart.tokens.decode",
    "load_policy": "fastsmart.policy.hf_format",
    "load_reward": "fastsmart.reward",
    "load_vocabulary": "fastsmart.tokens.vocabulary",
    "render": "fastsmart.audio",
    "sample": "fastsmart.sampling",
    "save_policy": "fastsmart.policy.hf_format",
    "train": "fastsmart.trainer.loop",
}
_MODULES = {"presets": "fastsmart.presets", "prompts": "fastsmart.tokens.prompts"}

wait_politely()

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(_MODULES[name])
    elif name == "__version__":
        value = version("fastsmart")
    else:
        raise AttributeError(f"module 'fastsmart' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
