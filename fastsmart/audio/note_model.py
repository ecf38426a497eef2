"""Sound of one key of a soundfont, measured: its distinct held notes, its gains, how fast it dies away.

A dry FluidSynth note is gain(velocity) x held note until it is released, and from there on, in a font whose filters
stand still, the same held note under a falling exponential: FluidSynth's release is linear in decibels, and so is the
decay of the held note that it takes the place of. So little has to be stored: one waveform for all velocities that
differ in level only, and rates of decay. In a font that moves a filter when a key is let go, or with every velocity,
this fails, and `fastsmart.audio.bank` finds out by listening to both.

Shape letters: V velocities, P phases, T samples of a phase, G lengths held.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from fastsmart.audio.events import BLOCK
from fastsmart.audio.fluidsynth import FluidSynthRenderer
from fastsmart.audio.resample import resample
from fastsmart.audio.settings import SYNTH_HZ

MIN_NOTE_BLOCKS = 8  # FluidSynth's synth.min-note-length of 10 ms, up to its next block
LEAD = 16  # samples a stored note begins before its onset, for the resampling filter rings on both sides of it
SAME = 1e-3  # notes count as one when the difference has less than this share of the amplitude: 60 dB
PROBE_HELD, PROBE_BLOCKS = 16, 48  # blocks: 21 ms held and 43 ms of release tell velocities apart
# FluidSynth's envelopes take whole centibels, the part of one cut off: a falling one is half a step late in the mean
LAG = 0.5 * np.log(10.0) / 200.0  # nepers
FIT_BLOCKS = 375  # of a tail, half a second, are fitted
TYPICAL = 4  # of the lengths below the one, 0.2 s, whose rebuilt note says how good a tone is
# how long a note was held when its decay is measured, blocks
HELD_BLOCKS = np.array([8, 16, 36, 75, 150, 262, 375, 562, 750, 1125, 1500, 2250, 3000, 4500, 6000, 9000, 18000])


@dataclass(frozen=True)
class VelocityLayers:
    """Relation of a key's velocities, int64 [128] and float64 [128]; velocities that are silent have gain 0.

    held    : the velocities that play one held note at different levels, named by the highest of them
    release : of those, the ones that also fall alike once released, named by the highest of them
    gain    : level against the velocity `held`
    """

    held: np.ndarray
    release: np.ndarray
    gain: np.ndarray


@dataclass(frozen=True)
class Tone:
    """One held note at one sample rate, and how it falls.

    samples : int16 [P, T], full scale; phase p begins p blocks after a whole step, and LEAD samples early
    level   : what a sample of 1 stands for
    decay   : float32 [G], rate at which a tail falls against the held note, nepers a block, by the length held
    faster  : float32 [128], what the release of each velocity adds to it; 0 for those of other held notes
    snr_db  : of a note held for 0.2 s rebuilt from this, against FluidSynth's
    """

    samples: np.ndarray
    level: float
    decay: np.ndarray
    faster: np.ndarray
    snr_db: float


def phases(sample_rate: int) -> tuple[int, int]:
    """P and S: a note P blocks of the synth later is the same samples, S later; notes in between have other samples."""
    p = SYNTH_HZ // gcd(BLOCK * sample_rate, SYNTH_HZ)
    return p, p * BLOCK * sample_rate // SYNTH_HZ


def velocity_layers(renderer: FluidSynthRenderer, key: int) -> VelocityLayers:
    """Find out which velocities of a key differ in level only."""
    notes = np.zeros((128, PROBE_BLOCKS * BLOCK))
    notes[1:] = renderer.strike(key, range(1, 128), PROBE_HELD, PROBE_BLOCKS)
    # in its first block a note still has the panning of the slot's last one, so that block is left out
    body, tail = notes[:, BLOCK : PROBE_HELD * BLOCK], notes[:, PROBE_HELD * BLOCK :]
    held, release, gain = np.zeros(128, np.int64), np.zeros(128, np.int64), np.zeros(128)
    for velocity in range(127, 0, -1):
        energy = float(body[velocity] @ body[velocity])
        if energy == 0.0:
            continue
        held[velocity], release[velocity], gain[velocity] = velocity, velocity, 1.0
        for anchor in np.unique(held[velocity + 1 :])[::-1]:
            if anchor and _differ(body[velocity], body[anchor], energy) < SAME**2:
                held[velocity], gain[velocity] = anchor, body[velocity] @ body[anchor] / (body[anchor] @ body[anchor])
                break
        mine = tail[velocity] / gain[velocity]
        for other in np.unique(release[velocity + 1 :][held[velocity + 1 :] == held[velocity]])[::-1]:
            if ((tail[other] / gain[other] - mine) ** 2).sum() < SAME**2 * (mine @ mine):
                release[velocity] = other
                break
    return VelocityLayers(held, release, gain)


def _differ(one: np.ndarray, other: np.ndarray, energy: float) -> float:
    """Rest of one signal, as a share of its energy, without the other one at any level."""
    residue = one - (one @ other) / (other @ other) * other
    return float(residue @ residue) / energy


def measure(
    renderer: FluidSynthRenderer, key: int, anchor: int, kinds: VelocityLayers, sample_rate: int, seconds: float
) -> Tone:
    """Measure the held note that velocity `anchor` of a key plays, up to `seconds` long."""
    blocks = int(np.ceil(seconds * SYNTH_HZ / BLOCK)) + 1  # one more for the resampling filter to look ahead
    grid = HELD_BLOCKS[: max(int(np.searchsorted(HELD_BLOCKS, blocks - FIT_BLOCKS)), 1)]
    whole = renderer.strike(key, [anchor], blocks, blocks)[0].astype(np.float64)
    mine = kinds.held == anchor
    middle = int(grid[len(grid) // 3])
    fits = {int(v): _fit(renderer, key, int(v), whole, middle, kinds.gain[v]) for v in np.unique(kinds.release[mine])}
    slowest = min(fits, key=lambda v: fits[v][0])  # it is heard longest, so it tells most
    curve = [_fit(renderer, key, slowest, whole, int(held), kinds.gain[slowest]) for held in grid]
    faster = np.zeros(128, np.float32)
    for velocity in np.flatnonzero(mine):
        faster[velocity] = fits[int(kinds.release[velocity])][0] - fits[slowest][0]
    samples, level = _stored(whole, sample_rate)
    decay = np.interp(HELD_BLOCKS, grid, [rate for rate, _ in curve]).astype(np.float32)
    return Tone(samples, level, decay, faster, curve[min(TYPICAL, len(curve) - 1)][1])


def _fit(
    renderer: FluidSynthRenderer, key: int, velocity: int, whole: np.ndarray, off: int, gain: float
) -> tuple[float, float]:
    """Rate in nepers a block that best turns a held note into one released at block `off`, and the note's SNR in dB."""
    played = renderer.strike(key, [velocity], off, min(off + FIT_BLOCKS, len(whole) // BLOCK))[0] / gain
    tail, held = played[off * BLOCK :], whole[off * BLOCK : len(played)]
    time = np.arange(len(tail)) / BLOCK
    begin = slice(0, 8 * BLOCK)
    energy = held[begin] @ held[begin]
    if energy == 0.0:
        return 0.0, np.inf
    rate = max(-np.log(max(held[begin] @ tail[begin] / energy, 1e-6)) / 4, 1e-4)
    for _ in range(8):  # Gauss-Newton
        fall = np.maximum(rate * time - LAG, 0.0)
        model = held * np.exp(-fall)
        slope = np.where(fall > 0.0, -time * model, 0.0)
        step = slope @ (tail - model) / max(slope @ slope, 1e-300)
        rate = max(rate + float(np.clip(step, -rate / 2, rate)), 1e-5)
        if abs(step) < 1e-7:
            break
    error = tail - held * np.exp(-np.maximum(rate * time - LAG, 0.0))
    return rate, float(10 * np.log10((played @ played) / max(error @ error, 1e-300)))


def _stored(held: np.ndarray, sample_rate: int) -> tuple[np.ndarray, float]:
    """A held note at the synth's rate as int16 [P, T] at the clip's, cut where it is silent, and its full scale."""
    count, step = phases(sample_rate)
    silence = np.zeros(count * BLOCK)
    shifted = [np.concatenate([silence, np.zeros(p * BLOCK), held]) for p in range(count)]
    resampled = [resample(x, SYNTH_HZ, sample_rate)[step - LEAD :] for x in shifted]
    wave = np.stack([x[: len(resampled[0])] for x in resampled])
    level = max(float(np.abs(wave).max()), 1e-30) / np.iinfo(np.int16).max
    samples = np.rint(wave / level).astype(np.int16)
    sounding = np.flatnonzero(samples.any(axis=0))
    length = int(sounding[-1]) + 1 if len(sounding) else LEAD
    return np.ascontiguousarray(samples[:, :length]), level
