"""The run that the page has trained, and whose prompts it plays."""

from __future__ import annotations

from dataclasses import replace

from fastsmart.config import Config
from fastsmart.taste.training import taste_config


def config_for(policy: str, max_tokens: int, seconds: float) -> Config:
    """Settings of a run on a taste whose clips are as long as those that are compared."""
    config = taste_config(policy)
    return replace(
        config,
        sampling=replace(config.sampling, max_tokens=max_tokens),
        audio=replace(config.audio, max_seconds=seconds),
    )
