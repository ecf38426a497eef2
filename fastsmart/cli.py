"""The command line: one subcommand a job. Their bodies are in `fastsmart.commands`."""

from __future__ import annotations

import argparse
import errno
import math
import sys
from collections.abc import Sequence

from fastsmart.arguments import Parser, Version, alphas, real_option, refuse_empty_names, whole_option
from fastsmart.errors import UserError
from fastsmart.limits import LARGEST_SEED, MOST_AT_ONCE, MOST_STEPS, MOST_THREADS
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
    _evaluate(commands.add_parser("evaluate", help="compare policies: rewards, features, diversity, with intervals"))
    _blend(commands.add_parser("blend", help="weights between a tuned policy and the one it was tuned from"))
    _frontier(commands.add_parser("frontier", help="reward against diversity of everything in evaluations"))
    _report(commands.add_parser("report", help="a run or an evaluation as one page to read and hear"))
    _listen(commands.add_parser("listen", help="a blind listening test: make it, analyse it, plan it"))
    _live(commands.add_parser("live", help="a page that plays, listens, and has a policy learn what you like"))
    _sweep(commands.add_parser("sweep", help="several runs, and the frontier of reward and diversity they draw"))
    _style_stats(commands.add_parser("style-stats", help="real pieces of several styles as CLaMP hears them"))
    commands.add_parser("doctor", help="what this machine has, what is missing, and the command that mends it")
    commands.add_parser("selfcheck", help="whether all stages compute here what they should, in two minutes")
    return top


def _settings(p: argparse.ArgumentParser) -> None:
    p.add_argument("--preset", help="demo, smart-paper, smart-released or h200")
    p.add_argument("--config", help="TOML file with the keys that --dry-run prints")
    p.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="set one key; repeatable")


def _train(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Tune a policy. Settings come from the preset, then the config file, then each --set, in this order."
    )
    _settings(p)
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
    _settings(p)
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
    _settings(p)
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
        "--prompt", help="MIDI file to continue, its notes, metre and tempo kept as the tokens nearest to them"
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
    p.add_argument("--dtype", default="float32", help="of Audiobox: float32, bfloat16, float16, or int8 (CPU)")
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
    whole_option(p, "--patience", within=(1, MOST_STEPS), help="evaluations without improvement before stopping early")
    whole_option(p, "--eval-every", within=(1, MOST_STEPS), help="steps between evaluations")
    whole_option(p, "--valid-rows", within=(1, MOST_AT_ONCE), help="rows of an evaluation")
    whole_option(p, "--seed", within=(0, LARGEST_SEED))
    whole_option(p, "--layers", within=(1, 1024), default=4)
    whole_option(p, "--hidden", within=(2, 2**16), default=256)
    whole_option(p, "--ffn", within=(1, 2**18), default=768)
    whole_option(p, "--heads", within=(1, 2**12), default=4)
    p.add_argument("--device", help="torch device; default cpu")
    whole_option(p, "--threads", within=(0, MOST_THREADS), default=0, help="CPU threads; default: one a core")
    p.add_argument("--compile", action="store_true", help="fuse the network with torch.compile (needs a C++ compiler)")


def _evaluate(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Have policies play the same held-out prompts and write what their music is worth, what it is like and how "
        "diverse it is, as JSON and CSV with bootstrap intervals. Prompts, sampling, rewards and soundfont are those "
        "of --preset, --config and --set; without them, of the first run among the policies, else of preset demo."
    )
    p.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="[LABEL=]POLICY",
        help="shipped name, checkpoint or run folder, or hub id; repeatable; the others are compared with the first. "
        "A run alone is compared with the policy it started from",
    )
    _settings(p)
    _evaluation(p)
    p.add_argument("--clamp", default="", help="weights of M3, CLaMP 2 or CLaMP 3 to measure with, too; docs/clamp.md")
    p.add_argument("--clamp-styles", default="", help="real music it compares with, a file of style-stats")
    p.add_argument("--out", required=True, help="folder of the evaluation; what is there is not played again")


def _evaluation(p: argparse.ArgumentParser) -> None:
    whole_option(
        p,
        "-n",
        "--prompts",
        within=(2, MOST_AT_ONCE),
        default=1000,
        help="outputs of each policy, the held-out openings in turn; default 1000",
    )
    whole_option(
        p,
        "--best-of",
        within=(0, 10_000),
        default=8,
        metavar="N",
        help="outputs of the baseline's choice; default 8, 0 = none",
    )
    p.add_argument("--soundfont", action="append", default=[], help="score on this one too; repeatable")
    p.add_argument("--training-set", default="", help="folder of MIDI files to look for copies in")


