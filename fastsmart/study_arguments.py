"""Options of the commands that compare, show and judge what policies play; those of the others are in `cli`."""

from __future__ import annotations

import argparse

from fastsmart.arguments import alphas, real_option, settings_options, weighted, whole_option
from fastsmart.limits import MOST_AT_ONCE, MOST_COMPONENTS, MOST_THREADS


def evaluate(p: argparse.ArgumentParser) -> None:
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
    settings_options(p)
    evaluation(p)
    p.add_argument("--clamp", default="", help="weights of M3, CLaMP 2 or CLaMP 3 to measure with, too; docs/clamp.md")
    p.add_argument("--clamp-styles", default="", help="real music it compares with, a file of style-stats")
    p.add_argument("--out", required=True, help="folder of the evaluation; what is there is not played again")


def evaluation(p: argparse.ArgumentParser) -> None:
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


def blend(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Write checkpoints whose weights are base + alpha (tuned - base), ready for evaluate: points between the two "
        "policies that cost no training."
    )
    p.add_argument("run", metavar="RUN", help="folder of a run or of a checkpoint: the tuned policy")
    p.add_argument("--alphas", type=alphas, default="0.25,0.5,0.75,1", help="from 0 to 1; default 0.25,0.5,0.75,1")
    p.add_argument("--base", default="", metavar="POLICY", help="default: the policy the run started from")
    p.add_argument(
        "--add",
        action="append",
        type=weighted,
        default=[],
        metavar="RUN:WEIGHT",
        help="another policy tuned from the base, whose change is added with this weight; repeatable",
    )
    real_option(
        p,
        "--temperature",
        within=(0.1, 10.0),
        default=1.0,
        help="play, sampled at 1, as they otherwise would at this temperature; default 1",
    )
    p.add_argument("--average", action="store_true", help="of the mean weights that train.average has kept")
    p.add_argument("--out", default="", help="folder for them; default: RUN/blends")


def frontier(p: argparse.ArgumentParser) -> None:
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


def report(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Write one self-contained HTML page: findings, players, figures, tables, settings. A run is first compared "
        "with the policy it started from, into RUN/evaluation."
    )
    p.add_argument("source", metavar="RUN|EVALUATION", help="folder of a run or of an evaluation")
    p.add_argument("--out", default="", help="HTML file; default: report.html in the folder")
    whole_option(
        p, "--players", within=(0, 1000), help="held-out prompts to listen to, 0 = none; default 6, or 3 of each style"
    )
    whole_option(p, "-n", "--prompts", within=(2, MOST_AT_ONCE), default=200, help="of a run's evaluation; default 200")
    whole_option(
        p, "--best-of", within=(0, 10_000), default=4, metavar="N", help="of a run's evaluation; default 4, 0 = none"
    )
    p.add_argument("--training-set", default="", help="of a run's evaluation: MIDI files to look for copies in")


def live(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Serve one page on this machine: it plays two short pieces, asks which you like, and has the policy trained on "
        "your answers while you listen. Everything is in OUT, and starting again goes on there."
    )
    p.add_argument("--policy", help="that plays at first; default: that of OUT, in a new one pop909-tiny")
    p.add_argument("--out", required=True, help="folder of choices, clips, taste and the run that is trained")
    p.add_argument("--listener", help="name that choices are written down under; default: as before, at first me")
    p.add_argument("--joint", action="store_true", help="one taste of all listeners; default: each has one")
    p.add_argument("--continue", dest="phrase", default="", metavar="MIDI", help="begin with answers to this phrase")
    whole_option(p, "--bars", within=(1, MOST_AT_ONCE), help="of --continue that are taken; default: all")
    real_option(p, "--seconds", within=(2, 60), help="longest piece that is compared; default: 10")
    whole_option(p, "--max-tokens", within=(8, 4096), help="of a piece; default: 250")
    whole_option(p, "--boldness", within=(0, 10), help="how far it goes to your taste; default: as before, at first 6")
    whole_option(
        p,
        "--embedding",
        within=(0, MOST_COMPONENTS),
        metavar="C",
        help="let the taste hear C components of what the policy makes of a clip, beside named features; default: 0",
    )
    p.add_argument("--no-training", action="store_true", help="write choices down and learn from them, train nothing")
    p.add_argument("--replay", default="", metavar="CHOICES", help="train from a choices.jsonl without the page")
    p.add_argument("--host", help="address to listen at; default: 127.0.0.1, which only this machine reaches")
    whole_option(p, "--port", within=(0, 65_535), help="0 = any that is free; default: 8723")
    whole_option(p, "--threads", within=(1, MOST_THREADS), help="that playing computes with; default: 1")
    p.add_argument("--soundfont", default="", help="default: one that is installed")


def listen(p: argparse.ArgumentParser) -> None:
    jobs = p.add_subparsers(dest="job", required=True, metavar="JOB")
    make = jobs.add_parser("make", help="a page for listeners, and its key")
    make.description = (
        "Write OUT/page/listen.html, which is all a listener gets, and OUT/key.json, which says what the clips are and "
        "stays with you. Listeners send back the file the page gives them."
    )
    make.add_argument("evaluation", help="folder of an evaluation")
    make.add_argument("--out", required=True, help="folder of the test")
    make.add_argument(
        "--design",
        choices=["rating", "ab", "sets", "styles"],
        default="rating",
        help="a clip at a time, two, two sets, or a clip at a time whose style is to be told",
    )
    make.add_argument("--policy", action="append", help="label of a policy; repeatable; default: the first two")
    whole_option(make, "--prompts", within=(1, MOST_AT_ONCE), help="default 15; 36 for sets, 28 for styles")
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


def style_stats(p: argparse.ArgumentParser) -> None:
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


def sweep(p: argparse.ArgumentParser) -> None:
    p.description = (
        "Train every run of a sweep file, evaluate them together, and draw reward against diversity. What is there is "
        "not done again: the same command goes on after a stop. docs/over-optimisation.toml is a sweep file."
    )
    p.add_argument("sweep", help="TOML file with a [grid] or [[runs]]")
    p.add_argument("--out", required=True, help="folder of the sweep")
    whole_option(
        p, "--index", within=(0, MOST_AT_ONCE), help="only the run of this number, from 0, as a job of an array"
    )
    p.add_argument("--training-set", default="", help="folder of MIDI files to look for copies in")
    p.add_argument("--dry-run", action="store_true", help="list the runs and leave")
