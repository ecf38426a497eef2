"""Where the tests get token sequences from: garbage, nearly music, and music made here or found on this machine.

Everything is seeded; lengths are numbers of tokens.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import mido
import numpy as np

from fastsmart.tokens.dataset import encode_midi
from fastsmart.tokens.vocabulary import Vocabulary

POP909 = Path(os.environ.get("FASTSMART_POP909", Path(__file__).parents[3] / "shared" / "data" / "pop909.tar.xz"))


def garbage(vocab: Vocabulary, n: int, max_length: int, seed: int) -> list[list[int]]:
    """n sequences of uniformly random ids, some of them empty."""
    random = np.random.default_rng(seed)
    return [random.integers(len(vocab), size=random.integers(max_length + 1)).tolist() for _ in range(n)]


def nearly_music(vocab: Vocabulary, n: int, max_length: int, seed: int, errors: float = 0.06) -> list[list[int]]:
    """n walks through bars, positions, tempi, time signatures and notes, in any order and with tokens lost, doubled or
    replaced at the given rate: every branch of a decoder many times over."""
    random = np.random.default_rng(seed)
    music = ("Bar", "Position", "Tempo", "TimeSig", "Pitch", "Velocity", "Duration")
    ids = {kind: vocab.ids_of(kind) for kind in music}
    special = [i for i, token in enumerate(vocab.tokens) if token.split("_")[0] not in music]
    phrases = [
        *[("Bar",)] * 2,
        ("Bar", "TimeSig", "Position"),
        *[("Position", "Pitch", "Velocity", "Duration")] * 6,
        *[("Pitch", "Velocity", "Duration")] * 4,
        ("Position", "Tempo"),
        ("Tempo",),
        ("TimeSig",),
    ]
    sequences = []
    for _ in range(n):
        length, sequence = int(random.integers(max_length + 1)), []
        while len(sequence) < length:
            phrase = phrases[random.integers(len(phrases))]
            sequence += [ids[kind][random.integers(len(ids[kind]))] for kind in phrase if ids[kind]]
            error = random.random() / errors
            if error < 1 and sequence:
                sequence.pop()
            if error < 0.5:
                sequence.append(int(random.integers(len(vocab))))
            if error < 0.25:
                sequence.append(special[random.integers(len(special))])
        sequences.append(sequence[:length])
    return sequences


def write_piece(path: Path, seed: int, bars: int = 12) -> None:
    """A MIDI file of chords and runs over changing tempi and time signatures, with a drum track to be left out."""
    random = np.random.default_rng(seed)
    file = mido.MidiFile(type=1, ticks_per_beat=480)
    events: list[tuple[int, int, mido.Message | mido.MetaMessage]] = []
    start = 0
    for bar in range(bars):
        if bar == 0 or random.random() < 0.25:
            numerator, denominator = [(4, 4), (3, 4), (6, 8), (2, 2), (5, 8)][random.integers(5)]
            meter = mido.MetaMessage("time_signature", numerator=numerator, denominator=denominator)
            events.append((start, 0, meter))
        length = 480 * 4 * numerator // denominator
        if bar == 0 or random.random() < 0.3:
            tempo = mido.bpm2tempo(float(random.uniform(45, 220)))
            at = start + (0 if bar == 0 else int(random.integers(length)))
            events.append((at, 0, mido.MetaMessage("set_tempo", tempo=tempo)))
        for _ in range(random.integers(2, 12)):
            onset, pitch = start + int(random.integers(length)), int(random.integers(21, 109))
            on = mido.Message("note_on", note=pitch, velocity=int(random.integers(1, 128)))
            events.append((onset, 2, on))
            events.append((onset + int(random.integers(1, 2400)), 1, mido.Message("note_off", note=pitch)))
        events.append((start, 2, mido.Message("note_on", channel=9, note=36, velocity=100)))
        events.append((start + 60, 1, mido.Message("note_off", channel=9, note=36)))
        start += length
    track, now = mido.MidiTrack(), 0
    for tick, _, message in sorted(events, key=lambda event: event[:2]):
        track.append(message.copy(time=tick - now))
        now = tick
    file.tracks.append(track)
    file.save(str(path))


def synthetic_pieces(vocab: Vocabulary, n: int, folder: Path, seed: int) -> list[np.ndarray]:
    """n pieces of `write_piece`, encoded by MidiTok."""
    pieces = []
    for i in range(n):
        write_piece(folder / f"piece-{seed}-{i}.mid", seed * 10_000 + i)
        pieces.append(encode_midi(folder / f"piece-{seed}-{i}.mid", vocab))
    return pieces


def real_pieces(vocab: Vocabulary, n: int, folder: Path) -> list[np.ndarray]:
    """The first n pieces of POP909, encoded by MidiTok; the archive must be there."""
    pieces: list[np.ndarray] = []
    with tarfile.open(POP909) as archive:
        for member in archive:
            if member.name.endswith(".mid") and len(pieces) < n:
                archive.extract(member, folder, filter="data")
                pieces.append(encode_midi(folder / member.name, vocab))
    return pieces


def windows(pieces: list[np.ndarray], n: int, max_length: int, seed: int) -> list[np.ndarray]:
    """n stretches of the pieces, beginning anywhere, also in the middle of a note."""
    random = np.random.default_rng(seed)
    cuts = []
    for _ in range(n):
        piece = pieces[random.integers(len(pieces))]
        start = int(random.integers(len(piece)))
        cuts.append(piece[start : start + int(random.integers(1, max_length + 1))])
    return cuts
