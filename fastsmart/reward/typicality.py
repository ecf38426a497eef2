"""Likeness of a clip to real pieces: the likelihood of its features under a distribution fitted to them.

Shape letters: N clips, F features.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file
from fastsmart.music.covariance import ledoit_wolf
from fastsmart.music.features import features
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.reward.base import Clips, Surroundings
from fastsmart.reward.settings import RewardSettings

FORMAT = "fastsmart typicality 1"  # counts up whenever DIMENSIONS, or what a feature means, changes
FLOOR = -6.0  # nats a feature: of a clip without notes, and the least any clip can have
FREEDOM = 5.0  # degrees of freedom: tails heavy enough that one odd clip does not set the scale of its group
EM_STEPS = 50
MIN_WINDOWS = 50
LARGEST = 1e12  # of a number of a file: statistics of music are far below, and far above the formulas overflow

# feature -> (offset of its logarithm or None for the feature itself, least standard deviation it is given). The
# logarithms are of what is skewed in real music; the least deviations, about a just noticeable difference, keep a
# corpus that never varies a feature (velocity, often) from making that feature the only one that counts.
DIMENSIONS: dict[str, tuple[float | None, float]] = {
    "notes_per_window_second": (0.1, 0.1),
    "notes_per_beat": (0.0, 0.1),
    "silent_share": (0.02, 0.1),
    "mean_duration_beats": (0.0, 0.1),
    "mean_pitch": (None, 1.0),
    "pitch_spread": (1.0, 0.1),
    "polyphony_rate": (None, 0.02),
    "scale_consistency": (None, 0.01),
    "pitch_class_entropy": (None, 0.05),
    "repetition": (0.05, 0.1),
    "mean_velocity": (None, 4.0),
    "velocity_spread": (1.0, 0.1),
}


@dataclass(frozen=True)
class TypicalityStats:
    """Statistics of clips of real pieces; ships as JSON beside the model that was trained on them.

    provenance                  : what was measured: data set, version, licence
    pieces, windows, window_s   : how many pieces, cut into how many clips of how many seconds
    location, scatter, freedom  : multivariate Student t over `DIMENSIONS`; float64 [F], [F, F], degrees of freedom
    median_notes                : distinct notes of the median clip
    median_sounding_s           : seconds the median clip sounds
    median_log_likelihood       : of the median clip, nats a feature; see `log_likelihood`
    """

    provenance: str
    pieces: int
    windows: int
    window_s: float
    location: np.ndarray
    scatter: np.ndarray
    freedom: float
    median_notes: float
    median_sounding_s: float
    median_log_likelihood: float

    def save(self, path: str | Path) -> None:
        """Write as JSON; raises UserError when the file cannot be written."""
        content = {"format": FORMAT, "features": list(DIMENSIONS), **asdict(self)}
        content |= {"location": self.location.tolist(), "scatter": self.scatter.tolist()}
        try:
            Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a folder you can write to") from error

    @staticmethod
    def load(path: str | Path) -> TypicalityStats:
        """Read what `save` wrote; raises UserError naming the file when it is missing, broken or of another kind."""
        remedy = "make it anew with fit_typicality, or use the file that came with the base model"
        try:
            content = json.loads(read_file(path).decode("utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the statistics of real pieces {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}); {remedy}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} does not hold statistics of real pieces ({FORMAT!r}); {remedy}")
        if content.get("features") != list(DIMENSIONS):
            raise UserError(f"{path} was made for other features than this version of fastsmart has; {remedy}")
        return _checked(content, path, remedy)

    @staticmethod
    def of(source: str | Path | TypicalityStats) -> TypicalityStats:
        """The statistics themselves, read from their file if a path is given."""
        return source if isinstance(source, TypicalityStats) else TypicalityStats.load(source)


class Typicality:
    """Likeness to real pieces: log-likelihood of a clip's features, in nats a feature (see `log_likelihood`).

    Finite: at least -6, the value of a clip without notes. Windows of 10 s of POP909 pieces it was not fitted to have
    -1.3 ± 0.3, the same with two thirds of their notes taken out -2.3, random notes -3. With `ceiling`, what is more
    likely than the median real clip gets the median's value.

    Hacked by the average: a policy that only ever plays the most likely feature vector beats every real piece, and
    features do not hear order, so likely numbers can come from aimless notes. `ceiling` takes the first gain away;
    `variety` and the KL term to the base model hold against the second.
    """

    name = "typicality"
    needs_audio = False

    def __init__(self, statistics: str | Path | TypicalityStats, ceiling: bool = False) -> None:
        self.statistics = TypicalityStats.of(statistics)
        self.ceiling = self.statistics.median_log_likelihood if ceiling else math.inf

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> Typicality:
        return cls(required_statistics(cls.name, settings, surroundings), settings.typicality_ceiling)

    def __call__(self, clips: Clips) -> np.ndarray:
        return np.minimum(log_likelihood(clips.notes, self.statistics), self.ceiling).astype(np.float32)


def required_statistics(name: str, settings: RewardSettings, surroundings: Surroundings) -> str | Path:
    """Path of the statistics of real pieces that the reward `name` compares with; raises UserError without one."""
    path = settings.typicality or surroundings.statistics
    if not path:
        raise UserError(
            f"reward.terms.{name} compares with real pieces, but the base model came without their statistics; "
            f"name the file in reward.typicality"
        )
    return path


def fit_typicality(pieces: NoteBatch, provenance: str, window_s: float = 10.0) -> TypicalityStats:
    """Fit the distribution of features of whole pieces, cut into windows as long as the policy's clips.

    Maximum likelihood of a multivariate Student t with 5 degrees of freedom by EM (Liu and Rubin 1995, Statistica
    Sinica 5), its scatter shrunk towards equal, uncorrelated deviations by as much as Ledoit and Wolf (2004, J.
    Multivariate Anal. 88) find best for that many windows.

    Raises UserError when the pieces give fewer than 50 windows.
    """
    clips = cut_windows(pieces, window_s)
    if len(clips) < MIN_WINDOWS:
        raise UserError(
            f"statistics of real pieces need at least {MIN_WINDOWS} windows of {window_s:g} s, but {len(pieces)} "
            f"pieces gave {len(clips)}; add pieces"
        )
    x = _dimensions(clips, window_s)
    x = x[np.isfinite(x).all(axis=1)]
    least = np.array([deviation for _, deviation in DIMENSIONS.values()])
    unit = np.hypot(x.std(axis=0), least)
    location, scatter = _fit_student_t(x / unit, FREEDOM)
    feature = features(clips)
    stats = TypicalityStats(
        provenance=provenance,
        pieces=len(pieces),
        windows=len(clips),
        window_s=window_s,
        location=location * unit,
        scatter=scatter * np.outer(unit, unit) + np.diag(least**2),
        freedom=FREEDOM,
        median_notes=float(np.median(feature["distinct_notes"])),
        median_sounding_s=float(np.median(feature["sounding_s"])),
        median_log_likelihood=0.0,
    )
    median = float(np.median(log_likelihood(clips, stats)))
    return TypicalityStats(**{**vars(stats), "median_log_likelihood": median})


def log_likelihood(notes: NoteBatch, stats: TypicalityStats) -> np.ndarray:
    """Log-density of every clip's features, nats a feature, float64 [N], at least -6.

    The density is of the features in units of their own deviation, so that the value does not depend on whether pitch
    is counted in semitones or octaves. A clip without notes has -6.
    """
    deviation = np.sqrt(np.diag(stats.scatter))
    z = (_dimensions(notes, stats.window_s) - stats.location) / deviation
    factor = np.linalg.cholesky(stats.scatter / np.outer(deviation, deviation))
    f, freedom = len(deviation), stats.freedom
    constant = math.lgamma((freedom + f) / 2) - math.lgamma(freedom / 2) - f / 2 * math.log(freedom * math.pi)
    constant -= float(np.log(np.diag(factor)).sum())
    distance = (np.linalg.solve(factor, z.T) ** 2).sum(axis=0)
    value = (constant - (freedom + f) / 2 * np.log1p(distance / freedom)) / f
    return np.maximum(np.nan_to_num(value, nan=FLOOR), FLOOR)


def _dimensions(notes: NoteBatch, window_s: float) -> np.ndarray:
    """The features of `DIMENSIONS`, logarithms taken, float64 [N, F]; NaN in the rows of clips without notes."""
    feature = features(notes)
    feature["notes_per_window_second"] = feature["distinct_notes"] / window_s
    feature["silent_share"] = np.maximum(1.0 - feature["sounding_s"] / window_s, 0.0)
    with np.errstate(divide="ignore"):  # notes that last no time: -inf, and the floor
        columns = [
            feature[name] if offset is None else np.log(feature[name] + offset)
            for name, (offset, _) in DIMENSIONS.items()
        ]
    return np.stack(columns, axis=1)


def _fit_student_t(x: np.ndarray, freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Location [F] and scatter [F, F] of the t distribution most likely to give x [N, F], shrunk."""
    n, f = x.shape
    location = x.mean(axis=0)
    scatter = np.cov(x.T, bias=True)
    shrinkage = ledoit_wolf(x - location, scatter)
    for _ in range(EM_STEPS):
        scatter = (1 - shrinkage) * scatter + shrinkage * np.trace(scatter) / f * np.eye(f)
        y = x - location
        distance = np.einsum("nf,nf->n", y @ np.linalg.inv(scatter), y)
        weight = (freedom + f) / (freedom + distance)
        location = weight @ x / weight.sum()
        y = x - location
        scatter = (weight[:, None] * y).T @ y / n
    return location, (1 - shrinkage) * scatter + shrinkage * np.trace(scatter) / f * np.eye(f)


