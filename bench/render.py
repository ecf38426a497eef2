"""Rendering, in one interleaved run: the note bank beside FluidSynth, the public pipeline's renderer and symusic.

    python bench/render.py --midi FOLDER --soundfont FluidR3_GM.sf2 --out bench/results/render.json

Clips: the middle 10 s window of each of 20 files spread over the folder, mono. Speed is audio seconds a second of one
core, as the median over the rounds; "pool" is the whole way through the worker processes. Fidelity, for every
soundfont named: signal-to-noise ratio in dB against FluidSynth (dry, 48 kHz, mixed to mono, resampled), and the RMS
difference of 80-band log-mel spectra in dB, beside that of tinysoundfont. `--leak N` renders N clips and prints memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import symusic
import torch
from results import write_result
from transformers.audio_utils import mel_filter_bank

from fastsmart.audio import RenderPool, RenderSettings, find_soundfont, render
from fastsmart.audio.bank import NoteBank, banks_folder
from fastsmart.audio.building import build_bank, fidelity
from fastsmart.audio.events import piece_arrays
from fastsmart.audio.renderers import Renderer, make_renderer
from fastsmart.notes import NoteBatch, read_midi
from fastsmart.reward.windows import cut_windows

CLIPS, SECONDS, RATE_HZ = 20, 10.0, 16000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--midi", required=True, help="folder of MIDI files")
    arguments.add_argument("--soundfont", action="append", help="repeatable; speed is measured on the first")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--leak", type=int, default=0, metavar="N", help="render N clips instead")
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    fonts = options.soundfont or [str(find_soundfont())]
    clips = excerpts(Path(options.midi))
    if options.leak:
        figures = leak(clips, fonts[0], options.leak)
    else:
        figures = {
            "clips": {"number": len(clips), "mean_notes": float(clips.counts.mean())},
            "speed": speed(clips, fonts[0], options.rounds),
            "cold": cold(fonts[0]),
            "fidelity": {Path(font).name: compare(clips, font) for font in fonts},
        }
    if options.out:
        write_result(options.out, figures)


def excerpts(folder: Path) -> NoteBatch:
    """The middle window of files spread over a folder."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    files = files[:: max(1, len(files) // CLIPS)][:CLIPS]
    windows = [cut_windows(read_midi(path), SECONDS) for path in files]
    return NoteBatch.concat([w.select([len(w) // 2]) for w in windows if len(w)])


def speed(clips: NoteBatch, font: str, rounds: int) -> dict[str, Any]:
    """Audio seconds a second of each contender, round by round, in turn; on one core unless its name says two."""
    settings = RenderSettings(font, max_seconds=SECONDS)
    audio_s = float(np.minimum(clips.end_s, SECONDS).sum())
    with tempfile.TemporaryDirectory() as folder:
        scores = []
        for i in range(len(clips)):
            clips.to_midi(i, Path(folder) / f"{i}.mid")
            scores.append(symusic.Score(str(Path(folder) / f"{i}.mid")))
    direct = symusic.Synthesizer(font, RATE_HZ, 0)
    repeats = 10  # of the clips in a pass of the fast ones
    batch = NoteBatch.concat([clips] * repeats)
    contenders: dict[str, tuple[int, Callable[[], object]]] = {
        "bank": (repeats, one_by_one(make_renderer(settings), batch)),
        "bank, exact, its notes kept": (1, one_by_one(make_renderer(replace(settings, bank="exact")), clips)),
        "fluidsynth, 48 kHz resampled": (1, one_by_one(make_renderer(replace(settings, backend="fluidsynth")), clips)),
        "tinysoundfont, 48 kHz, 4 s flush (public pipeline)": (
            1,
            one_by_one(make_renderer(replace(settings, backend="tinysoundfont", sample_rate=48000)), clips),
        ),
        "symusic, 16 kHz mono": (1, lambda: [direct.render(score, stereo=False) for score in scores]),
    }
    pools = {workers: RenderPool(replace(settings, workers=workers), len(batch)) for workers in (1, 2)}
    for workers, pool in pools.items():
        contenders[f"bank, pool, {workers} process{'es' * (workers > 1)}"] = repeats, through(pool, batch)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, (times, job) in contenders.items():
            start = time.perf_counter()
            job()
            if turn:  # the first of each is its warm-up
                rates[name].append(times * audio_s / (time.perf_counter() - start))
    for pool in pools.values():
        pool.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:52} {rate:8.0f} x real time ({min(rates[name]):.0f} - {max(rates[name]):.0f})")
    ratios = {f"bank / {name}": medians["bank"] / rate for name, rate in medians.items()}
    two = [b / a for a, b in zip(rates["bank, pool, 1 process"], rates["bank, pool, 2 processes"], strict=True)]
    ratios["two processes / one"] = statistics.median(two)
    for name, ratio in ratios.items():
        print(f"{name:60} {ratio:6.2f}")
    return {"times_real_time": medians, "rounds": rates, "ratios": ratios}


def one_by_one(renderer: Renderer, clips: NoteBatch) -> Callable[[], object]:
    longest = int(SECONDS * 48000)
    settings = renderer.settings  # type: ignore[attr-defined]
    out = np.empty(longest, np.float32)[: settings.max_samples]
    pieces = [piece_arrays(clips, i) for i in range(len(clips))]
    return lambda: [renderer.render_into(out, piece) for piece in pieces]


def through(pool: RenderPool, clips: NoteBatch) -> Callable[[], object]:
    def job() -> None:
        for i in range(len(clips)):
            pool.submit(i, clips, i)
        done = 0
        while done < len(clips):
            done += len(pool.poll(timeout_s=1.0))
        pool.clear()

    return job


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
    me, memory = psutil.Process(), []
    segments = set(os.listdir("/dev/shm"))
    with RenderPool(RenderSettings(font, max_seconds=SECONDS, workers=2), len(clips)) as pool:
        for done in range(0, number, len(clips)):
            for i in range(len(clips)):
                pool.submit(i, clips, i)
            pool.wait()
            if done % (len(clips) * max(1, number // len(clips) // 20)) == 0:
                processes = [me, *me.children(recursive=True)]
                memory.append([done, *(round(p.memory_info().rss / 2**20, 1) for p in processes)])
                print("clips, MiB of this process and each worker:", *memory[-1], flush=True)
        replaced = pool.replaced
    left = set(os.listdir("/dev/shm")) - segments
    print(f"workers replaced: {replaced}; shared-memory segments left: {len(left)}")
    return {"clips": number, "rss_mib": memory, "replaced": replaced, "segments_left": len(left)}


if __name__ == "__main__":
    main()