def _blend(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Write checkpoints whose weights are base + alpha (tuned - base), ready for evaluate: points between the two "
        "policies that cost no training."
    )
    p.add_argument("run", metavar="RUN", help="folder of a run or of a checkpoint: the tuned policy")
    p.add_argument("--alphas", type=alphas, default="0.25,0.5,0.75,1", help="from 0 to 1; default 0.25,0.5,0.75,1")
    p.add_argument("--base", default="", metavar="POLICY", help="default: the policy the run started from")
    p.add_argument("--average", action="store_true", help="of the mean weights that train.average has kept")
    p.add_argument("--out", default="", help="folder for them; default: RUN/blends")


def _frontier(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Set policies, blends, best of n and the re-weighting frontier of evaluations beside each other: what each has "
        "of the reward gain and of the base's diversity, the hypervolume, and the most of one at 90 % of the other."
    )
    p.add_argument("evaluation", nargs="+", help="folders of evaluations with the same base, prompts and rewards")
    p.add_argument("--out", default="", metavar="PICTURE", help="draw it into this .svg or .png file")
    p.add_argument(
        "--measure", action="append", help="metric of diversity, or rarefied_mean_distance; repeatable, a panel each"
    )
    p.add_argument("--full", default="", metavar="LABEL", help="whose gain is 100 %%; default: the policy's with most")


def _report(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Write one self-contained HTML page: findings, players, figures, tables, settings. A run is first compared "
        "with the policy it started from, into RUN/evaluation."
    )
    p.add_argument("source", metavar="RUN|EVALUATION", help="folder of a run or of an evaluation")
    p.add_argument("--out", default="", help="HTML file; default: report.html in the folder")
    whole_option(p, "--players", within=(0, 1000), default=6, help="held-out prompts to listen to; default 6, 0 = none")
    whole_option(p, "-n", "--prompts", within=(2, MOST_AT_ONCE), default=200, help="of a run's evaluation; default 200")
    whole_option(
        p, "--best-of", within=(0, 10_000), default=4, metavar="N", help="of a run's evaluation; default 4, 0 = none"
    )
    p.add_argument("--training-set", default="", help="of a run's evaluation: MIDI files to look for copies in")


def _live(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Serve one page on this machine: it plays two short pieces, asks which you like, and has the policy trained on "
        "your answers while you listen. Everything is in OUT, and starting again goes on there."
    )
    p.add_argument("--policy", help="that plays at first; default: pop909-tiny")
    p.add_argument("--out", required=True, help="folder of choices, clips, taste and the run that is trained")
    p.add_argument("--listener", help="name that choices are written down under; default: me")
    p.add_argument("--joint", action="store_true", help="one taste of all listeners; default: each has one")
    p.add_argument("--continue", dest="phrase", default="", metavar="MIDI", help="begin with answers to this phrase")
    whole_option(p, "--bars", within=(1, MOST_AT_ONCE), help="of --continue that are taken; default: all")
    real_option(p, "--seconds", within=(2, 60), help="longest piece that is compared; default: 10")
    whole_option(p, "--max-tokens", within=(8, 4096), help="of a piece; default: 250")
    whole_option(p, "--boldness", within=(0, 10), help="how far from the first policy it may go; default: 5")
    p.add_argument("--no-training", action="store_true", help="write choices down and learn from them, train nothing")
    p.add_argument("--replay", default="", metavar="CHOICES", help="train from a choices.jsonl without the page")
    p.add_argument("--host", help="address to listen at; default: 127.0.0.1, which only this machine reaches")
    whole_option(p, "--port", within=(0, 65_535), help="0 = any that is free; default: 8723")
    whole_option(p, "--threads", within=(1, MOST_THREADS), help="that playing computes with; default: 1")
    p.add_argument("--soundfont", default="", help="default: one that is installed")


