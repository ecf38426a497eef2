"""Features a listener can name, of a clip's notes and, where it has been rendered, of its sound.

Shape letters: N clips, M notes of all clips, F features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file, write_atomic
from fastsmart.music.features import features as note_features
from fastsmart.music.histograms import MAJOR_PROFILE, MINOR_PROFILE, PROFILE_UNIT
from fastsmart.notes import NoteBatch
from fastsmart.reward.base import Clips
from fastsmart.reward.taste_embedding import ClipEmbedding

if TYPE_CHECKING:
    from fastsmart.audio.batch import AudioBatch

FORMAT = "fastsmart features of a base 1"  # counts up whenever a feature means something else
# name -> (what little of it is called, what much of it is called)
NOTE_FEATURES = {
    "pace": ("slow", "fast"),  # logarithm of different onsets a second
    "density": ("sparse", "dense"),  # logarithm of notes at each onset
    "overlap": ("thin", "full"),  # mean number of pitches while any sounds
    "length": ("detached", "sustained"),  # logarithm of the mean duration, seconds
    "silence": ("flowing", "with rests"),  # share of the clip in which nothing sounds
    "register": ("low", "high"),  # mean pitch
    "width": ("narrow", "wide"),  # standard deviation of the pitch
    "leaps": ("stepwise", "leaping"),  # mean interval of the highest notes, semitones
    "loudness": ("soft", "loud"),  # mean velocity
    "dynamics": ("even", "with dynamics"),  # standard deviation of the velocity
    "minor": ("major", "minor"),  # how much better the best minor key fits than the best major one
    "chromatic": ("in key", "chromatic"),  # share of notes outside the best scale
    "consonance": ("dissonant", "consonant"),  # share of consonant intervals among what sounds together
    "repetition": ("varied", "repetitive"),  # share of four-note figures heard before
    "off_beat": ("on the beat", "off the beat"),  # share of onsets between the beats
}
AUDIO_FEATURES = {
    "brightness": ("dark", "bright"),  # spectral centroid, octaves
    "smoothness": ("rough", "smooth"),  # exp(-sensory roughness)
}
LABELS = NOTE_FEATURES | AUDIO_FEATURES
CONSONANT = np.array([1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0], np.bool_)  # unison, thirds, fourth, fifth, sixths
WIDEST = 4.0  # standard deviations from the base's mean beyond which a clip counts as if it were there
LEAST_SD = 1e-3  # of a feature: one that the base never varies tells clips apart by no more than chance


def features(notes: NoteBatch, audio: AudioBatch | None = None) -> np.ndarray:
    """Features of every clip, float64 [N, F]: those of `NOTE_FEATURES`, and of `AUDIO_FEATURES` where there is audio.

    What a clip is too short to have is NaN; of a clip without notes all are.
    """
    measured = note_features(notes)
    empty = notes.counts == 0
    onsets, leaps, consonance, off_beat = _shape(notes)
    with np.errstate(divide="ignore", invalid="ignore"):
        end_s = np.where(notes.end_s > 0, notes.end_s, np.nan)
        columns = {
            "pace": np.log(onsets / end_s),
            "density": np.log(notes.counts / onsets),
            "overlap": measured["polyphony"],
            "length": np.log(measured["mean_duration_s"]),
            "silence": 1.0 - measured["sounding_s"] / end_s,
            "register": measured["mean_pitch"],
            "width": measured["pitch_spread"],
            "leaps": leaps,
            "loudness": measured["mean_velocity"],
            "dynamics": measured["velocity_spread"],
            "minor": key_fit(notes)[:, 12:].max(axis=1) - key_fit(notes)[:, :12].max(axis=1),
            "chromatic": 1.0 - measured["scale_consistency"],
            "consonance": consonance,
            "repetition": measured["repetition"],
            "off_beat": off_beat,
        }
    if audio is not None:
        columns |= _heard(notes, audio)
    table = np.stack(list(columns.values()), axis=1)
    table[empty] = np.nan
    return np.where(np.isfinite(table), table, np.nan)


def all_features(notes: NoteBatch, audio: AudioBatch | None, embedding: ClipEmbedding | None) -> np.ndarray:
    """`features`, and the components of an embedding after them, float64 [N, F]."""
    table = features(notes, audio)
    return table if embedding is None else np.concatenate([table, embedding(notes)], axis=1)


def feature_names(audio: bool = False) -> tuple[str, ...]:
    """Names of the columns of `features`."""
    return tuple(LABELS if audio else NOTE_FEATURES)


def key_fit(notes: NoteBatch) -> np.ndarray:
    """Correlation of each clip's pitch classes, weighed by duration, with the 24 key profiles, float64 [N, 24].

    Columns 0..11 are C major to B major, 12..23 C minor to B minor (Krumhansl and Schmuckler; Krumhansl 1990,
    "Cognitive Foundations of Musical Pitch", chapter 4). A clip without notes, or one that plays all twelve pitch
    classes equally, fits none: 0.
    """
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    cell = clip * 12 + notes.pitch.astype(np.int64) % 12
    played = np.zeros(12 * len(notes), np.int64)
    np.add.at(played, cell, np.maximum(notes.duration_tick, 1).astype(np.int64))
    # whole numbers until the division: a clip's fit does not depend, not even by rounding, on those beside it
    played = 12 * played.reshape(-1, 12) - played.reshape(-1, 12).sum(axis=1, keepdims=True)
    norms = np.sqrt((played**2).sum(axis=1, keepdims=True)) * np.sqrt((_PROFILES**2).sum(axis=1))
    return np.divide(played @ _PROFILES.T, norms, out=np.zeros(norms.shape), where=norms > 0)


_PROFILES = np.array([[PROFILE_UNIT * p for p in profile] for profile in (MAJOR_PROFILE, MINOR_PROFILE)])
_PROFILES = np.rint((_PROFILES - _PROFILES.mean(axis=1, keepdims=True)) / 100).astype(np.int64)
_PROFILES = np.stack([np.roll(profile, tonic) for profile in _PROFILES for tonic in range(12)])  # [24, 12]


@dataclass(frozen=True)
class Standard:
    """Means and standard deviations of the features of the base model's clips, in whose units a taste counts.

    names      : of the F features; those of the embedding's components are the last
    mean, std  : float64 [F]
    clips      : standardised features of some of these clips, float64 [K, F]
    embedding  : what components of clips are measured by; None = a taste has named features alone
    """

    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    clips: np.ndarray
    embedding: ClipEmbedding | None = None

    @staticmethod
    def of(
        clips: np.ndarray | NoteBatch | Clips, names: tuple[str, ...] = (), embedding: ClipEmbedding | None = None
    ) -> Standard:
        """From the base model's clips, or their `all_features` [N, F] (`names` where they are not the usual ones).

        Raises UserError for fewer than 16 clips with notes.
        """
        if isinstance(clips, Clips):
            clips = all_features(clips.notes, clips.audio, embedding)
        elif isinstance(clips, NoteBatch):
            clips = all_features(clips, None, embedding)
        components = embedding.names if embedding else ()
        names = names or feature_names(clips.shape[1] == len(LABELS) + len(components)) + components
        if clips.ndim != 2 or clips.shape[1] != len(names):
            raise ValueError(f"{clips.shape} features of {len(names)} names")
        known = clips[np.isfinite(clips).any(axis=1)]
        if len(known) < LEAST_CLIPS:
            raise UserError(
                f"a taste is measured against at least {LEAST_CLIPS} clips of the base model, and {len(known)} have "
                "notes; sample more"
            )
        mean, std = np.zeros(len(names)), np.ones(len(names))  # of what no clip has, such as chords of single voices
        found = np.isfinite(known).any(axis=0)
        mean[found], std[found] = np.nanmean(known[:, found], axis=0), np.nanstd(known[:, found], axis=0)
        std = np.maximum(std, LEAST_SD)
        return Standard(names, mean, std, Standard(names, mean, std, known[:0])(known[:MOST_KEPT]), embedding)

    @property
    def named(self) -> int:
        """How many of the features have a name: all but the components of the embedding."""
        return len(self.names) - (len(self.embedding.names) if self.embedding else 0)

    def measure(self, notes: NoteBatch, audio: AudioBatch | None = None) -> np.ndarray:
        """Features of clips in this standard's order, float64 [N, F], not standardised."""
        return all_features(notes, audio, self.embedding)

    @property
    def heard(self) -> bool:
        """Whether some of the features are of sound."""
        return any(name in AUDIO_FEATURES for name in self.names)

    def __call__(self, table: np.ndarray) -> np.ndarray:
        """Features [N, F] in standard deviations from the mean, at most ±4; what is unknown is the mean, 0."""
        z = (np.atleast_2d(table) - self.mean) / self.std
        return np.clip(np.nan_to_num(z, nan=0.0), -WIDEST, WIDEST)

    def save(self, path: str | Path) -> None:
        """Write as JSON; raises UserError when the file cannot be written."""
        write_atomic(path, json.dumps({"format": FORMAT} | self.to_dict()) + "\n")

    @staticmethod
    def load(path: str | Path) -> Standard:
        """Read what `save` wrote; raises UserError naming the file when it is missing, broken or of another kind."""
        try:
            tree = json.loads(read_file(path).decode("utf-8"))
            if tree["format"] != FORMAT:
                raise ValueError(f"its format is {tree['format']!r}, not {FORMAT!r}")
            return Standard.from_dict(tree)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; it lies beside the choices") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} does not hold features of the base's clips ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Content as JSON has it."""
        rows = {name: getattr(self, name).tolist() for name in ("mean", "std")}
        embedding = {"embedding": self.embedding.to_dict()} if self.embedding else {}
        return {"names": list(self.names), **rows, "clips": np.round(self.clips, 4).tolist()} | embedding

    @staticmethod
    def from_dict(tree: dict[str, Any]) -> Standard:
        """From `to_dict`; raises ValueError, KeyError or TypeError where something is missing or of another form."""
        names = tuple(map(str, tree["names"]))
        mean, std = np.array(tree["mean"], np.float64), np.array(tree["std"], np.float64)
        clips = np.array(tree["clips"], np.float64)
        sound = mean.shape == std.shape == (len(names),) and clips.ndim == 2 and clips.shape[1] == len(names)
        finite = sound and all(np.isfinite(a).all() for a in (mean, std, clips)) and (std > 0).all()
        if not finite:
            raise ValueError("numbers of the base's clips that do not fit together")
        embedding = ClipEmbedding.from_dict(tree["embedding"]) if "embedding" in tree else None
        if embedding and names[-len(embedding.names) :] != embedding.names:
            raise ValueError("components that are not those of the embedding")
        return Standard(names, mean, std, clips, embedding)