def _checked(content: dict[str, Any], path: str | Path, remedy: str) -> TypicalityStats:
    f = len(DIMENSIONS)
    try:
        values = {field.name: content[field.name] for field in fields(TypicalityStats)}
        location, scatter = np.array(values["location"], np.float64), np.array(values["scatter"], np.float64)
        numbers = {k: float(v) for k, v in values.items() if k not in ("provenance", "location", "scatter")}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} lacks a number it should hold ({error}); {remedy}") from error
    if location.shape != (f,) or scatter.shape != (f, f):
        raise UserError(f"{path} holds {location.shape} and {scatter.shape} numbers for {f} features; {remedy}")
    within = all((abs(np.array(v)) <= LARGEST).all() for v in (location, scatter, list(numbers.values())))
    positive = min(numbers[k] for k in ("window_s", "freedom", "median_notes", "median_sounding_s")) > 0
    if not within or not positive or not _is_covariance(scatter):
        raise UserError(f"{path} holds numbers no distribution has; {remedy}")
    whole: dict[str, Any] = {"pieces": int(numbers["pieces"]), "windows": int(numbers["windows"])}
    arrays = {"location": location, "scatter": scatter}
    return TypicalityStats(**{**numbers, **whole, **arrays, "provenance": str(values["provenance"])})


def _is_covariance(scatter: np.ndarray) -> bool:
    deviation = np.sqrt(np.maximum(np.diag(scatter), 0.0))
    if deviation.min() <= 0 or np.linalg.eigvalsh(scatter).min() <= 0:
        return False
    try:
        np.linalg.cholesky(scatter / np.outer(deviation, deviation))  # as `log_likelihood` takes it
    except np.linalg.LinAlgError:
        return False
    return True
