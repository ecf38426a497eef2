"""The command line: one subcommand a job. Their bodies are in `fastsmart.commands`."""

from __future__ import annotations

import argparse
import errno
import math
import sys
from collections.abc import Sequence

from fastsmart import study_arguments as study
from fastsmart.arguments import (
    Parser,
    Version,
    real_option,
    refuse_empty_names,
    settings_options,
    whole_option,
)
from fastsmart.errors import UserError
from fastsmart.limits import LARGEST_SEED, MOST_AT_ONCE, MOST_STEPS, MOST_THREADS
from fastsmart.machine import politeness
from fastsmart.words import in_one_line, write_what_terminals_can_show

LONGEST_SENTENCE = 2000  # characters
PROLOGUE = """\
Fine-tunes symbolic-music transformers by reinforcement learning on how the music sounds.

  fastsmart doctor                                   what this machine has, and what is missing
  fastsmart train --preset demo --out runs/demo      tune the shipped policy, a few minutes on two cores
  fastsmart sample --policy runs/demo --out songs    let a policy play
  fastsmart score songs --reward consonance          how it sounds, in numbers
  fastsmart report runs/demo                         what the training did, as one page to read and hear
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for what the user can mend, 128 + signal when asked to stop."""
    write_what_terminals_can_show()
    try:
        options = parser().parse_args(arguments)
        refuse_empty_names(options)
        politeness.begin()
        from fastsmart import commands

        return getattr(commands, options.command.replace("-", "_"))(options)
    except UserError as error:
        sentence = in_one_line(str(error))
        if len(sentence) > LONGEST_SENTENCE:  # it quotes a damaged file
            sentence = f"{sentence[:LONGEST_SENTENCE]}..."
        print(f"fastsmart: {sentence}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 141
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"fastsmart: {in_one_line(str(error.filename)[:80])}... is too long a name for a file", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="fastsmart", description=PROLOGUE, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action=Version, help="say which version this is, and leave")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _pretrain(commands.add_parser("pretrain", help="train a base policy on a folder of MIDI files"))
    _train(commands.add_parser("train", help="tune a policy on a reward"))
    _bench(commands.add_parser("bench", help="how fast a run goes here, beside the same run with other settings"))
    _profile(commands.add_parser("profile", help="a few steps of a run under torch's profiler, as one page"))
    _sample(commands.add_parser("sample", help="let a policy play: MIDI and WAV files"))
    _render(commands.add_parser("render", help="MIDI files to WAV or FLAC, 48 kHz stereo"))
    _score(commands.add_parser("score", help="reward of MIDI and audio files, as JSON lines"))
    _top(commands.add_parser("top", help="how a run is doing, live, from its files"))
    _bank(commands.add_parser("bank", help="the stored notes that training renders from"))
    study.evaluate(
        commands.add_parser("evaluate", help="compare policies: rewards, features, diversity, with intervals")
    )
    study.blend(commands.add_parser("blend", help="weights between a tuned policy and the one it was tuned from"))
    study.frontier(commands.add_parser("frontier", help="reward against diversity of everything in evaluations"))
    study.report(commands.add_parser("report", help="a run or an evaluation as one page to read and hear"))
    study.listen(commands.add_parser("listen", help="a blind listening test: make it, analyse it, plan it"))
    study.live(commands.add_parser("live", help="a page that plays, listens, and has a policy learn what you like"))
    study.sweep(commands.add_parser("sweep", help="several runs, and the frontier of reward and diversity they draw"))
    study.style_stats(commands.add_parser("style-stats", help="real pieces of several styles as CLaMP hears them"))
    commands.add_parser("doctor", help="what this machine has, what is missing, and the command that mends it")
    commands.add_parser("selfcheck", help="whether all stages compute here what they should, in two minutes")
    return top


def _train(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Tune a policy. Settings come from the preset, then the config file, then each --set, in this order."
    )
    settings_options(p)
    _engine_and_pipeline(p)
    p.add_argument(
        "--reward", action="append", default=[], help="tune on this alone; repeatable; short for --set reward.terms=..."
    )
    p.add_argument("--out", default="", help="folder of the run")
    p.add_argument(
        "--resume",
        nargs="?",
        const="yes",
        choices=["yes", "auto"],
        help="go on with the run in --out, perhaps with --set train.steps=MORE; with 'auto', start it if there is none",
    )
    p.add_argument("--dry-run", action="store_true", help="print the resolved run and leave")


def _engine_and_pipeline(p: argparse.ArgumentParser) -> None:
    p.add_argument("--engine", help="native or vllm; short for --set sampling.engine=...")
    p.add_argument(
        "--async",
        dest="pipeline",
        choices=["off", "overlap", "one-step-off"],
        help="what runs side by side; short for --set train.pipeline=...",
    )


