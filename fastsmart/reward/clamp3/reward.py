"""Rewards by CLaMP's encoders: likeness to a style of real pieces, or to a text. Shape letters: N clips, S styles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.reward.base import Clips, Surroundings
from fastsmart.reward.clamp3.reader import MusicReader
from fastsmart.reward.clamp3.styles import RealStyles, cosines
from fastsmart.reward.clamp3.text import text_vector
from fastsmart.reward.settings import RewardSettings


class ClampScore:
    """Cosine of a clip with the mean of the real pieces of a style, -1..1; a clip without notes has -1.

    The score that CLaMP-DPO picks its pairs by (Wang et al. 2025, arXiv 2502.18008). Most of it is what all piano music
    has in common. Hacked by the average of the style, and by what the real pieces' files have in common: their tempi,
    velocities and lengths.

    checkpoint : published file of M3, CLaMP 2 or CLaMP 3, or the name of one; see `reward.clamp_checkpoint`
    styles     : file that `fastsmart style-stats` made with the same weights
    style      : the one that is wanted of clips that were not asked for any; "" = all were
    device     : where it runs; in float16 on a GPU

    random : whether the weights were drawn, so that no score means anything

    Raises UserError when a file is missing, broken or of another kind, or the style is unknown.
    """

    name = "clamp_score"
    needs_audio = False

    def __init__(self, checkpoint: str | Path, styles: str | Path, style: str, device: str = "cpu") -> None:
        self.reader, self.real = _compared(checkpoint, styles, style, device)
        self.random, self.style = self.reader.random, style

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> ClampScore:
        return cls(settings.clamp_checkpoint, settings.clamp_styles, settings.clamp_style, surroundings.device)

    def __call__(self, clips: Clips) -> np.ndarray:
        likeness = self.real.likeness(self.reader.read(clips.notes, self.real.about.writer))
        wanted = _wanted(self.real, clips, self.style)
        return _with_lowest(likeness[np.arange(len(clips)), wanted], clips, -1.0)


class ClampStyle:
    """Likeness of a clip to its own style less that to the others, -2..2; a clip without notes has -2.

    The cosine with the mean of the real pieces of the style that is wanted, less that of the other styles: what all
    music has in common cancels. Differences are small, so normalise within groups. Hacked by caricature: whatever sets
    the style apart, more of it than real pieces have; `ceiling` takes that gain away.

    others  : "mean" or "max", what is taken off
    ceiling : whether what is more like its style than the median real window gets the median's value

    checkpoint, styles, style, device, random : as of `ClampScore`

    Raises UserError as `ClampScore` does, and for a file of a single style.
    """

    name = "clamp_style"
    needs_audio = False

    def __init__(
        self,
        checkpoint: str | Path,
        styles: str | Path,
        style: str,
        others: str = "mean",
        ceiling: bool = False,
        device: str = "cpu",
    ) -> None:
        self.reader, self.real = _compared(checkpoint, styles, style, device)
        if self.real.count < 2:
            raise UserError(f"clamp_style compares styles, but {styles} holds one; use clamp_score, or add styles")
        self.random, self.style, self.others = self.reader.random, style, others
        self.ceiling = np.full(self.real.count, np.inf)
        if ceiling:
            margin = margins(self.real.likeness_unheard(), self.real.style, others)
            of_style = [margin[(self.real.style == s) & np.isfinite(margin)] for s in range(self.real.count)]
            self.ceiling = np.array([np.median(values) if len(values) else np.inf for values in of_style])

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> ClampStyle:
        return cls(
            settings.clamp_checkpoint,
            settings.clamp_styles,
            settings.clamp_style,
            settings.clamp_others,
            settings.clamp_ceiling,
            surroundings.device,
        )

    def __call__(self, clips: Clips) -> np.ndarray:
        likeness = self.real.likeness(self.reader.read(clips.notes, self.real.about.writer))
        wanted = _wanted(self.real, clips, self.style)
        return _with_lowest(np.minimum(margins(likeness, wanted, self.others), self.ceiling[wanted]), clips, -2.0)


class ClampText:
    """Cosine of a clip with a text, -1..1; a clip without notes has -1.

    Needs a checkpoint of CLaMP 2 or 3. Differences between piano clips are small; normalise within groups. Hacked by
    whatever else the music has in common that such words were written about: their genre, their epoch, their length.

    checkpoint, device, random : as of `ClampScore`
    prompt     : one line, such as "a calm nocturne for solo piano"
    text_model : folder or hub id of the configuration and tokenizer of XLM-R base
    writer     : how the ends of notes are written, see `notes_text`

    Raises UserError when a file or transformers is missing, the model reads no text, or the prompt is empty.
    """

    name = "clamp_text"
    needs_audio = False

    def __init__(
        self,
        checkpoint: str | Path,
        prompt: str,
        text_model: str | Path = "FacebookAI/xlm-roberta-base",
        writer: str = "note_on",
        device: str = "cpu",
    ) -> None:
        if not prompt.strip():
            raise UserError("reward.clamp_prompt needs a text, such as 'a calm nocturne for solo piano'")
        self.text = text_vector(checkpoint, text_model, " ".join(prompt.split()))
        self.reader, self.writer = MusicReader.shared(checkpoint, device), writer
        self.random = self.reader.random

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> ClampText:
        return cls(
            settings.clamp_checkpoint,
            settings.clamp_prompt,
            settings.clamp_text_model,
            settings.clamp_writer,
            surroundings.device,
        )

    def __call__(self, clips: Clips) -> np.ndarray:
        return _with_lowest(cosines(self.reader.read(clips.notes, self.writer), self.text[None])[:, 0], clips, -1.0)


def margins(likeness: np.ndarray, wanted: np.ndarray, others: str = "mean") -> np.ndarray:
    """Likeness [N, S] to the style wanted of each, int64 [N], less the mean or the largest of the rest, float64 [N]."""
    rows = np.arange(len(likeness))
    rest = likeness.copy()
    rest[rows, wanted] = -np.inf if others == "max" else 0.0
    taken = rest.max(axis=1) if others == "max" else rest.sum(axis=1) / (likeness.shape[1] - 1)
    return likeness[rows, wanted] - taken


def _compared(checkpoint: str | Path, styles: str | Path, style: str, device: str) -> tuple[MusicReader, RealStyles]:
    real = RealStyles.load(styles)
    if style:
        real.number(style)
    reader = MusicReader.shared(checkpoint, device)
    real.require_made_with(reader, styles)
    return reader, real


def _wanted(real: RealStyles, clips: Clips, style: str) -> np.ndarray:
    """Number of the style wanted of each clip, int64 [N]: the one it was asked for, else `style`."""
    asked = getattr(clips, "asked", ()) or ("",) * len(clips)
    names = [name or style for name in asked]
    if "" in names:
        known = ", ".join(real.about.styles)
        raise UserError(f"reward.clamp_style names no style, and clips were asked for none; it is one of {known}")
    return np.array([real.number(name) for name in names], np.int64)


def _with_lowest(values: np.ndarray, clips: Clips, lowest: float) -> np.ndarray:
    """Values of clips with notes, the lowest of those without, float32 [N]."""
    return np.where(clips.notes.counts > 0, values, lowest).astype(np.float32)
