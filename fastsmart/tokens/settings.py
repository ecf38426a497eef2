"""Settings of prompts. No torch here, so that reading a config stays instant."""

from __future__ import annotations

from dataclasses import dataclass

from fastsmart.errors import UserError
from fastsmart.limits import LARGEST_SEED, require

SOURCES = ("procedural", "procedural-note", "first-note", "dataset", "bos")
LIMITS = {
    "seed": (0, LARGEST_SEED),
    **dict.fromkeys(("tempo_min", "tempo_max"), (0, 1000)),
    **dict.fromkeys(("pitch_min", "pitch_max", "velocity_min", "velocity_max"), (0, 127)),
    **dict.fromkeys(("duration_min", "duration_max"), (0, 1000)),
}


@dataclass(frozen=True)
class PromptSettings:
    """Source and range of a run's prompts; `prompts` in the configuration.

    Raises UserError for an unknown source and a number that cannot be meant; what depends on the vocabulary
    `fastsmart.tokens.prompts.PromptSource` checks.
    """

    source: str = "procedural"
    """Source of the prompts, one of `SOURCES`."""
    time_signatures: tuple[str, ...] = ()
    """Time signatures of procedural prompts, such as "3/4"; none means all of the vocabulary."""
    tempo_min: float = 0.0
    tempo_max: float = 0.0
    """Tempo of procedural prompts, in beats a minute, both ends included; 0 means no limit, here and below."""
    pitch_min: int = 0
    pitch_max: int = 0
    """MIDI numbers of first notes, both ends included."""
    velocity_min: int = 0
    velocity_max: int = 0
    """Velocities of first notes, 1 to 127, both ends included."""
    duration_min: float = 0.0
    duration_max: float = 0.0
    """Durations of first notes in beats, both ends included."""
    dataset: str = ""
    """Folder of an encoded dataset, for source "dataset"."""
    styles: tuple[str, ...] = ()
    """Styles that are asked for in turn, each "STYLE" or "STYLE/COMPOSER", of a policy that has a styles.json."""
    style_metres: bool = True
    """Whether an opening of a style is in one of the style's own metres, where styles.json gives them; else in one of
    `time_signatures`."""
    seed: int = 0
    """Seed of which openings are held out and of the order in which all of them come."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UserError(f"prompts.source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        require(self, "prompts.", LIMITS)
