"""The bodies of bank and doctor: what this machine has."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastsmart.errors import UserError
from fastsmart.machine.files import files_below
from fastsmart.notes import MIDI_SUFFIXES
from fastsmart.words import counted

if TYPE_CHECKING:
    from fastsmart.audio import RenderSettings


def doctor(options: argparse.Namespace) -> int:
    from fastsmart.doctor import examine

    return examine()


def selfcheck(options: argparse.Namespace) -> int:
    from fastsmart.selfcheck import check

    return check()


def bank(options: argparse.Namespace) -> int:
    from fastsmart.audio.bank import list_banks

    if options.action == "info":
        banks = list_banks()
        for b in banks:
            print(
                f"{b.path}: {b.soundfont}, program {b.program}, {b.sample_rate} Hz, notes up to {b.seconds:g} s: "
                f"{b.notes} notes of {b.keys} keys, {b.bytes / 2**20:.0f} MiB"
            )
        if not banks:
            print("no bank yet; one is made when a run first renders, or by fastsmart bank build")
        return 0

    from fastsmart.audio import RenderSettings

    settings = RenderSettings(
        options.soundfont,
        sample_rate=options.sample_rate,
        max_seconds=options.max_seconds,
        program=options.program,
        workers=options.workers,
        normalize="none",
    )
    return _build_bank(settings) if options.action == "build" else _verify_bank(settings, options)


def _build_bank(settings: RenderSettings) -> int:
    import time

    from fastsmart.audio.bank import NoteBank
    from fastsmart.audio.bank_tools import build_bank
    from fastsmart.machine.progress import bar

    start = time.perf_counter()
    with bar("keys") as show:
        build_bank(settings, show)
    with NoteBank(settings) as made:
        info = made.info
    print(
        f"{info.path}: {info.notes} notes of {info.keys} keys, {info.bytes / 2**20:.0f} MiB, "
        f"{time.perf_counter() - start:.1f} s"
    )
    return 0


def _verify_bank(settings: RenderSettings, options: argparse.Namespace) -> int:
    import statistics

    from fastsmart.audio.bank_tools import fidelity
    from fastsmart.music.windows import cut_windows
    from fastsmart.notes import NoteBatch, read_midi

    paths = [path for path, _ in files_below(options.files, MIDI_SUFFIXES)]
    clips: list[tuple[Path, NoteBatch]] = []
    for path in paths[:: max(1, len(paths) // options.clips)]:
        windows = cut_windows(read_midi(path), settings.max_seconds)
        if len(windows):
            clips.append((path, windows.select([len(windows) // 2])))
    if not clips:
        raise UserError(f"no notes in {', '.join(options.files)}")
    if options.exact:
        settings = replace(settings, bank="exact")
    found = fidelity(settings, NoteBatch.concat([clip for _, clip in clips[: options.clips]]))
    for (path, clip), decibels in zip(clips, found, strict=False):
        print(f"{path}: {counted(int(clip.counts[0]), 'note')}, {decibels:.1f} dB")
    print(f"{counted(len(found), 'clip')}: minimum {min(found):.1f} dB, median {statistics.median(found):.1f} dB")
    return 0