def _bench(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Take the first steps of a run and say how long they take, stage by stage. With --against, the same run with "
        "other settings takes turns with it, and is said to be so many times as fast. Works under torchrun, too."
    )
    settings_options(p)
    _engine_and_pipeline(p)
    p.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="'SECTION.KEY=VALUE ...'",
        help="compare with these settings on top; repeatable",
    )
    p.add_argument("--out", required=True, help="folder for bench.json")
    whole_option(p, "--steps", within=(1, MOST_STEPS), default=5, help="of a turn that count; default 5")
    whole_option(p, "--warmup", within=(0, MOST_STEPS), default=2, help="steps before; default 2")
    whole_option(p, "--rounds", within=(1, 10_000), default=3, help="turns of each; default 3")


def _profile(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Take the first steps of a run under torch's profiler and write OUT/profile.html (costs, stages, operators, "
        "idle gaps, memory), profile.json (all figures) and trace.json (for ui.perfetto.dev)."
    )
    settings_options(p)
    _engine_and_pipeline(p)
    p.add_argument("--out", required=True, help="folder of the profile; one that is there is replaced")
    whole_option(p, "--steps", within=(1, 10_000), default=3, help="to profile; default 3")
    whole_option(p, "--warmup", within=(0, MOST_STEPS), default=2, help="steps before, without the profiler; default 2")


def _top(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Show a running or finished run: curves, held-out rewards, seconds of each stage, how busy each resource is, "
        "and what has gone wrong. Reads files only, so it works from another terminal or machine. Ctrl-C leaves."
    )
    p.add_argument("run", help="folder of the run")
    p.add_argument("--once", action="store_true", help="print once and leave, as it does where stdout is no terminal")


def _sample(p: argparse.ArgumentParser) -> None:
    p.description = "Draw pieces from a policy and write them as MIDI, and as WAV with --wav."
    p.add_argument("--policy", default="pop909-tiny", help="shipped name, checkpoint or run folder, hub id, or NotaGen")
    p.add_argument("--vocabulary", default="", help="MidiTok JSON or preset, for a checkpoint without its own")
    p.add_argument("--out", default="songs", help="folder for the files")
    whole_option(p, "-n", "--number", within=(1, MOST_AT_ONCE), default=8, help="pieces")
    p.add_argument(
        "--style",
        action="append",
        default=[],
        help="of a policy that knows styles: one of them, or STYLE/COMPOSER; of NotaGen "
        "Period/Composer/Instrumentation; repeatable, then the pieces take turns",
    )
    real_option(
        p,
        "--guidance",
        within=(0, math.inf),
        help="how much more --style counts than in the policy itself; takes twice the time; default: 1",
    )
    p.add_argument("--time-signature", action="append", help="such as 4/4; repeatable; default: 4/4")
    real_option(
        p,
        "--tempo",
        nargs=2,
        within=(0, math.inf),
        above=True,
        metavar=("LOW", "HIGH"),
        help="bpm; default: from 60 to 150",
    )
    p.add_argument(
        "--prompt", help="MIDI file to continue, its notes and tempo as the tokens nearest to them, in a metre it knows"
    )
    whole_option(p, "--bars", within=(1, MOST_AT_ONCE), help="of --prompt that are taken; default: all")
    whole_option(
        p,
        "--max-tokens",
        within=(1, MOST_AT_ONCE),
        help="length; default: 500, where a note costs three to four; of NotaGen 16,384, which are characters",
    )
    real_option(p, "--temperature", within=(0, math.inf), above=True, help="default: 1; of NotaGen 1.2")
    whole_option(
        p,
        "--top-k",
        within=(0, 2**31 - 1),
        help="draw from the k likeliest tokens only; default: 0 = all; of NotaGen 9",
    )
    real_option(
        p,
        "--top-p",
        within=(0, 1),
        above=True,
        help="draw from the likeliest tokens of this mass; default: 1 = all; of NotaGen 0.9",
    )
    p.add_argument("--engine", default="native", help="native or vllm")
    whole_option(p, "--seed", within=(0, LARGEST_SEED), default=0)
    p.add_argument("--wav", action="store_true", help="render each piece too")
    p.add_argument("--soundfont", default="", help="default: one that is installed")


def _render(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Render MIDI files, or all below a folder, to 48 kHz stereo with FluidSynth, sustain pedal included."
    )
    p.add_argument("files", nargs="+", help="MIDI files or folders")
    p.add_argument("--out", default="", help="folder for the audio; default: beside each MIDI file")
    p.add_argument("--flac", action="store_true", help="FLAC files; default: WAV")
    p.add_argument("--reverb", action="store_true", help="in a room; rewards never hear one")
    p.add_argument("--soundfont", default="", help="default: one that is installed")
    whole_option(p, "--workers", within=(0, MOST_THREADS), default=0, help="files at once; default: one a core")


