"""The run of a lesson, whose prompts the page plays."""

from __future__ import annotations

from dataclasses import replace

from fastsmart.config import Config
from fastsmart.taste.lessons import lesson_config


def config_for(policy: str, max_tokens: int, seconds: float) -> Config:
    """Settings of a lesson whose clips are as long as those that are compared."""
    config = lesson_config(policy)
    return replace(
        config,
        sampling=replace(config.sampling, max_tokens=max_tokens),
        audio=replace(config.audio, max_seconds=seconds),
    )
