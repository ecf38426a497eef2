"""Faults that a listener would hear, found in numbers: a check of audio for ears against its notes.

Shape letters: T samples, M notes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsmart.audio.events import SILENCE
from fastsmart.audio.loudness import loudness_lufs

FULL_SCALE = 1.0 - 2.0**-14  # what a 16-bit file has of 1, and a little less
CLIPPED_RUN = 3  # samples at full scale, one after the other; a wave that only touches it has fewer
LOUDNESS_LU = 0.5
SWELL_S = 0.25  # after the end of its score a piece may be loudest: what is struck last, or under the pedal, swells
END_S = 0.01  # of a tail that has to be quiet


@dataclass(frozen=True)
class Hearing:
    """Tolerances within which audio is held to its notes.

    lead_s     : sound may begin so long before the first note
    silence    : the loudest sample that counts as silence, of a full scale of 1
    peak       : range of the loudest sample, where the peak was asked for; None = any level
    lufs       : integrated loudness that was asked for; None = any
    tail       : the audio goes on past its score until it is quiet
    quiet      : the loudest sample at the end of such a tail, as a share of the loudest of all
    """

    lead_s: float = 0.0
    silence: float = SILENCE
    peak: tuple[float, float] | None = (0.999, 1.0)
    lufs: float | None = None
    tail: bool = True
    quiet: float = 10 ** (-80 / 20)


LOSSLESS = Hearing()
# an encoder like MP3's spreads sound over a block of 1,152 samples, and its levels are near those asked for
LOSSY = Hearing(lead_s=0.03, silence=10 ** (-60 / 20), peak=(0.9, 1.0), quiet=10 ** (-60 / 20))


def audible_faults(
    samples: np.ndarray, rate_hz: int, onset_s: np.ndarray, end_s: float, hearing: Hearing = LOSSLESS
) -> list[str]:
    """Sentences on what is wrong with a clip, float [T] or [T, 2] in -1..1; empty where nothing is.

    onset_s : [M], seconds at which notes start within the clip
    end_s   : where the score ends, or the clip is cut
    """
    if not len(samples):
        return ["there are no samples"]
    if not np.isfinite(samples).all():
        return ["some samples are not finite"]
    level = np.abs(samples).reshape(len(samples), -1).max(axis=1)
    if len(onset_s) == 0:
        return [f"there are no notes, but a sample of {level.max():.4f}"] if level.max() > hearing.silence else []
    if level.max() <= hearing.silence:
        return [f"all is silent, of {len(onset_s)} notes"]
    found = _levels(samples, level, rate_hz, hearing)
    first = int((float(onset_s.min()) - hearing.lead_s) * rate_hz)
    if first > 0 and (early := float(level[:first].max())) > hearing.silence:
        at_s = float(level[:first].argmax()) / rate_hz
        found.append(f"a sample of {early:.4f} at {at_s:.3f} s, before the first note at {onset_s.min():.3f} s")
    at_s = float(level.argmax()) / rate_hz
    if not onset_s.min() - hearing.lead_s <= at_s <= end_s + SWELL_S:
        found.append(f"the loudest sample is at {at_s:.3f} s, outside the music ({onset_s.min():.3f} to {end_s:.3f} s)")
    if len(samples) < int(end_s * rate_hz):
        found.append(f"it lasts {len(samples) / rate_hz:.3f} s, and its notes {end_s:.3f} s")
    end = float(level[-max(round(END_S * rate_hz), 1) :].max()) / float(level.max())
    if hearing.tail and end > hearing.quiet:
        found.append(f"it breaks off at {20 * np.log10(end):.0f} dB of its peak")
    return found


def _levels(samples: np.ndarray, level: np.ndarray, rate_hz: int, hearing: Hearing) -> list[str]:
    found, peak = [], float(level.max())
    full = np.concatenate([[0], np.cumsum(level >= FULL_SCALE)])
    if peak > 1.0 or (full[CLIPPED_RUN:] - full[:-CLIPPED_RUN] == CLIPPED_RUN).any():
        found.append(f"it is clipped: its peak is {peak:.4f}, {full[-1]} samples are at full scale")
    if hearing.peak and not hearing.peak[0] <= peak <= hearing.peak[1]:
        found.append(f"its peak is {peak:.4f}, and {hearing.peak[0]:g} to {hearing.peak[1]:g} was asked for")
    if hearing.lufs is not None and abs((lufs := loudness_lufs(samples, rate_hz)) - hearing.lufs) > LOUDNESS_LU:
        found.append(f"its loudness is {lufs:.1f} LUFS, and {hearing.lufs:.1f} was asked for")
    return found