def _bank(p: argparse.ArgumentParser) -> None:
    p.description = (
        "The note bank training renders from. It fills itself as notes are asked for; build fills it beforehand, "
        "verify compares it with FluidSynth on your own MIDI files."
    )
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("info", help="the banks on this machine")
    build = actions.add_parser("build", help="store every note of a piano")
    verify = actions.add_parser("verify", help="signal-to-noise ratio against FluidSynth, in dB")
    verify.add_argument("files", nargs="+", help="MIDI files or folders")
    whole_option(verify, "--clips", within=(1, MOST_AT_ONCE), default=20, help="windows of the files to compare")
    verify.add_argument("--exact", action="store_true", help="with every note rendered on demand")
    for action in (build, verify):
        action.add_argument("--soundfont", default="", help="default: one that is installed")
        whole_option(
            action,
            "--sample-rate",
            within=(8000, 96_000),
            default=16000,
            help="Hz; default: the rewards' 16000",
        )
        real_option(action, "--max-seconds", within=(0.01, 3600), default=10.0, help="of a clip")
        whole_option(action, "--program", within=(0, 127), default=0, help="General MIDI program; default: the piano")
        whole_option(action, "--workers", within=(0, MOST_THREADS), default=0, help="processes; default: one a core")


def _score(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Score MIDI files (rendered first where the reward listens) and WAV or FLAC files: one JSON line each."
    )
    p.add_argument("files", nargs="+", help="MIDI, WAV or FLAC files, or folders")
    p.add_argument("--reward", action="append", required=True, help="name of a reward; repeatable")
    p.add_argument("--out", default="", help="file for the lines; default: standard output")
    p.add_argument("--resume", action="store_true", help="leave out what --out holds already; errors are tried again")
    p.add_argument(
        "--checkpoint", default="", help="Audiobox weights: a file, a folder, or 'random'; default: the hub's"
    )
    p.add_argument("--dtype", default="", help="of Audiobox: float32 (default), bfloat16, float16, int8 (CPU) or auto")
    p.add_argument("--device", default="cpu", help="torch device of Audiobox and CLAP")
    p.add_argument("--taste", default="", help="file of a taste, for taste")
    p.add_argument(
        "--constraint", action="append", default=[], metavar="KEY=VALUE", help="what constraint asks for; repeatable"
    )
    p.add_argument("--clap-model", default="", help="folder or hub id of a ClapModel")
    p.add_argument("--clap-prompt", default="", help="text for clap_similarity")
    p.add_argument("--clap-class", action="append", default=[], help="texts for clap_class, the wanted one first")
    p.add_argument("--set", action="append", default=[], metavar="reward.KEY=VALUE", help="another option of a reward")
    p.add_argument("--statistics", default="", help="typicality.json of real pieces; default: the shipped policy's")
    real_option(p, "--max-seconds", within=(0, 86_400), default=10.0, help="of each MIDI file; 0 = all of it")
    p.add_argument("--soundfont", default="", help="default: one that is installed")


def _pretrain(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Train a base policy: OUT/policy is the best checkpoint, OUT/release a 16-bit copy with its model card, "
        "statistics of the real pieces and a table of how it plays."
    )
    p.add_argument("--midi", required=True, help="folder of MIDI files, read with all below it")
    p.add_argument("--out", required=True, help="folder of the run")
    p.add_argument("--name", default="", help="name and source of the data, for the model card")
    p.add_argument("--licence", default="", help="licence of the data, for the model card")
    p.add_argument("--vocabulary", default="smart", help="preset, MidiTok JSON or hub id")
    p.add_argument(
        "--styles",
        action="append",
        default=[],
        metavar="CSV|STYLE=FOLDER",
        help="columns path, style and perhaps composer, split; or a folder of one style; repeatable: train a policy "
        "that is asked for styles",
    )
    p.add_argument("--init", help="policy whose weights are trained on; default: fresh ones of the sizes below")
    p.add_argument("--dtype", help="float32, the default, or bfloat16, of the matrices multiplied in training")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    whole_option(p, "--steps", within=(1, MOST_STEPS), help="optimizer steps at most")
    whole_option(p, "--batch", within=(1, MOST_AT_ONCE), help="rows a step")
    whole_option(p, "--length", within=(8, MOST_AT_ONCE), help="tokens a row")
    real_option(p, "--learning-rate", within=(0, math.inf), above=True)
    whole_option(
        p, "--style-steps", within=(0, MOST_STEPS), help="last steps, in which only tokens of styles learn; default 0"
    )
    whole_option(p, "--patience", within=(1, MOST_STEPS), help="evaluations without improvement before stopping early")
    whole_option(p, "--eval-every", within=(1, MOST_STEPS), help="steps between evaluations")
    whole_option(p, "--valid-rows", within=(1, MOST_AT_ONCE), help="rows of an evaluation")
    whole_option(p, "--seed", within=(0, LARGEST_SEED))
    whole_option(p, "--layers", within=(1, 1024), default=4)
    whole_option(p, "--hidden", within=(2, 2**16), default=256)
    whole_option(p, "--ffn", within=(1, 2**18), default=768)
    whole_option(p, "--heads", within=(1, 2**12), default=4)
    p.add_argument("--device", help="torch device; default cpu")
    whole_option(
        p, "--threads", within=(0, MOST_THREADS), default=0, help="CPU threads; default: OMP_NUM_THREADS or one a core"
    )
    p.add_argument("--compile", action="store_true", help="fuse the network with torch.compile (needs a C++ compiler)")
