"""MIDI text format (MTF), as CLaMP 2 and 3 read MIDI, and the patches it is cut into; from notes, without a file.

A line a message: its type, then its numbers; the time is in ticks since the message before. Lines of one type are
merged into patches of at most 64 characters (Wu et al. 2024, arXiv 2410.13267).

Which messages end notes changes every patch and how many there are, so what is compared must have one writer: ours has
one track on channel 0 with 480 ticks a beat, the tempi and meters of the notes, and no pedal.

Shape letters: M messages, P patches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.notes import DEFAULT_BPM, MIDI_TICKS_PER_BEAT, NoteBatch, parse_midi, ticks_to_seconds
from fastsmart.reward.settings import CLAMP_WRITERS

PATCH = 64  # characters
PAD, BOS, EOS = 0, 1, 2  # ids beside the codes of ASCII
# messages of a file that CLaMP 2 leaves out, with their time
_LEFT_OUT = {
    *("text", "copyright", "track_name", "instrument_name", "lyrics", "marker", "cue_marker", "device_name"),
    *("sequencer_specific", "sysex"),
}
_META, _NOTE_END, _NOTE_START = range(3)  # their order at one tick


def notes_text(notes: NoteBatch, i: int, writer: str = "note_on") -> str:
    """MTF of piece i; of what `NoteBatch.to_midi` writes where `writer` is "note_off", but for the pedal.

    A note that was cut in seconds, as clips are, ends there, though its ticks go on.

    writer : how a note ends: "note_on" = with a note_on of velocity 0, which makes half as many patches; "note_off"
    """
    if writer not in CLAMP_WRITERS:
        raise ValueError(f"writer is {writer!r}; it is one of {', '.join(CLAMP_WRITERS)}")
    scale = MIDI_TICKS_PER_BEAT / notes.ticks_per_beat
    rows = notes.rows(i)
    tempi = slice(int(notes.tempo_offsets[i]), int(notes.tempo_offsets[i + 1]))
    meters = slice(int(notes.meter_offsets[i]), int(notes.meter_offsets[i + 1]))
    start = notes.onset_tick[rows].astype(np.int64)
    ticks = (notes.tempo_tick[tempi], notes.meter_tick[meters], start, _end_ticks(notes, i))
    tick = np.rint(np.concatenate(ticks) * scale).astype(np.int64)
    rank = np.repeat((_META, _META, _NOTE_START, _NOTE_END), [len(t) for t in ticks])
    pitches = notes.pitch[rows].tolist()
    fields = [f"{round(60e6 / bpm)}" for bpm in notes.tempo_bpm[tempi].tolist()]
    fields += [f"{numerator} {denominator} 24 8" for numerator, denominator in notes.meter[meters].tolist()]
    fields += [f"0 {pitch} {v}" for pitch, v in zip(pitches, notes.velocity[rows].tolist(), strict=True)]
    fields += [f"0 {pitch} 0" for pitch in pitches]
    kinds = ["set_tempo"] * len(ticks[0]) + ["time_signature"] * len(ticks[1])
    kinds += ["note_on"] * len(start) + [writer] * len(start)
    order = np.lexsort((rank, tick))
    deltas = np.diff(tick[order], prepend=0).tolist()
    lines = [f"ticks_per_beat {MIDI_TICKS_PER_BEAT}"]
    for k, delta in zip(order.tolist(), deltas, strict=True):
        is_meta = k < len(ticks[0]) + len(ticks[1])
        lines.append(f"{kinds[k]} {fields[k]} {delta}" if is_meta else f"{kinds[k]} {delta} {fields[k]}")
    return "\n".join([*lines, "end_of_track 0"])


def _end_ticks(notes: NoteBatch, i: int) -> np.ndarray:
    """Tick at which each note of piece i is heard to end, at least one after its onset, int64."""
    rows = notes.rows(i)
    tempi = slice(int(notes.tempo_offsets[i]), int(notes.tempo_offsets[i + 1]))
    tempo_tick, tempo_bpm = notes.tempo_tick[tempi], notes.tempo_bpm[tempi]
    start = notes.onset_tick[rows].astype(np.int64)
    end = start + notes.duration_tick[rows]
    end_s = notes.onset_s[rows] + notes.duration_s[rows]
    cut = end_s < ticks_to_seconds(end, notes.ticks_per_beat, tempo_tick, tempo_bpm) - 1e-6
    if cut.any():
        at = np.concatenate([[0], tempo_tick]).astype(np.float64)
        at_s = ticks_to_seconds(at, notes.ticks_per_beat, tempo_tick, tempo_bpm)
        per_s = np.concatenate([[DEFAULT_BPM], tempo_bpm]) * notes.ticks_per_beat / 60.0
        now = np.searchsorted(at_s, end_s[cut], side="right") - 1
        end[cut] = np.rint(at[now] + (end_s[cut] - at_s[now]) * per_s[now])
    return np.maximum(end, start + 1)


def file_text(path: str | Path) -> str:
    """MTF of a MIDI file as it is, whoever wrote it, as CLaMP's own converter gives it.

    Raises UserError naming the file when it cannot be read, or has tracks that are not played together.
    """
    import mido

    file = parse_midi(path)
    if file.type == 2:
        raise UserError(f"{path} is a MIDI file of type 2, whose tracks are no one piece; save it as type 0 or 1")
    messages = [message for message in mido.merge_tracks(file.tracks) if message.type not in _LEFT_OUT]
    lines = [" ".join(str(value) for value in message.dict().values()) for message in messages]
    return "\n".join([f"ticks_per_beat {file.ticks_per_beat}", *lines])


def patches(text: str) -> np.ndarray:
    """Patches of MTF, uint8 [P, 64] of ids below 128; raises ValueError for text that is not ASCII.

    A patch of 64 BOS; patches of merged lines, each BOS, characters, EOS and PAD, cut at 64; one of BOS and 63 EOS.
    """
    merged: list[str] = []
    patch = ""
    for line in text.splitlines(keepends=True):
        kind, _, rest = line.partition(" ")
        if patch.startswith(kind) and len(patch) + len(rest) <= PATCH - 2:
            patch = f"{patch[:-1]}\t{rest}"  # a tab in place of the line's end
        else:
            if patch:
                merged.append(patch)
            patch = line
    merged.append(patch)
    table = np.full((len(merged) + 2, PATCH), PAD, np.uint8)
    table[0], table[-1] = BOS, EOS
    table[:, 0] = BOS
    for row, patch in zip(table[1:-1], merged, strict=True):
        codes = patch.encode("ascii")[: PATCH - 1]
        row[1 : 1 + len(codes)] = np.frombuffer(codes, np.uint8)
        row[1 + len(codes) : 2 + len(codes)] = EOS
    return table
