"""Writes a soundfont of a few kilobytes: two velocity layers of one looped waveform each, that decay and release.

A stereo one plays each waveform in two voices, left and right, a little out of phase.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

RATE_HZ = 22050
LOOP = 100  # samples: A3 at 220.5 Hz
ROOT_KEY = 57
PARTIALS = ((1.0, 0.3, 0.1), (1.0, 0.0, 0.6, 0.3))  # of the soft and of the loud layer
SPLIT = 64  # the first velocity of the loud layer
APART = 0.2  # of a cycle, between the channels of a stereo font
# SF2.04 generator numbers
ATTACK, HOLD, DECAY, SUSTAIN, RELEASE, CUTOFF, MOD_TO_CUTOFF, MOD_RELEASE = 34, 35, 36, 37, 38, 8, 11, 30
PAN, LEFT, RIGHT = 17, -500, 500
INSTRUMENT, KEY_RANGE, VELOCITY_RANGE, SAMPLE_MODE, SAMPLE, ROOT = 41, 43, 44, 54, 53, 58


def write_soundfont(path: Path, release_s: float = 0.3, moving_filter: bool = False, stereo: bool = False) -> Path:
    """Program 0 of bank 0 on all keys; with `moving_filter` a low-pass opens when a key is let go."""
    pans = (LEFT, RIGHT) if stereo else (0,)
    samples, headers = [], b""
    for name, partials, pan in _voices(pans):
        phase = 2 * np.pi * (np.arange(4 * LOOP) / LOOP + APART * (pan == RIGHT))
        wave = sum(a * np.sin((k + 1) * phase) for k, a in enumerate(partials))
        begin = sum(map(len, samples))
        samples.append(np.concatenate([np.rint(wave / 2 * 30000), np.zeros(46)]).astype("<i2"))
        ends = begin + 4 * LOOP, begin + LOOP, begin + 3 * LOOP  # of the sample; start and end of its loop
        headers += struct.pack("<20s5IBbHH", name, begin, *ends, RATE_HZ, ROOT_KEY, 0, 0, 1)
    headers += struct.pack("<20s5IBbHH", b"EOS", 0, 0, 0, 0, 0, 0, 0, 0, 0)
    zones = []
    for sample, (name, _, pan) in enumerate(_voices(pans)):
        layer = int(name == b"loud")
        low, high = ((0, SPLIT - 1), (SPLIT, 127))[layer]
        zone = [_range(KEY_RANGE, 0, 127), _range(VELOCITY_RANGE, low, high), _number(PAN, pan)]
        zone += [_number(HOLD, _timecents(0.2)), _number(DECAY, _timecents(6.0)), _number(SUSTAIN, 960)]
        zone += [_number(RELEASE, _timecents(release_s * (1 + layer)))]
        if moving_filter:
            zone += [
                _number(CUTOFF, 6000),
                _number(MOD_TO_CUTOFF, 7000),
                _number(26, -1000),
                _number(MOD_RELEASE, -3000),
            ]
        zones.append([*zone, _number(SAMPLE_MODE, 1), _number(ROOT, ROOT_KEY), _number(SAMPLE, sample)])
    bags = np.cumsum([0, *map(len, zones)])
    pdta = _list(
        b"pdta",
        _chunk(b"phdr", _preset(b"tiny", 0, 0) + _preset(b"EOP", 0, 1)),
        _chunk(b"pbag", struct.pack("<4H", 0, 0, 1, 0)),
        _chunk(b"pmod", bytes(10)),
        _chunk(b"pgen", _number(INSTRUMENT, 0) + bytes(4)),
        _chunk(b"inst", struct.pack("<20sH20sH", b"tiny", 0, b"EOI", len(zones))),
        _chunk(b"ibag", b"".join(struct.pack("<2H", int(bag), 0) for bag in bags)),
        _chunk(b"imod", bytes(10)),
        _chunk(b"igen", b"".join(map(b"".join, zones)) + bytes(4)),
        _chunk(b"shdr", headers),
    )
    info = _list(
        b"INFO", _chunk(b"ifil", struct.pack("<2H", 2, 4)), _chunk(b"isng", b"EMU8000\0"), _chunk(b"INAM", b"tiny")
    )
    sdta = _list(b"sdta", _chunk(b"smpl", np.concatenate(samples).tobytes()))
    path.write_bytes(_chunk(b"RIFF", b"sfbk" + info + sdta + pdta))
    return path


def _voices(pans: tuple[int, ...]) -> list[tuple[bytes, tuple[float, ...], int]]:
    """Name of the layer, partials and place of every voice of the font."""
    return [(name, partials, pan) for name, partials in zip((b"soft", b"loud"), PARTIALS, strict=True) for pan in pans]


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _list(kind: bytes, *chunks: bytes) -> bytes:
    return _chunk(b"LIST", kind + b"".join(chunks))


def _preset(name: bytes, number: int, bag: int) -> bytes:
    return struct.pack("<20s3H3I", name, number, 0, bag, 0, 0, 0)


def _number(generator: int, amount: int) -> bytes:
    return struct.pack("<Hh", generator, amount)


def _range(generator: int, low: int, high: int) -> bytes:
    return struct.pack("<HBB", generator, low, high)


def _timecents(seconds: float) -> int:
    return round(1200 * np.log2(seconds))
