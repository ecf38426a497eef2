"""What listeners would hear as faults, counted over real pieces and outputs of the shipped policy, for every backend.

    python bench/ears.py FOLDER [FOLDER ...] --soundfont FluidR3Mono_GM.sf3 --soundfont FluidR3_GM.sf2 --out FILE

Real pieces are files spread over the folders. For every soundfont:

* files: each piece up to --whole seconds as `fastsmart render` writes it (FluidSynth, 48 kHz stereo, with the release),
  held against its notes by `fastsmart.audio.faults`;
* clips: its window of 10 s with most notes, 16 kHz mono as rewards hear it, from every backend, held likewise; and the
  bank's signal-to-noise ratio against FluidSynth;
* chords of 1 to 88 notes struck at once.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result
from stages import run

from fastsmart import load_policy, prompts, sample
from fastsmart.audio import FluidSynthRenderer, RenderSettings, find_soundfont, listening_settings
from fastsmart.audio.bank_renderer import Renderer, make_renderer
from fastsmart.audio.bank_tools import snr_db
from fastsmart.audio.events import piece_arrays
from fastsmart.audio.faults import Hearing, audible_faults
from fastsmart.errors import UserError
from fastsmart.music.windows import cut_windows
from fastsmart.notes import MIDI_SUFFIXES, NoteBatch, read_midi
from fastsmart.tokens.decode import decode

SECONDS, RATE_HZ = 10.0, 16000
BACKENDS = ("fluidsynth", "bank", "tinysoundfont")
Pieces = list[NoteBatch]  # of one piece each
CHORDS = (1, 2, 4, 8, 16, 32, 33, 48, 64, 88)
KINDS = {  # of faults, by the words that tell of them
    "before the first note": "before the first note",
    "clipped": "clipped",
    "peak outside the music": "outside the music",
    "breaks off": "breaks off",
    "other level": "asked for",
    "silent": "silent",
}
# the resampling filter rings for six samples of 16 kHz on both sides of a note's start; clips end with their score
CLIP = Hearing(lead_s=7 / RATE_HZ, peak=None, tail=False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folders", nargs="+", metavar="FOLDER", help="with MIDI files")
    options.add_argument("--pieces", type=int, default=200, help="real ones, spread over the folders; 200")
    options.add_argument("--outputs", type=int, default=100, help="of the shipped policy; 100")
    options.add_argument("--whole", type=float, default=60.0, metavar="S", help="seconds of a file at most; 60")
    options.add_argument("--soundfont", action="append", help="repeatable; default: the one that is found")
    options.add_argument("--out", default="", help="JSON file for the result, written after each soundfont")
    given = options.parse_args(arguments)
    real, unreadable = real_pieces(given.folders, given.pieces)
    sets = {"real": real, "outputs": own_pieces(given.outputs), "chords": chords()}
    figures: dict[str, Any] = {
        "pieces": {name: {"number": len(p), "notes": sum(len(one.pitch) for one in p)} for name, p in sets.items()},
        "unreadable": unreadable,
        "soundfonts": {},
    }
    for font in given.soundfont or [str(find_soundfont())]:
        figures["soundfonts"][Path(font).name] = found = {
            "files": files(sets, font, given.whole),
            "clips": clips(sets, font),
        }
        print(Path(font).name, found, flush=True)
        if given.out:
            write_result(given.out, figures)
    return figures


def real_pieces(folders: Sequence[str], number: int) -> tuple[Pieces, int]:
    """Files spread evenly over the folders, and how many could not be read or have no notes."""
    paths = sorted(p for folder in folders for p in Path(folder).rglob("*") if p.suffix.lower() in MIDI_SUFFIXES)
    if not paths:
        raise UserError(f"no MIDI files in {', '.join(folders)}")
    pieces, left_out = [], 0
    for k in np.linspace(0, len(paths) - 1, min(number, len(paths))).astype(int):
        try:
            piece = read_midi(paths[k])
        except UserError:
            left_out += 1
            continue
        if piece.counts[0]:
            pieces.append(piece)
        else:
            left_out += 1
    return pieces, left_out


def own_pieces(number: int) -> Pieces:
    policy = load_policy("pop909-tiny")
    rollout = sample(policy, prompts.procedural(policy.vocab, number, seed=5), 1, 256, 1.0, 5)
    notes = decode(rollout.sequences(), policy.vocab)
    return [notes.select([i]) for i in np.flatnonzero(notes.counts)]


def chords() -> Pieces:
    keys = np.random.default_rng(0).permutation(np.arange(21, 109)).astype(np.uint8)
    return [
        replace(
            NoteBatch.empty(1),
            onset_s=np.full(count, 0.5),
            duration_s=np.ones(count),
            pitch=keys[:count],
            velocity=np.full(count, 80, np.uint8),
            offsets=np.array([0, count]),
            end_s=np.array([1.5]),
            onset_tick=np.zeros(count, np.int32),
            duration_tick=np.ones(count, np.int32),
        )
        for count in CHORDS
    ]


def files(sets: dict[str, Pieces], font: str, whole_s: float) -> dict[str, Any]:
    """Pieces as a person would open them."""
    found = {}
    with FluidSynthRenderer(listening_settings(RenderSettings(font), whole_s)) as renderer:
        for name, pieces in sets.items():
            faults: list[str] = []
            for number, piece in enumerate(pieces):
                end_s = min(float(piece.end_s[0]), whole_s)
                onsets = piece.onset_s[piece.onset_s < end_s]
                heard = renderer.render_stereo(piece, 0)
                told = audible_faults(heard, renderer.settings.sample_rate, onsets, end_s)
                faults += [f"{number}: {fault}" for fault in told]
            found[name] = counted(faults, len(pieces))
    return found


def clips(sets: dict[str, Pieces], font: str) -> dict[str, Any]:
    """The densest window of each piece from every backend, and how far each is from FluidSynth."""
    found: dict[str, Any] = {}
    for name, pieces in sets.items():
        windows = densest(pieces) if name != "chords" else pieces
        reference: list[np.ndarray] = []
        for backend in BACKENDS:
            plain = RenderSettings(font, backend, sample_rate=RATE_HZ, max_seconds=SECONDS, normalize="none")
            try:
                renderer = make_renderer(plain)
            except UserError as error:
                found.setdefault(backend, {})[name] = {"left_out": str(error).split(":")[0]}
                continue
            with closing(renderer):
                heard = [render(renderer, window) for window in windows]
            reference = reference or heard
            told = counted(clip_faults(heard, windows), len(windows))
            if backend == "bank":
                snr = [snr_db(one, other) for one, other in zip(reference, heard, strict=True)]
                told |= {"snr_db": {"median": float(np.median(snr)), "least": float(min(snr))}}
                if name == "chords":
                    told["snr_db"] |= {"by_notes": dict(zip(map(str, CHORDS), map(float, snr), strict=True))}
            found.setdefault(backend, {})[name] = told
    return found


def densest(pieces: Pieces) -> Pieces:
    windows = [cut_windows(piece, SECONDS) for piece in pieces]
    return [w.select([int(w.counts.argmax())]) for w in windows if len(w) and w.counts.any()]


def render(renderer: Renderer, piece: NoteBatch) -> np.ndarray:
    out = np.empty(round(SECONDS * RATE_HZ), np.float32)
    return out[: renderer.render_into(out, piece_arrays(piece, 0))].copy()


def clip_faults(heard: Sequence[np.ndarray], windows: Pieces) -> list[str]:
    """Faults of clips, brought to a peak of 1 as training does."""
    faults = []
    for samples, window in zip(heard, windows, strict=True):
        end_s = min(float(window.end_s[0]), SECONDS)
        peak = max(float(np.abs(samples).max()), 1e-30)
        # a clip ends with its score, up to half a sample
        faults += audible_faults(
            samples / peak, RATE_HZ, window.onset_s[window.onset_s < end_s], end_s - 1.0 / RATE_HZ, CLIP
        )
    return faults


def counted(faults: Sequence[str], number: int) -> dict[str, Any]:
    kinds = Counter(kind for fault in faults for kind, words in KINDS.items() if words in fault)
    return {"number": number, "faults": len(faults), "kinds": {kind: kinds[kind] for kind in KINDS}, "told": [*faults]}


if __name__ == "__main__":
    run(main)
