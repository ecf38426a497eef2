"""The body of sample where the policy is NotaGen, which writes sheet music."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmart.errors import UserError
from fastsmart.words import counted

if TYPE_CHECKING:
    from fastsmart.notagen.styles import Style

NOT_FOR_SHEETS = ("vocabulary", "time_signature", "tempo", "prompt", "bars", "guidance")


def sample_sheets(options: argparse.Namespace) -> int:
    """Draw pieces and write each as ABC and MIDI, and as WAV with --wav, as soon as it ends."""
    import torch

    from fastsmart.machine.files import make_folder, write_atomic
    from fastsmart.machine.progress import bar
    from fastsmart.notagen.notation import read_abc, sheet
    from fastsmart.notagen.packed import sampling_dtype
    from fastsmart.notagen.patches import encode_prompt
    from fastsmart.notagen.sampler import AS_THE_AUTHORS, PatchSampler
    from fastsmart.notagen.weights import load_notagen

    _refuse_others(options)
    styles = _styles(options)
    given = {key: getattr(options, key) for key in ("max_tokens", "temperature", "top_k", "top_p")}
    settings = replace(AS_THE_AUTHORS, **{key: value for key, value in given.items() if value is not None})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_notagen(options.policy, sampling_dtype(device), device)
    out = make_folder(options.out)
    asked = [styles[i % len(styles)] if styles else None for i in range(options.number)]
    prompts = [encode_prompt(style.lines if style else []) for style in asked]
    unread = 0
    with bar("writing") as show:
        for done, piece in enumerate(PatchSampler(model, settings)(prompts, (options.seed,)), 1):
            style = asked[piece.index] or "no style"
            path = out / f"{piece.index + 1:03d}.abc"
            notes, (reason,) = read_abc([piece.text])
            write_atomic(path, piece.text if reason else sheet(piece.text))
            if reason:
                unread += 1
                print(f"{path}  {style}: not to be read as music", flush=True)
            else:
                notes.to_midi(0, path.with_suffix(".mid"))
                cut = _render(notes, path, options) if options.wav else ""
                ends = "" if piece.complete else ", broken off at --max-tokens"
                length = f"{notes.end_s[0]:.1f} s{ends}{cut}"
                told = counted(int(notes.counts[0]), "note")
                print(f"{path.with_suffix('.mid')}  {style}: {told}, {length}", flush=True)
            show(done, options.number)
    if unread:
        print(f"fastsmart: {unread} of {counted(options.number, 'piece')} cannot be read as music", file=sys.stderr)
    return 2 if unread == options.number else 0


def _refuse_others(options: argparse.Namespace) -> None:
    """Raises UserError for an option of policies that write tokens."""
    for key in NOT_FOR_SHEETS:
        if getattr(options, key) not in (None, "", []):
            name = f"--{key.replace('_', '-')}"
            raise UserError(f"{name} is for policies that write tokens, NotaGen is asked with --style; leave it out")
    if options.engine != "native":
        raise UserError(f"--engine {options.engine} does not serve NotaGen, whose network has two levels; leave it out")


def _styles(options: argparse.Namespace) -> list[Style]:
    """The styles asked for; raises UserError for one that this checkpoint was not trained with."""
    from fastsmart.notagen.styles import read_style
    from fastsmart.notagen.weights import PUBLISHED

    published = PUBLISHED.get(options.policy)
    if options.style and published and not published.styled:
        styled = ", ".join(name for name, each in PUBLISHED.items() if each.styled)
        raise UserError(f"{options.policy} was trained without styles; leave out --style, or choose one of {styled}")
    return [read_style(text) for text in options.style]


def _render(notes: Any, path: Path, options: argparse.Namespace) -> str:
    """Write the WAV of a piece; what is to be said of it."""
    from fastsmart.audio import RenderSettings, render_file
    from fastsmart.audio.rendering import is_cut

    render_file(notes, 0, path.with_suffix(".wav"), RenderSettings(options.soundfont))
    return ", its audio cut at 60 minutes" if is_cut(notes, 0) else ""
