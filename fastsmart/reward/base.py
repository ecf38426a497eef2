"""Clips, which go into a reward, and scores, which come out. Shape letters: N clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastsmart.audio.batch import DeviceAudio
from fastsmart.errors import UserError

if TYPE_CHECKING:
    from fastsmart.audio.batch import AudioBatch
    from fastsmart.notes import NoteBatch


@dataclass(frozen=True)
class Clips:
    """N clips as a musician has them: what is written and, where it has been rendered, what is heard.

    notes : NoteBatch of N pieces
    audio : AudioBatch of the same N clips in the same order, or None when nothing was rendered
    asked : the style that each of the N clips was asked for, "" for none; () where no clip was asked for any
    """

    notes: NoteBatch
    audio: AudioBatch | None = None
    asked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.notes, str) or not hasattr(self.notes, "__len__"):
            raise TypeError(f"notes is of type {type(self.notes).__name__}; it must be what decode or read_midi gives")
        if self.audio is not None and not hasattr(self.audio, "lengths"):
            raise TypeError(f"audio is of type {type(self.audio).__name__}; it must be what render gives, or None")
        if self.audio is not None and len(self.audio) != len(self.notes):
            raise ValueError(f"{len(self.notes)} clips of notes but {len(self.audio)} of audio")
        if self.asked and len(self.asked) != len(self.notes):
            raise ValueError(f"{len(self.notes)} clips of notes but {len(self.asked)} styles asked for")

    def __len__(self) -> int:
        return len(self.notes)


class Reward(Protocol):
    """A way to score clips: a callable `Clips -> float32 [N]`.

    Larger is better. An empty clip gets the lowest value the reward has, because playing nothing is the policy's
    failure; NaN is kept for clips that could not be scored (audio that was not rendered), which is ours.

    name        : the key it is logged and weighted under
    needs_audio : whether `Clips.audio` is read; a run in which no reward reads it renders nothing

    One whose first call has to do what later ones have not, may have a method `prepare` that does it. One with options
    has a classmethod `from_settings(settings, surroundings)`, which makes it from a run's `RewardSettings`.
    """

    name: str
    needs_audio: bool

    def __call__(self, clips: Clips) -> np.ndarray: ...


@dataclass(frozen=True)
class Surroundings:
    """Files and device that a run gives its rewards beside their settings.

    statistics  : path of the statistics of real pieces beside the base model; "" = there are none
    device      : where a reward that is a network runs: "cpu", "cuda", "cuda:1" ...
    style_judge : path of the judge of styles beside the base model; "" = there is none
    """

    statistics: str | Path = ""
    device: str = "cpu"
    style_judge: str | Path = ""


@dataclass(frozen=True)
class Scores:
    """Scores of a batch of clips.

    terms : float32 [N] for every reward by name, as the reward gave it; NaN = could not be scored
    total : float32 [N], weighted sum of the terms; NaN where a weighted term is NaN
    """

    terms: dict[str, np.ndarray]
    total: np.ndarray

    def __len__(self) -> int:
        return len(self.total)

    @staticmethod
    def concat(parts: Sequence[Scores]) -> Scores:
        """The scores of all parts, one after the other; at least one part."""
        terms = {name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms}
        return Scores(terms, np.concatenate([part.total for part in parts]))


def heard(clips: Clips, reward: str) -> AudioBatch:
    """The audio of the clips; raises UserError when they have not been rendered."""
    if clips.audio is None:
        raise UserError(f"the reward {reward} listens to audio, but these clips are only notes; render them first")
    return clips.audio


def unrendered(audio: AudioBatch) -> np.ndarray:
    """Mask of the clips that could not be rendered, bool [N]: their rows hold NaN."""
    if isinstance(audio, DeviceAudio):
        return np.asarray(audio.on_device[:, :1].isnan().any(dim=1).cpu().numpy())
    return np.isnan(audio.samples[:, :1]).any(axis=1)
