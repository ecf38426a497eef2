"""Rewards of files on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from fastsmart.audio import AudioBatch, render
from fastsmart.audio.rendering import is_cut
from fastsmart.audio.resample import resample
from fastsmart.errors import UserError
from fastsmart.notes import MIDI_SUFFIXES, NoteBatch, read_midi
from fastsmart.reward import Clips, RewardBlend, RewardSettings
from fastsmart.reward.registry import FROM_STATISTICS, shipped_statistics

REWARD_RATE_HZ = 16000
TOGETHER = 16  # MIDI files that are rendered and scored at once
RATES_HZ = (1_000, 768_000)  # of audio files
LARGEST_FILTER = 2**25  # taps of a resampling filter; rates with hardly a common divisor need more
Row = dict[str, Any]
BEGINNING = '{"path": '  # of every row as it is written


class FileScorer:
    """Scores files with rewards loaded once.

    settings    : the rewards and where their weights are; weights of the terms play no part
    statistics  : of real pieces, "" = those of the first shipped policy
    soundfont   : for MIDI files whose rewards listen
    max_seconds : of each MIDI file, 0 = all of it
    device      : where a reward that is a network runs

    Raises UserError for a reward that cannot be loaded.
    """

    def __init__(
        self,
        settings: RewardSettings,
        statistics: str | Path = "",
        soundfont: str = "",
        max_seconds: float = 10.0,
        device: str = "cpu",
    ) -> None:
        if not statistics and set(FROM_STATISTICS) & settings.terms.keys():
            statistics = shipped_statistics()
        self.mix = RewardBlend(settings, statistics, device)
        self.soundfont, self.max_seconds = soundfont, max_seconds

    @property
    def random(self) -> list[str]:
        """The rewards whose weights were drawn at random, so that their scores mean nothing."""
        return [name for name, reward in self.mix.rewards.items() if getattr(reward, "random", False)]

    def __call__(self, paths: Sequence[str | Path]) -> Iterator[Row]:
        """One row a file, in their order: its `path`, then every reward by name, None where it could not be computed.

        Audiobox adds its four axes on the raters' scale under upstream's names, and `"weights": "random"` where they
        are. A file that cannot be scored has a row with its `path` and the `error`; the others go on. Short MIDI files
        are rendered and scored side by side.
        """
        step = TOGETHER if self.max_seconds else 1
        for first in range(0, len(paths), step):
            yield from self._score([Path(path) for path in paths[first : first + step]])

    def _score(self, paths: list[Path]) -> list[Row]:
        rows: list[Row] = [{"path": str(path)} for path in paths]
        pieces: list[tuple[int, NoteBatch]] = []
        for i, path in enumerate(paths):
            try:
                if path.suffix.lower() in MIDI_SUFFIXES:
                    pieces.append((i, self._written(path)))
                else:
                    rows[i] |= self._terms(self._recorded(path))[0]
            except UserError as error:
                rows[i]["error"] = str(error)
        for per_beat in sorted({notes.ticks_per_beat for _, notes in pieces}):
            alike = [(i, notes) for i, notes in pieces if notes.ticks_per_beat == per_beat]
            for (i, _), terms in zip(alike, self._played([notes for _, notes in alike]), strict=True):
                rows[i] |= terms
        return rows

    def _written(self, path: Path) -> NoteBatch:
        notes = read_midi(path, self.max_seconds or None)
        if self.mix.needs_audio and is_cut(notes, 0):
            minutes = f"lasts {notes.end_s[0] / 60:.0f} minutes, and 60 can be rendered"
            raise UserError(f"{path} {minutes}; name --max-seconds 3600, or fewer")
        return notes

    def _played(self, pieces: list[NoteBatch]) -> list[Row]:
        notes = NoteBatch.concat(pieces)
        seconds = max(float(notes.end_s.max()), 1.0)
        audio = render(notes, self.soundfont, "fluidsynth", max_seconds=seconds) if self.mix.needs_audio else None
        return self._terms(Clips(notes, audio))

    def _recorded(self, path: Path) -> Clips:
        deaf = [name for name, reward in self.mix.rewards.items() if not reward.needs_audio]
        if deaf:
            raise UserError(f"{path} is audio, but {', '.join(deaf)} reads notes; give the MIDI file")
        return Clips(NoteBatch.empty(1), read_audio(path))

    def _terms(self, clips: Clips) -> list[Row]:
        columns: dict[str, np.ndarray] = {}
        for name, reward in self.mix.rewards.items():
            rate = getattr(reward, "rate", None)
            if rate is None:
                columns[name] = reward(clips)
            else:
                ratings = rate(clips)
                columns |= {name: reward.weighted(ratings)} | ratings  # type: ignore[attr-defined]
        mark = {"weights": "random"} if self.random else {}
        return [
            {name: float(v[i]) if np.isfinite(v[i]) else None for name, v in columns.items()} | mark
            for i in range(len(clips))
        ]


def read_audio(path: str | Path, sample_rate: int = REWARD_RATE_HZ) -> AudioBatch:
    """A WAV or FLAC file of any sample format and number of channels as one mono clip at `sample_rate`.

    Raises UserError naming the file when it cannot be read, is empty, or holds samples that are not finite.
    """
    try:
        samples, rate = soundfile.read(os.fsencode(path), dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{path} is not a readable WAV or FLAC file: {error}") from error
    if len(samples) == 0:
        raise UserError(f"{path} holds no audio")
    if not np.isfinite(samples).all():
        raise UserError(f"{path} holds samples that are not finite numbers")
    taps = rate * sample_rate // gcd(rate, sample_rate) ** 2
    if not RATES_HZ[0] <= rate <= RATES_HZ[1] or taps > LARGEST_FILTER:
        raise UserError(f"{path} has a sample rate of {rate} Hz; convert it to {sample_rate} Hz")
    mono = resample(samples.mean(axis=1, dtype=np.float32), rate, sample_rate)
    return AudioBatch(mono[None], np.array([len(mono)]), sample_rate)


def scored_before(path: str | Path, columns: Sequence[str]) -> dict[str, Row]:
    """Rows without an error of an earlier run's JSON lines, by their path; a last line cut short is left out.

    Raises UserError when the file is not made of such rows, or they lack one of the rewards asked for now.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text, so not one of fastsmart score; choose another --out") from error
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            if not line.startswith(BEGINNING) and not BEGINNING.startswith(line):
                raise UserError(f"{path} line {number} is no row of fastsmart score; choose another --out")
            break
        try:
            row = json.loads(line)
            known, complete = str(row["path"]), "error" in row or set(columns) <= set(row)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no row of fastsmart score; choose another --out") from error
        if not complete:
            raise UserError(f"{path} line {number} was scored with other rewards; choose another --out")
        if "error" not in row:
            rows[known] = row
    return rows
