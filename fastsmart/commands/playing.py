"""The bodies of sample, render and score."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmart.commands.sheets import sample_sheets
from fastsmart.errors import UserError
from fastsmart.machine.files import files_below
from fastsmart.notes import MIDI_SUFFIXES
from fastsmart.words import counted

if TYPE_CHECKING:
    from fastsmart.policy.transformer import Policy
    from fastsmart.reward import RewardSettings
    from fastsmart.tokens.prompts import Prompts

AUDIO_SUFFIXES = (".wav", ".flac")
TEMPI = (60.0, 150.0)  # bpm of what is sampled where nobody says
USUAL = {"max_tokens": 500, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # of policies that write tokens
SHORTEST_S = 0.01  # of a piece that is scored


def sample(options: argparse.Namespace) -> int:
    from fastsmart import decode, load_policy
    from fastsmart import sample as draw
    from fastsmart.audio.rendering import is_cut
    from fastsmart.machine.files import make_folder
    from fastsmart.notagen.weights import is_notagen

    if is_notagen(options.policy):
        return sample_sheets(options)
    for key, usual in USUAL.items():
        if getattr(options, key) is None:
            setattr(options, key, usual)
    if options.prompt and (options.tempo or options.time_signature):
        raise UserError("--tempo and --time-signature are of the openings that --prompt replaces; leave them out")
    if options.bars and not options.prompt:
        raise UserError("--bars is of the MIDI file of --prompt; name one, or leave it out")
    if options.tempo and options.tempo[0] > options.tempo[1]:
        raise UserError(f"--tempo goes from {options.tempo[0]:g} to {options.tempo[1]:g}; write the lower one first")
    if options.guidance is not None and not options.style:
        raise UserError("--guidance is of the styles of --style; name one, or leave it out")
    policy = load_policy(options.policy, vocabulary=options.vocabulary)
    asked = _prompts(policy, options)
    out = make_folder(options.out)
    rollout = draw(
        policy,
        asked,
        1,
        options.max_tokens,
        options.temperature,
        options.seed,
        options.engine,
        options.top_k,
        options.top_p,
        1.0 if options.guidance is None else options.guidance,
    )
    notes = decode(rollout.sequences(), policy.vocab)
    for i in range(len(notes)):
        path = out / f"{i + 1:03d}.mid"
        notes.to_midi(i, path)
        cut = options.wav and is_cut(notes, i)
        if options.wav:
            _render_one(notes, i, path.with_suffix(".wav"), options.soundfont)
        length = f"{notes.end_s[i]:.1f} s{', its audio cut at 60 minutes' if cut else ''}"
        begins = f"goes on from {options.prompt}" if options.prompt else asked.text(i)
        print(f"{path}  {begins}: {counted(int(notes.counts[i]), 'note')}, {length}")
    return 0


def _prompts(policy: Policy, options: argparse.Namespace) -> Prompts:
    """Prompts that `sample` begins with; raises UserError naming the options that no token of the vocabulary meets."""
    from fastsmart import prompts
    from fastsmart.tokens.phrase import phrase

    room = policy.size.max_positions - options.max_tokens
    if room < 1:
        raise UserError(
            f"--max-tokens is {options.max_tokens}, and the policy holds {policy.size.max_positions} tokens with the "
            "prompt; ask for fewer"
        )
    # BOS, a style and a composer come before the phrase
    if options.prompt:
        asked = phrase(options.prompt, policy.vocab, options.number, room - 3 * bool(options.style), options.bars or 0)
        return prompts.styled(asked, options.style, "--style") if options.style else asked
    metres, tempi = options.time_signature or ["4/4"], tuple(options.tempo or TEMPI)
    try:
        asked = prompts.procedural(policy.vocab, options.number, options.seed, metres, tempi)
        own_metres = None if options.time_signature else options.seed
        return prompts.styled(asked, options.style, "--style", own_metres) if options.style else asked
    except UserError as error:
        text = str(error).replace("prompts.tempo_min", "--tempo LOW").replace("prompts.tempo_max", "HIGH")
        raise UserError(text.replace("prompts.time_signatures", "--time-signature")) from error


def render(options: argparse.Namespace) -> int:
    from fastsmart.audio import RenderSettings, render_files
    from fastsmart.machine.files import make_folder
    from fastsmart.machine.progress import bar
    from fastsmart.notes import read_midi

    jobs = [
        (path, (Path(options.out) / below if options.out else path).with_suffix(".flac" if options.flac else ".wav"))
        for path, below in files_below(options.files, MIDI_SUFFIXES)
    ]
    for folder in {target.parent for _, target in jobs}:
        make_folder(folder)
    settings = RenderSettings(options.soundfont, "fluidsynth", reverb=options.reverb, workers=options.workers)
    failed = 0
    with bar("rendering") as show:
        for done, file in enumerate(render_files(jobs, settings, read_midi), start=1):
            if file.error is None:
                print(file.target, flush=True)
            else:  # this file's fault: the others go on
                print(f"fastsmart: {file.error}", file=sys.stderr)
                failed += 1
            if file.cut:
                print(f"fastsmart: {file.target} is cut at 60 minutes, {file.source} lasts longer", file=sys.stderr)
            show(done, len(jobs))
    return 2 if failed else 0


def score(options: argparse.Namespace) -> int:
    from fastsmart.config import Config, with_overrides
    from fastsmart.machine.folder_lock import FolderLock
    from fastsmart.policy.device import usable_device

    if 0 < options.max_seconds < SHORTEST_S:
        raise UserError(
            f"--max-seconds is {options.max_seconds}; it must be 0, all of the file, or at least {SHORTEST_S}"
        )
    usable_device(options.device, "--device")
    for text in options.set:
        if not text.startswith("reward."):
            raise UserError(f"--set {text}: score has options of rewards only, such as reward.clamp_style=ragtime")
    asked = [*options.set, *(f"reward.constraint.{text}" for text in options.constraint)]
    said = {
        "audiobox_checkpoint": options.checkpoint,
        "audiobox_dtype": options.dtype,
        "taste": options.taste,
        "clap_model": options.clap_model,
        "clap_prompt": options.clap_prompt,
        "clap_classes": tuple(options.clap_class),
        "clap_class": options.clap_class[0] if options.clap_class else "",
    }
    said = {key: value for key, value in said.items() if value}  # what is not said may have come by --set
    settings = replace(with_overrides(Config(), asked).reward, terms=dict.fromkeys(options.reward, 1.0), **said)
    out = Path(options.out) if options.out else None
    with FolderLock(out.parent, "scoring", name=f".{out.name}.lock") if out else nullcontext():
        return _score(options, settings, _pieces(options.files), out)


def _score(options: argparse.Namespace, settings: RewardSettings, files: list[str], out: Path | None) -> int:
    """Score files into `out`, where nobody else writes, or onto standard output."""
    from fastsmart.machine.files import os_errors_as_user_errors, write_atomic
    from fastsmart.machine.progress import bar
    from fastsmart.study.scoring import FileScorer, scored_before

    before = {}
    if out and out.exists():
        if not options.resume:
            raise UserError(f"{out} exists; go on with it with --resume, or choose another --out")
        before = scored_before(out, options.reward)
    scorer = FileScorer(settings, options.statistics, options.soundfont, options.max_seconds, options.device)
    if scorer.random:
        print(
            f"fastsmart: the weights of {' and '.join(scorer.random)} are random, scores mean nothing", file=sys.stderr
        )
    if out:
        write_atomic(out, "".join(json.dumps(before[path]) + "\n" for path in files if path in before))
    left, failed = [path for path in files if path not in before], 0
    with bar("scoring") as show:
        for done, line in enumerate(scorer(left), len(files) - len(left) + 1):
            failed += "error" in line
            if out:
                with os_errors_as_user_errors(out), open(out, "a", encoding="utf-8") as sink:
                    sink.write(json.dumps(line) + "\n")
            else:
                print(json.dumps(line), flush=True)
            show(done, len(files))
    if failed:
        told = f"{failed} of {counted(len(files), 'file')} could not be scored; their lines say why"
        print(f"fastsmart: {told}", file=sys.stderr)
    return 2 if failed else 0


def _pieces(names: list[str]) -> list[str]:
    """The files to score: those named, and of folders each piece once, its MIDI file where its audio lies beside it."""
    found = [path for path, _ in files_below(names, MIDI_SUFFIXES + AUDIO_SUFFIXES)]
    written = {path.with_suffix("") for path in found if path.suffix.lower() in MIDI_SUFFIXES}
    named = {Path(name) for name in names}
    files = [
        str(path)
        for path in found
        if path in named or path.suffix.lower() in MIDI_SUFFIXES or path.with_suffix("") not in written
    ]
    if len(files) < len(found):
        left_out = counted(len(found) - len(files), "audio file")
        print(f"fastsmart: left out {left_out} of pieces whose MIDI file lies beside", file=sys.stderr)
    return files


def _render_one(notes: Any, i: int, path: Path, soundfont: str) -> None:
    from fastsmart.audio import RenderSettings, render_file

    render_file(notes.select([i]), 0, path, RenderSettings(soundfont))
