"""Rewards of files on disk."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from fastsmart.audio import AudioBatch, render
from fastsmart.errors import UserError
from fastsmart.notes import MIDI_SUFFIXES, NoteBatch, read_midi
from fastsmart.policy.checkpoint import shipped_file, shipped_policies
from fastsmart.reward import Clips, RewardMix, RewardSettings
from fastsmart.train.provenance import STATISTICS_FILE

REWARD_RATE_HZ = 16000


class FileScorer:
    """Scores one file after the other with rewards loaded once.

    rewards     : names
    checkpoint  : Audiobox weights
    statistics  : of real pieces, "" = those of the first shipped policy
    soundfont   : for MIDI files whose rewards listen
    max_seconds : of each MIDI file, 0 = all of it

    Raises UserError for a reward that cannot be loaded.
    """

    def __init__(
        self, rewards: Sequence[str], checkpoint: str, statistics: str | Path, soundfont: str, max_seconds: float
    ) -> None:
        shipped = shipped_policies()
        statistics = statistics or (shipped_file(shipped[0], STATISTICS_FILE) if shipped else "")
        settings = RewardSettings(terms=dict.fromkeys(rewards, 1.0), audiobox_checkpoint=checkpoint)
        self.mix = RewardMix(settings, statistics)
        self.soundfont, self.max_seconds = soundfont, max_seconds

    def __call__(self, path: str | Path) -> dict[str, float | None]:
        """Every reward of one file by name, None where it could not be computed.

        Raises UserError when the file cannot be read, or a reward reads notes and the file is audio.
        """
        path = Path(path)
        if path.suffix.lower() in MIDI_SUFFIXES:
            notes = read_midi(path, self.max_seconds or None)
            seconds = max(float(notes.end_s[0]), 1.0)
            audio = render(notes, self.soundfont, "fluidsynth", max_seconds=seconds) if self.mix.needs_audio else None
            clips = Clips(notes, audio)
        else:
            deaf = [name for name, reward in self.mix.rewards.items() if not reward.needs_audio]
            if deaf:
                raise UserError(f"{path} is audio, but {', '.join(deaf)} reads notes; give the MIDI file")
            clips = Clips(NoteBatch.empty(1), read_audio(path))
        scores = self.mix(clips)
        return {name: float(v[0]) if np.isfinite(v[0]) else None for name, v in scores.terms.items()}


def read_audio(path: str | Path, sample_rate: int = REWARD_RATE_HZ) -> AudioBatch:
    """A WAV or FLAC file as one mono clip at `sample_rate`; raises UserError naming the file when it cannot be read."""
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"{path} is not a readable WAV or FLAC file: {error}") from error
    mono = samples.mean(axis=1)
    if rate != sample_rate:
        step = gcd(rate, sample_rate)
        mono = resample_poly(mono, sample_rate // step, rate // step).astype(np.float32)
    return AudioBatch(mono[None], np.array([len(mono)]), sample_rate)
