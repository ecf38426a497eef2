"""The mixdown: a clip is a sum of stored notes, each times its gain, and times a falling exponential once released.

Shape letters: N clips, M notes, C pedal changes, T samples of a clip, E stored notes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from fastsmart.audio.events import BLOCK, PEAK_FLOOR
from fastsmart.audio.note_model import HELD_BLOCKS, LAG, LEAD, MIN_NOTE_BLOCKS

INAUDIBLE = 100.0 / 20.0 * np.log(10.0)  # nepers: a tail ends when it has fallen by 100 dB
STRIDE = 32  # samples of a tail that share one table of powers
SILENT, MISSING, UNFIT = -1, -2, -3  # in `Tables.note_of`: nothing to hear, not stored, to be rendered on demand
_KEYS = 128
NEVER = 2**40  # blocks: the release of a note that the pedal still holds at the end


class Tables(NamedTuple):
    """Contents of a bank as arrays that a compiled function takes in.

    waves   : int16 [all samples]
    offset, length : int64 [E], where a stored note's first phase begins in `waves`, and the samples of a phase
    decay   : float32 [E, G], see `Tone.decay`
    note_of : int32 [128, 128] by key and velocity: the stored note, or one of the three above
    gain, faster : float32 [128, 128], see `Tone`
    phases, step : see `tone.phases`
    """

    waves: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    decay: np.ndarray
    note_of: np.ndarray
    gain: np.ndarray
    faster: np.ndarray
    phases: int
    step: int


class Slices(NamedTuple):
    """A clip as M slices of stored notes.

    start  : int64 [M], sample of the clip where a slice begins; may be negative
    wave   : int64 [M], where it begins in `Tables.waves`
    length : int64 [M], samples it has until its tail is inaudible
    hold   : float64 [M], samples until it is released, from its beginning
    gain   : float32 [M]
    rate   : float32 [M], nepers a sample at which it falls from there on
    """

    start: np.ndarray
    wave: np.ndarray
    length: np.ndarray
    hold: np.ndarray
    gain: np.ndarray
    rate: np.ndarray


@njit(cache=True, nogil=True)
def _order(at: np.ndarray) -> np.ndarray:
    """The stable order of times, int64 [M]; most come in order."""
    for i in range(1, len(at)):
        if at[i] < at[i - 1]:
            return np.argsort(at, kind="mergesort")
    return np.arange(len(at))


@njit(cache=True, nogil=True)
def pair(
    start: np.ndarray, stop: np.ndarray, pitch: np.ndarray, pedal_at: np.ndarray, pedal_down: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks at which FluidSynth takes up each note's start and its release, int64 [M] each.

    Its rule: striking a sounding key releases the earlier note, and the first note-off of the key from then on ends the
    new one; while the pedal is down both hand the note to the pedal instead; no note ends within 10 ms.
    """
    m, c = len(start), len(pedal_at)
    ends, pedalling, begins = _order(stop), _order(pedal_at), _order(start)
    on, off = np.empty(m, np.int64), np.full(m, NEVER)
    sounding = np.full(_KEYS, -1)
    pedalled, waiting = np.empty(m, np.int64), 0  # notes that the pedal holds, and their number
    down = False
    ended = changed = begun = 0
    for _ in range(2 * m + c):  # at one sample notes end first, then the pedal moves, then notes begin
        end = stop[ends[ended]] if ended < m else NEVER
        change = pedal_at[pedalling[changed]] if changed < c else NEVER
        begin = start[begins[begun]] if begun < m else NEVER
        if change < end and change <= begin:
            down = pedal_down[pedalling[changed]]
            if not down:
                for w in range(waiting):
                    off[pedalled[w]] = -(-change // BLOCK)
                waiting = 0
            changed += 1
            continue
        ends_one = end <= begin
        note = ends[ended] if ends_one else begins[begun]
        block = -(-min(end, begin) // BLOCK)
        key = pitch[note]
        before = sounding[key]
        if before >= 0 and down:
            pedalled[waiting] = before
            waiting += 1
        elif before >= 0:
            off[before] = block
        if ends_one:
            sounding[key] = -1
            ended += 1
        else:
            sounding[key] = note
            on[note] = block
            begun += 1
    for note in range(m):
        off[note] = max(off[note], on[note] + MIN_NOTE_BLOCKS)
    return on, off


@njit(cache=True, nogil=True)
def slice_notes(on: np.ndarray, off: np.ndarray, pitch: np.ndarray, velocity: np.ndarray, tables: Tables) -> Slices:
    """The slices of a clip, from the blocks that `pair` gives; notes that are silent have length 0."""
    m = len(on)
    start, wave, length = np.empty(m, np.int64), np.zeros(m, np.int64), np.zeros(m, np.int64)
    hold, gain, rate = np.empty(m), np.zeros(m, np.float32), np.zeros(m, np.float32)
    block = tables.step / tables.phases  # samples of the clip
    last = len(HELD_BLOCKS) - 1
    for i in range(m):
        phase = on[i] % tables.phases
        start[i] = on[i] // tables.phases * tables.step - LEAD
        held = off[i] - on[i]
        hold[i] = LEAD + (phase + held) * block
        entry = tables.note_of[pitch[i], velocity[i]]
        if entry < 0:
            continue
        wave[i] = tables.offset[entry] + phase * tables.length[entry]
        length[i] = tables.length[entry]
        gain[i] = tables.gain[pitch[i], velocity[i]]
        g = 0
        while g < last and HELD_BLOCKS[g + 1] <= held:
            g += 1
        decay = tables.decay[entry, g]
        if g < last and held > HELD_BLOCKS[g]:
            share = (held - HELD_BLOCKS[g]) / (HELD_BLOCKS[g + 1] - HELD_BLOCKS[g])
            decay += share * (tables.decay[entry, g + 1] - decay)
        rate[i] = max((decay + tables.faster[pitch[i], velocity[i]]) / block, 1e-9)
        hold[i] += min(LAG / rate[i], block)
        length[i] = min(length[i], int(hold[i] + INAUDIBLE / rate[i]))
    return Slices(start, wave, length, hold, gain, rate)


@njit(cache=True, nogil=True, error_model="numpy")
def mix(out: np.ndarray, slices: Slices, waves: np.ndarray) -> None:
    """Add the slices to `out`, float32 [T], in their order."""
    powers = np.empty(STRIDE, np.float32)
    for i in range(len(slices.start)):
        start, gain, rate = slices.start[i], slices.gain[i], slices.rate[i]
        wave = waves[slices.wave[i] : slices.wave[i] + slices.length[i]]
        first = max(0, -start)
        end = min(len(wave), len(out) - start)
        released = int(min(np.ceil(slices.hold[i]), end))
        for n in range(first, released):
            out[start + n] += gain * wave[n]
        if released == end:
            continue
        for j in range(STRIDE):
            powers[j] = np.exp(-rate * np.float32(j))
        leap = np.exp(-rate * np.float32(STRIDE))
        n = max(released, first)
        level = gain * np.float32(np.exp(-rate * (n - slices.hold[i])))
        while n < end:
            for j in range(min(STRIDE, end - n)):
                out[start + n + j] += level * powers[j] * wave[n + j]
            level *= leap
            n += STRIDE


@njit(cache=True, nogil=True)
def mix_clip(
    out: np.ndarray,
    length: int,
    start: np.ndarray,
    stop: np.ndarray,
    pitch: np.ndarray,
    velocity: np.ndarray,
    pedal_at: np.ndarray,
    pedal_down: np.ndarray,
    tables: Tables,
    peak: bool,
) -> None:
    """Fill `out`, float32 [T], with one clip of `length` samples, zeros after it; with `peak` its maximum becomes 1."""
    on, off = pair(start, stop, pitch, pedal_at, pedal_down)
    out[:] = 0.0
    clip = out[:length]
    mix(clip, slice_notes(on, off, pitch, velocity, tables), tables.waves)
    if peak:
        top = np.float32(0.0)
        for n in range(length):
            top = max(top, abs(clip[n]))
        scale = np.float32(1.0) / (top + np.float32(PEAK_FLOOR))
        for n in range(length):
            clip[n] *= scale


@njit(cache=True, nogil=True)
def slice_clips(
    start: np.ndarray,
    stop: np.ndarray,
    pitch: np.ndarray,
    velocity: np.ndarray,
    offsets: np.ndarray,
    pedal_at: np.ndarray,
    pedal_down: np.ndarray,
    pedal_offsets: np.ndarray,
    tables: Tables,
) -> Slices:
    """The slices of N clips, one after the other; `offsets` int64 [N + 1] say which notes are whose."""
    m = len(start)
    out = Slices(
        np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int64),
        np.empty(m), np.empty(m, np.float32), np.empty(m, np.float32),
    )  # fmt: skip
    for clip in range(len(offsets) - 1):
        a, b = offsets[clip], offsets[clip + 1]
        c, d = pedal_offsets[clip], pedal_offsets[clip + 1]
        on, off = pair(start[a:b], stop[a:b], pitch[a:b], pedal_at[c:d], pedal_down[c:d])
        part = slice_notes(on, off, pitch[a:b], velocity[a:b], tables)
        out.start[a:b], out.wave[a:b], out.length[a:b] = part.start, part.wave, part.length
        out.hold[a:b], out.gain[a:b], out.rate[a:b] = part.hold, part.gain, part.rate
    return out
