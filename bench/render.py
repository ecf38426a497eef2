"""Rendering, in one interleaved run: the note bank beside FluidSynth, the public pipeline's renderer and symusic.

    python bench/render.py --peer all --midi FOLDER --soundfont FluidR3_GM.sf2 --out bench/results/render.json

Clips: the middle 10 s window of each of 20 files spread over the folder, or pieces of the shipped policy; mono, on one
core unless the name says "pool", which is the whole way through the worker processes. The public pipeline plays a MIDI
file with tinysoundfont's sequencer at 48 kHz, after 4 s that flush the synth.

--parts fidelity: for every soundfont named, signal-to-noise ratio in dB against FluidSynth (dry, 48 kHz, mixed to mono,
resampled), and the RMS difference of 80-band log-mel spectra in dB, beside that of tinysoundfont. --parts cold: a whole
bank from nothing. --leak N renders N clips and prints memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import torch
from harness import REFERENCE, Job, Work, interleaved, measured_ceilings, parser, report
from stages import finish, made, one_pass, parse, played, run

from fastsmart.audio import RenderPool, RenderSettings, find_soundfont, render
from fastsmart.audio.bank import NoteBank, banks_folder
from fastsmart.audio.bank_renderer import Renderer, make_renderer
from fastsmart.audio.bank_tools import build_bank, fidelity
from fastsmart.audio.events import piece_arrays, timing
from fastsmart.audio.gpu_mixdown import DeviceMixer
from fastsmart.audio.mixdown import pair, slice_notes
from fastsmart.errors import UserError
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch, read_midi
from fastsmart.tokens.decode import decode

SECONDS, RATE_HZ = 10.0, 16000
PASSES = 10  # over the clips in a turn of the fast ones
PEERS = ("fluidsynth", "tinysoundfont", "symusic")
PARTS = ("speed", "cold", "fidelity")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, 5, PEERS)
    options.add_argument("--midi", help="folder of MIDI files; default: pieces of the shipped policy")
    options.add_argument("--clips", type=int, default=20, help="20")
    options.add_argument("--soundfont", action="append", help="repeatable; speed is measured on the first")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--leak", type=int, default=0, metavar="N", help="render N clips instead")
    options.set_defaults(threads=1)
    given = parse(options, {"parts": ["speed"]}, arguments)
    fonts = given.soundfont or [str(find_soundfont())]
    clips = excerpts(Path(given.midi), given.clips) if given.midi else own_pieces(given.clips)
    more: dict[str, Any] = {"clips": {"number": len(clips), "mean_notes": float(clips.counts.mean())}}
    cases: dict[str, Any] = {}
    if given.leak:
        return finish("render", cases, given, **more, leak=leak(clips, fonts[0], given.leak))
    if "speed" in given.parts:
        cases[f"{len(clips)} clips"], more["left_out"] = speed(clips, fonts[0], given)
    if "cold" in given.parts:
        more["cold"] = cold(fonts[0])
    if "fidelity" in given.parts:
        more["fidelity"] = {Path(font).name: compare(clips, font) for font in fonts}
    return finish("render", cases, given, **more)


def excerpts(folder: Path, clips: int) -> NoteBatch:
    """The middle window of files spread over a folder."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    files = files[:: max(1, len(files) // clips)][:clips]
    windows = [cut_windows(read_midi(path), SECONDS) for path in files]
    return NoteBatch.concat([w.select([len(w) // 2]) for w in windows if len(w)])


def own_pieces(clips: int) -> NoteBatch:
    """The first ten seconds of pieces of the shipped policy."""
    rollout, vocab = played(clips)
    return decode(rollout.sequences(), vocab, SECONDS)


def speed(clips: NoteBatch, font: str, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    settings = RenderSettings(font, max_seconds=SECONDS)
    batch = NoteBatch.concat([clips] * PASSES)
    with ExitStack() as stack:
        stored = stack.enter_context(closing(make_renderer(settings)))
        jobs, passes = {"bank": one_by_one(stored, batch)}, {"bank": PASSES}
        if on_gpu := options.device.startswith("cuda"):
            mixer = stack.enter_context(DeviceMixer(settings, options.device))
            jobs["bank, on the GPU"], passes["bank, on the GPU"] = lambda: mixer.render(batch), PASSES
        if not options.quick:
            exact = stack.enter_context(closing(make_renderer(replace(settings, bank="exact"))))
            jobs["bank, exact, its notes kept"] = one_by_one(exact, clips)
        for workers in (1, 2):
            pool = stack.enter_context(RenderPool(replace(settings, workers=workers), len(batch)))
            name = f"bank, pool, {workers} process{'es' * (workers > 1)}"
            jobs[name], passes[name] = through(pool, batch), PASSES
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = [folder / f"{i}.mid" for i in range(len(clips))]
        for i, file in enumerate(files):
            clips.to_midi(i, file)
        makers = {
            "fluidsynth": lambda: fluidsynth(settings, clips),
            "tinysoundfont": lambda: public(font, files),
            "symusic": lambda: symusic(font, files),
        }
        peers, left_out = made(makers, options)
        seconds = one_pass(interleaved(jobs | peers, options.runs, options.device), passes)
    ours = "bank, on the GPU" if on_gpu else "bank"
    case = report("render", seconds, ours, [work(settings, clips)], measured_ceilings(options.device))
    audio_s = float(np.minimum(clips.end_s, SECONDS).sum())
    case["times_real_time"] = {n: audio_s / statistics.median(s) for n, s in seconds.items() if n != REFERENCE}
    for name, rate in case["times_real_time"].items():
        print(f"  {name}: {rate:.0f} x real time")
    return case, left_out


def work(settings: RenderSettings, clips: NoteBatch) -> Work:
    """Every sample of a note that is heard is added, times its gain; what is stored of the notes is read once, and
    every clip is written once."""
    added, written, stored = 0, 0, {}
    with NoteBank(settings) as bank:
        for piece in (piece_arrays(clips, i) for i in range(len(clips))):
            _, length, heard, start, stop = timing(piece, settings)
            pitch, velocity = piece.pitch[heard], piece.velocity[heard]
            bank.ensure(pitch, velocity)
            pedal_at = np.rint(piece.pedal_s * settings.synth_rate).astype(np.int64)
            slices = slice_notes(*pair(start, stop, pitch, pedal_at, piece.pedal_down), pitch, velocity, bank.tables)
            samples = np.minimum(slices.start + slices.length, length) - np.maximum(slices.start, 0)
            added, written = added + int(samples.clip(min=0).sum()), written + length
            for wave, n in zip(slices.wave.tolist(), slices.length.tolist(), strict=True):
                stored[wave] = max(n, stored.get(wave, 0))
    return Work("notes added up", 2e-9 * added, 1e-9 * (2 * sum(stored.values()) + 4 * written))


def one_by_one(renderer: Renderer, clips: NoteBatch) -> Job:
    out = np.empty(renderer.settings.max_samples, np.float32)  # type: ignore[attr-defined]
    pieces = [piece_arrays(clips, i) for i in range(len(clips))]
    return lambda: [renderer.render_into(out, piece) for piece in pieces]


def through(pool: RenderPool, clips: NoteBatch) -> Job:
    def job() -> None:
        for i in range(len(clips)):
            pool.submit(i, clips, i)
        done = 0
        while done < len(clips):
            done += len(pool.poll(timeout_s=1.0))
        pool.clear()

    return job


def fluidsynth(settings: RenderSettings, clips: NoteBatch) -> dict[str, Job]:
    return {"fluidsynth, 48 kHz resampled": one_by_one(make_renderer(replace(settings, backend="fluidsynth")), clips)}


def public(font: str, files: Sequence[Path]) -> dict[str, Job]:
    """As the authors of SMART render."""
    from peers.public import Synth
    from symusic import Score

    synth, scores = Synth(font), [Score(str(file)) for file in files]
    return {"tinysoundfont, 48 kHz, 4 s flush": lambda: [synth.render_clip(score) for score in scores]}


def symusic(font: str, files: Sequence[Path]) -> dict[str, Job]:
    from symusic import Score, Synthesizer

    synth, scores = Synthesizer(font, RATE_HZ, 0), [Score(str(file)) for file in files]
    try:
        synth.render(scores[0], stereo=False)
    except TypeError as error:  # of 0.6.0 with Python 3.11
        raise UserError(f"symusic cannot hand over what it rendered: {str(error).partition('!')[0]}") from error
    return {"symusic, 16 kHz mono": lambda: [synth.render(score, stereo=False) for score in scores]}


def cold(font: str) -> dict[str, Any]:
    """Seconds to store a whole piano from nothing on two cores, and what it takes on disk."""
    before = os.environ.get("FASTSMART_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTSMART_CACHE"] = folder
        settings = RenderSettings(font, max_seconds=SECONDS, workers=2)
        start = time.perf_counter()
        build_bank(settings)
        seconds = time.perf_counter() - start
        with NoteBank(settings) as bank:
            info = bank.info
        assert banks_folder().is_relative_to(folder)
    os.environ.pop("FASTSMART_CACHE")
    if before is not None:
        os.environ["FASTSMART_CACHE"] = before
    print(f"cold: {info.notes} notes of {info.keys} keys in {seconds:.1f} s, {info.bytes / 2**20:.0f} MiB")
    return {"seconds": seconds, "notes": info.notes, "keys": info.keys, "bytes": info.bytes}


def compare(clips: NoteBatch, font: str) -> dict[str, Any]:
    """How far the bank is from FluidSynth, and tinysoundfont too."""
    settings = RenderSettings(font, max_seconds=SECONDS, workers=2, normalize="none")
    found: dict[str, Any] = {}
    for mode in ("stored", "exact"):
        snr = fidelity(replace(settings, bank=mode), clips)
        found[f"{mode}_snr_db"] = {"median": statistics.median(snr), "min": min(snr), "each": snr}
    options = {"sample_rate": RATE_HZ, "max_seconds": SECONDS, "workers": 2}
    audio = {
        backend: render(clips, font, backend, **options)  # type: ignore[arg-type]
        for backend in ("fluidsynth", "bank", "tinysoundfont")
    }
    for backend in ("bank", "tinysoundfont"):
        distances = [log_mel_distance(audio["fluidsynth"].clip(i), audio[backend].clip(i)) for i in range(len(clips))]
        found[f"{backend}_log_mel_db"] = {"median": statistics.median(distances), "max": max(distances)}
    print(Path(font).name)
    for name, values in found.items():
        print(f"    {name:24}", *(f"{key} {value:.3f}" for key, value in values.items() if key != "each"))
    return found


def log_mel_distance(one: np.ndarray, other: np.ndarray) -> float:
    """RMS difference in dB of two clips' log-mel spectra: 80 bands, 25 ms windows every 10 ms, down to -80 dB."""
    from transformers.audio_utils import mel_filter_bank

    bands = torch.from_numpy(mel_filter_bank(201, 80, 0.0, 8000.0, RATE_HZ)).float()
    spectra = []
    for clip in (one, other):
        window = torch.hann_window(400)
        power = torch.stft(torch.from_numpy(clip), 400, 160, window=window, return_complex=True).abs() ** 2
        mel = bands.T @ power
        spectra.append(10 * torch.log10(mel.clamp(min=float(mel.max()) * 1e-8)))
    return float((spectra[0] - spectra[1]).pow(2).mean().sqrt())


def leak(clips: NoteBatch, font: str, number: int) -> dict[str, Any]:
    """Memory of this process and its workers while `number` clips are rendered through one pool."""
    import psutil

    me, memory = psutil.Process(), []
    segments = set(os.listdir("/dev/shm"))
    with RenderPool(RenderSettings(font, max_seconds=SECONDS, workers=2), len(clips)) as pool:
        for done in range(0, number, len(clips)):
            pool.render(clips)
            if done % (len(clips) * max(1, number // len(clips) // 20)) == 0:
                processes = [me, *me.children(recursive=True)]
                memory.append([done, *(round(p.memory_info().rss / 2**20, 1) for p in processes)])
                print("clips, MiB of this process and each worker:", *memory[-1], flush=True)
        replaced = pool.replaced
    left = set(os.listdir("/dev/shm")) - segments
    print(f"workers replaced: {replaced}; shared-memory segments left: {len(left)}")
    return {"clips": number, "rss_mib": memory, "replaced": replaced, "segments_left": len(left)}


if __name__ == "__main__":
    run(main)