LEAST_CLIPS = 16
MOST_KEPT = 256  # clips whose features are kept: enough for a correlation to within 0.06


def _heard(notes: NoteBatch, audio: AudioBatch) -> dict[str, np.ndarray]:
    from fastsmart.reward.descriptors import clip_centroid_hz, clip_roughness

    with np.errstate(divide="ignore", invalid="ignore"):
        return {"brightness": np.log2(clip_centroid_hz(audio)), "smoothness": np.exp(-clip_roughness(audio))}


def _shape(notes: NoteBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Different onsets, mean leap of the top line, share of consonant overlaps, share of off-beat onsets; [N] each."""
    table = np.full((len(notes), 4), np.nan)
    _fill_shape(
        notes.offsets, notes.onset_tick, notes.duration_tick, notes.pitch, notes.ticks_per_beat, CONSONANT, table
    )
    onsets, leaps, consonance, off_beat = table.T.copy()
    return onsets, leaps, consonance, off_beat


@numba.njit(cache=True, nogil=True)
def _fill_shape(
    offsets: np.ndarray,
    onset_tick: np.ndarray,
    duration_tick: np.ndarray,
    pitch: np.ndarray,
    ticks_per_beat: int,
    consonant: np.ndarray,
    table: np.ndarray,
) -> None:
    for i in range(len(offsets) - 1):
        m = offsets[i + 1] - offsets[i]
        if m == 0:
            continue
        rows = slice(offsets[i], offsets[i + 1])
        start = onset_tick[rows].astype(np.int64)
        order = np.argsort((start << 8) + pitch[rows])
        start, length = start[order], duration_tick[rows].astype(np.int64)[order]
        key = pitch[rows].astype(np.int64)[order]
        onsets, off, leap, top = 0, 0, 0, -1
        agreeing, together = 0.0, 0.0
        for k in range(m):
            last = k == m - 1 or start[k + 1] != start[k]
            if last:  # the highest note of its onset
                onsets += 1
                off += start[k] % ticks_per_beat != 0
                leap += abs(key[k] - top) if top >= 0 else 0
                top = key[k]
            for j in range(k - 1, -1, -1):
                if start[k] - start[j] > LOOK_BACK * ticks_per_beat:
                    break
                shared = min(start[j] + length[j], start[k] + length[k]) - start[k]
                if shared > 0 and key[j] != key[k]:
                    together += shared
                    agreeing += shared * consonant[abs(key[k] - key[j]) % 12]
        table[i, 0] = onsets
        table[i, 1] = leap / (onsets - 1) if onsets > 1 else np.nan
        table[i, 2] = agreeing / together if together > 0 else np.nan
        table[i, 3] = off / onsets


LOOK_BACK = 8  # beats in which a note that still sounds may have begun
