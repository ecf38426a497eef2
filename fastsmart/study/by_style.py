"""Each style by itself: its outputs' reward, how different they are, and how far from real pieces of the style.

Shape letters: N outputs, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastsmart.errors import UserError
from fastsmart.music.bootstrap import Draws, mean_draws
from fastsmart.music.features import features
from fastsmart.music.rarefied import SIZES, Sizes, effective_number, excerpt_similarities
from fastsmart.music.styles import StyleJudge
from fastsmart.notes import NoteBatch

REAL_WINDOWS = "real_windows"  # of a judge's `about`: `real_moments` of the windows it was tested on
COMPARED = (  # what velocity and tempo, which no style is to be known by, do not decide
    "notes_per_beat",
    "polyphony",
    "polyphony_rate",
    "empty_beat_rate",
    "scale_consistency",
    "pitch_range",
    "pitch_class_entropy",
    "mean_pitch",
    "mean_duration_beats",
    "repetition",
)
Moments = Mapping[str, Mapping[str, tuple[float, float]]]  # style -> feature -> mean and standard deviation


def known_moments(judge: object) -> Moments:
    """The `REAL_WINDOWS` of a judge; none where it has none.

    Raises UserError where they are no such table.
    """
    about = judge.about if isinstance(judge, StyleJudge) else {}
    try:
        return {
            str(style): {feature: (float(mean), float(deviation)) for feature, (mean, deviation) in table.items()}
            for style, table in about.get(REAL_WINDOWS, {}).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"the judge of styles has no table of means and deviations under {REAL_WINDOWS!r} ({error}); take it "
            "out of the judge's file, or use the judge of a release"
        ) from error


def real_moments(notes: NoteBatch, style: list[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation of the features `COMPARED` over the clips of each style."""
    measured, of = features(notes), np.array(style)
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for name in sorted(set(style)):
        rows = {feature: measured[feature][of == name] for feature in COMPARED}
        rows = {feature: values[np.isfinite(values)] for feature, values in rows.items()}
        table[name] = {
            feature: (round(float(values.mean()), 5), round(float(values.std()), 5))
            for feature, values in rows.items()
            if len(values) > 1 and values.std() > 1e-4
        }
    return table


def by_style(
    notes: NoteBatch, asked: list[str], reward: np.ndarray, weights: np.ndarray, real: Moments, sizes: Sizes = SIZES
) -> dict[str, Draws]:
    """Of the outputs asked for in each style their mean reward, effective number at equal size, and distance to real
    windows: the mean over `COMPARED` of the difference of means, in standard deviations of the windows.

    notes   : of N outputs
    reward  : float [N], NaN where it could not be told
    weights : of `resample_weights`
    real    : of the styles whose windows are known
    """
    measured, of, found = features(notes), np.array(asked), {}
    for style in sorted(set(asked) - {""}):
        chosen = np.flatnonzero(of == style)
        own = weights[:, chosen]
        found[f"reward of {style}"] = mean_draws(reward[chosen], own)
        excerpts, similar, _ = excerpt_similarities(notes.select(chosen), sizes)
        found[f"effective outputs within {style}"] = effective_number(similar, excerpts.known, own)
        if moments := real.get(style):
            moments = {feature: moments[feature] for feature in COMPARED if moments.get(feature, (0.0, 0.0))[1] > 0}
            means = {feature: mean_draws(measured[feature][chosen], own) for feature in moments}
            off = [
                np.abs(np.append(means[feature].value, means[feature].draws) - mean) / deviation
                for feature, (mean, deviation) in moments.items()
            ]
            distance = np.mean(off, axis=0)
            found[f"distance of {style} to its real windows"] = Draws(float(distance[0]), distance[1:])
    return found