def _listen(p: argparse.ArgumentParser) -> None:
    jobs = p.add_subparsers(dest="job", required=True, metavar="JOB")
    make = jobs.add_parser("make", help="a page for listeners, and its key")
    make.description = (
        "Write OUT/page/listen.html, which is all a listener gets, and OUT/key.json, which says what the clips are and "
        "stays with you. Listeners send back the file the page gives them."
    )
    make.add_argument("evaluation", help="folder of an evaluation")
    make.add_argument("--out", required=True, help="folder of the test")
    make.add_argument(
        "--design", choices=["rating", "ab", "sets"], default="rating", help="a clip at a time, two, or two sets"
    )
    make.add_argument("--policy", action="append", help="label of a policy; repeatable; default: the first two")
    whole_option(make, "--prompts", within=(1, MOST_AT_ONCE), help="default 15; 36 for sets")
    whole_option(make, "--set-size", within=(2, 12), default=6, metavar="N", help="clips of a set; default 6")
    real_option(make, "--seconds", within=(5, 60), default=10.0, help="of each clip; default 10")
    whole_option(make, "--checks", within=(0, 1000), default=2, help="attention checks; default 2")
    whole_option(make, "--repeats", within=(0, 1000), default=2, help="trials that come twice; default 2")
    make.add_argument("--question", default="", help="what is asked of every trial; a rating is from bad to excellent")
    analyse = jobs.add_parser("analyse", help="what the listeners said")
    analyse.description = (
        "Means, and differences between policies that hold for other listeners and prompts: both are random effects, "
        "with by-listener slopes of the policy. Then the chance to find them again with more listeners."
    )
    analyse.add_argument("answers", nargs="+", help="files that listeners sent back, or folders of them")
    analyse.add_argument("--key", required=True, help="key.json of the test")
    analyse.add_argument("--out", default="", help="write all figures here as JSON")
    analyse.add_argument("--keep-inattentive", action="store_true", help="keep who failed an attention check")
    power = jobs.add_parser("power", help="how many listeners a difference needs")
    power.description = (
        "The chance that a test of the given size finds a difference at p < .05, for 5 to 50 listeners. Standard "
        "deviations are points of rating or, for --design ab, log-odds of a choice."
    )
    power.add_argument("--design", choices=["rating", "ab"], default="rating")
    power.add_argument(
        "--effect", type=float, required=True, help="points of rating, or chance to be chosen (0.5 = none)"
    )
    power.add_argument("--sd", type=float, default=1.0, help="of one rating beside all else; not of ab; default 1")
    power.add_argument("--clip-sd", type=float, default=0.4, help="between clips of a policy; default 0.4")
    power.add_argument("--taste-sd", type=float, default=0.4, help="between listeners' tastes for it; default 0.4")
    power.add_argument("--prompts", type=int, default=15, help="default 15")


def _style_stats(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Let an encoder of music hear windows of real pieces of several styles, and keep what it heard: clamp_style, "
        "clamp_score and evaluate compare with it. Says how well it tells the styles apart."
    )
    p.add_argument("source", help="folder with a folder of MIDI files for each style, or a CSV of path and style")
    p.add_argument("--checkpoint", required=True, help="weights: a published file, or m3, clamp2, clamp3, or 'random'")
    p.add_argument("--out", required=True, help="file to write, such as styles.safetensors")
    p.add_argument("--split", default="", help="only rows of the CSV with this in their column split, such as train")
    p.add_argument("--vocabulary", default="smart", help="through whose tokens pieces go: preset, folder or hub id")
    real_option(p, "--window", within=(1, 600), default=10.0, help="seconds, as long as the policy's clips; default 10")
    whole_option(p, "--windows", within=(1, MOST_AT_ONCE), default=500, help="most of one style; default 500")
    p.add_argument("--writer", default="note_on", choices=["note_on", "note_off"], help="how notes are written to end")
    p.add_argument("--device", default="cpu", help="torch device")


def _sweep(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Train every run of a sweep file, evaluate them together, and draw reward against diversity. What is there is "
        "not done again: the same command goes on after a stop. docs/over-optimisation.md shows a sweep file."
    )
    p.add_argument("sweep", help="TOML file with a [grid] or [[runs]]")
    p.add_argument("--out", required=True, help="folder of the sweep")
    whole_option(
        p, "--index", within=(0, MOST_AT_ONCE), help="only the run of this number, from 0, as a job of an array"
    )
    p.add_argument("--training-set", default="", help="folder of MIDI files to look for copies in")
    p.add_argument("--dry-run", action="store_true", help="list the runs and leave")
