"""The bodies of evaluate, frontier, report, listen, sweep and style-stats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastsmart.errors import UserError
from fastsmart.machine.files import files_below
from fastsmart.words import counted

if TYPE_CHECKING:
    from fastsmart.config import Config


def evaluate(options: argparse.Namespace) -> int:
    from fastsmart.machine.progress import stage_bars
    from fastsmart.study.choosing import choosing_text
    from fastsmart.study.evaluate import evaluate as run_evaluation

    config, policies = _study_config(options), options.policy
    if len(policies) == 1 and _is_run(policies[0]):
        policies = [config.policy.source, *policies]
    with stage_bars() as show:
        found = run_evaluation(
            policies,
            options.out,
            config,
            options.prompts,
            options.best_of,
            options.soundfont,
            options.training_set,
            show,
            clamp=options.clamp,
            clamp_styles=options.clamp_styles,
        )
    print(found.text())
    print(choosing_text(found))
    if found.record.get("clamp", {}).get("trained_on"):
        print("beware: the reward is CLaMP's, too, so what CLaMP measures here was trained on")
    if found.record.get("clamp", {}).get("random"):
        print("beware: the weights of CLaMP are random, what it measures means nothing")
    print(f"all of it is in {found.path / 'metrics.csv'}; as a page: fastsmart report {found.path}")
    return 0


def style_stats(options: argparse.Namespace) -> int:
    from fastsmart.machine.progress import stage_bars
    from fastsmart.policy.device import usable_device
    from fastsmart.reward.clamp3 import MusicReader
    from fastsmart.study.style_stats import StyleStatsSettings, style_stats, style_table
    from fastsmart.tokens.vocabulary import load_vocabulary

    usable_device(options.device, "--device")
    settings = StyleStatsSettings(options.writer, options.window, options.windows, options.split)
    vocab = load_vocabulary(options.vocabulary)
    with stage_bars() as show:
        reader = MusicReader(options.checkpoint, options.device)
        real = style_stats(options.source, reader, vocab, settings, show)
    real.save(options.out)
    print(style_table(real))
    if reader.random:
        print("beware: the weights are random, none of this means anything")
    print(f"{counted(len(real.vectors), 'window')} as {reader.kind} hears them are in {options.out}")
    return 0


def frontier(options: argparse.Namespace) -> int:
    from fastsmart.study.evaluation import Evaluation
    from fastsmart.study.frontier import MEASURES, Frontier
    from fastsmart.study.report import write_frontier

    out = Path(options.out) if options.out else None
    if out and out.suffix not in (".svg", ".png"):
        raise UserError(f"--out {out} names no picture; end it with .svg or .png")
    found = [Evaluation.open(path) for path in options.evaluation]
    points = Frontier.of(found, options.measure or MEASURES, options.full)
    print(points.text())
    if out:
        write_frontier(points, out)
        print(f"the picture is {out}")
    return 0


def report(options: argparse.Namespace) -> int:
    from fastsmart.machine.progress import stage_bars
    from fastsmart.run.folder import RunFolder
    from fastsmart.study.evaluate import evaluate as run_evaluation
    from fastsmart.study.evaluation import EVALUATION_FILE, Evaluation
    from fastsmart.study.report import write_report

    source = Path(options.source)
    with stage_bars() as show:
        if (source / EVALUATION_FILE).is_file():
            found = Evaluation.open(source)
        elif _is_run(options.source):
            config, folder = RunFolder.reopen(source).config, source / "evaluation"
            policies = [config.policy.source, options.source]
            found = run_evaluation(
                policies, folder, config, options.prompts, options.best_of, (), options.training_set, show
            )
        else:
            raise UserError(f"{source} is neither a run nor an evaluation; name a folder that train or evaluate made")
        page = write_report(found, options.out or source / "report.html", options.players, show)
    print(found.basis)
    print(f"open {page} in a browser")
    return 0


def sweep(options: argparse.Namespace) -> int:
    from fastsmart.study.sweep import read_sweep

    plan = read_sweep(options.sweep)
    if options.dry_run:
        for number, (name, config) in enumerate(plan.runs.items()):
            print(f"{number}  {name}: {counted(config.train.steps, 'step')}")
        return 0

    from fastsmart.machine.progress import stage_bars
    from fastsmart.run.display import Plain
    from fastsmart.study.evaluation import EVALUATION_FILE, Evaluation
    from fastsmart.study.sweep import run_sweep

    with stage_bars() as show:
        exit_code = run_sweep(plan, options.out, options.index, options.training_set, Plain, show)
    if exit_code == 0:
        if (Path(options.out) / "evaluation" / EVALUATION_FILE).is_file():  # else other jobs of the array are to come
            print(Evaluation.open(Path(options.out) / "evaluation").basis)
        print(f"runs, evaluation, figures/frontier.svg and report.html are in {options.out}")
    return exit_code


def listen(options: argparse.Namespace) -> int:
    return {"make": _listen_make, "analyse": _listen_analyse, "power": _listen_power}[options.job](options)


def _listen_make(options: argparse.Namespace) -> int:
    from fastsmart.machine.progress import stage_bars
    from fastsmart.study.evaluation import Evaluation
    from fastsmart.study.listening import PROMPTS, ListeningSettings, make_test

    prompts = options.prompts if options.prompts is not None else PROMPTS[options.design]
    settings = ListeningSettings(
        options.design, prompts, options.seconds, options.checks, options.repeats, options.question, options.set_size
    )
    with stage_bars() as show:
        page, key = make_test(Evaluation.open(options.evaluation), options.out, settings, options.policy, show)
    print(f"send {page} to listeners; keep {key}, and analyse with: fastsmart listen analyse ANSWERS --key {key}")
    return 0


def _listen_analyse(options: argparse.Namespace) -> int:
    from fastsmart.machine.files import write_atomic
    from fastsmart.study.ratings import analyse, as_text, read_answers

    files = [path for path, _ in files_below(options.answers, (".json",)) if path.name != Path(options.key).name]
    result = analyse(read_answers(files, options.key, options.keep_inattentive))
    print(as_text(result))
    if options.out:
        write_atomic(options.out, json.dumps(result, indent=1) + "\n")
    return 0


def _listen_power(options: argparse.Namespace) -> int:
    from fastsmart.study.mixed import choice_power, rating_power
    from fastsmart.study.ratings import LISTENERS

    _check_power(options)
    spread = {"taste": options.taste_sd, "clip": options.clip_sd}
    for listeners in LISTENERS:
        if options.design == "rating":
            power = rating_power(options.effect, spread | {"residual": options.sd}, listeners, options.prompts)
        else:
            power = choice_power(options.effect, spread, listeners, options.prompts)
        print(f"{listeners:3d} listeners: {power:.0%}")
    return 0


def _check_power(options: argparse.Namespace) -> None:
    """Raise UserError for a number that no listening test can have."""
    if not 2 <= options.prompts <= 1000:
        raise UserError(f"--prompts is {options.prompts}; a test needs from 2 to 1000")
    for name in ("sd", "clip_sd", "taste_sd"):
        if not 0 <= (value := getattr(options, name)) <= 100:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}; a standard deviation is from 0 to 100")
    if options.design == "ab" and not 0 < options.effect < 1:
        raise UserError(f"--effect is {options.effect:g}; with --design ab it is a chance between 0 and 1")
    if not abs(options.effect) <= 100:
        raise UserError(f"--effect is {options.effect:g}; name a difference of at most 100 points")


def _study_config(options: argparse.Namespace) -> Config:
    """The config asked for; that of the first run among the policies where none was; else the demo's."""
    from fastsmart.config import Config, read_config, with_overrides
    from fastsmart.presets import load_preset
    from fastsmart.run.folder import CONFIG_FILE

    runs = [Path(_source(p)) / CONFIG_FILE for p in options.policy if _is_run(p)]
    if options.preset or options.config:
        config = load_preset(options.preset) if options.preset else Config()
    else:
        config = read_config(runs[0]) if runs else load_preset("demo")
    if options.config:
        config = read_config(options.config, config)
    return with_overrides(config, options.set)


def _source(policy: str) -> str:
    return policy.partition("=")[2] or policy


def _is_run(policy: str) -> bool:
    return (Path(_source(policy)) / "config.toml").is_file()
