"""The bodies of the subcommands: each reads its options, calls the job and says what came of it."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmart.errors import UserError
from fastsmart.notes import MIDI_SUFFIXES

if TYPE_CHECKING:
    from fastsmart.audio import RenderSettings
    from fastsmart.config import Config

AUDIO_SUFFIXES = (".wav", ".flac")


def train(options: argparse.Namespace) -> int:
    from fastsmart.config import to_toml
    from fastsmart.train.folder import RunFolder
    from fastsmart.train.ranks import join_ranks

    config, chosen = _run_config(options)
    if options.dry_run:
        print(to_toml(config), end="")
        if config.sampling.engine == "vllm" and not config.sampling.vllm.server:
            print(f"\n# {vllm_memory(config)}")
        return 0
    if not options.out:
        raise UserError("name the folder of the run with --out, for example --out runs/demo")
    ranks = join_ranks()
    resume = options.resume == "yes" or (options.resume == "auto" and RunFolder.begun(options.out))
    resume = bool(ranks.same(resume))  # rank 0 may be about to start the run
    if resume and chosen and RunFolder.reopen(options.out).config != config:
        raise UserError(
            f"{options.out} holds a run with other settings; leave out --preset, --config, --set, --engine and --async "
            "to go on with its own config.toml, or choose another --out"
        )
    if not resume:
        _need_reward(config)

    from fastsmart.train.display import Plain, Terminal
    from fastsmart.train.loop import train as run_training

    run = run_training(config, options.out, resume, Terminal() if sys.stdout.isatty() else Plain(), ranks)
    ranks.close()
    table = run.path / "before_after.md"
    if run.after and ranks.leader:
        print(table.read_text(encoding="utf-8"))
        print(f"listen to {run.path / 'listen'}, look at {run.path / 'curves.png'}")
    return run.exit_code


def profile(options: argparse.Namespace) -> int:
    config, _ = _run_config(options)
    _need_reward(config)

    from fastsmart.progress import bar
    from fastsmart.study.profile import write_page
    from fastsmart.train.profile import profile as run_profile

    with bar("profiling") as show:
        found = run_profile(config, options.out, options.steps, options.warmup, show)
    page = write_page(found, Path(options.out) / "profile.html")
    for cost in found["costs"]:
        print(f"{cost['share']:.0%} of a step  {cost['what']}")
    print(f"open {page} in a browser, and {page.with_name('trace.json')} at ui.perfetto.dev")
    return 0


def _run_config(options: argparse.Namespace) -> tuple[Config, bool]:
    """The config of preset, file and options, in this order, and whether there was any of them."""
    from fastsmart.config import Config, assigned, read_config
    from fastsmart.presets import load_preset

    config = load_preset(options.preset) if options.preset else Config()
    if options.config:
        config = read_config(options.config, config)
    sets = options.set + ([f"sampling.engine={options.engine}"] if options.engine else [])
    sets += [f"train.pipeline={options.pipeline}"] if options.pipeline else []
    return assigned(config, sets), bool(options.preset or options.config or sets)


def _need_reward(config: Config) -> None:
    if not config.reward.terms:
        raise UserError("reward.terms names no reward; start from --preset demo or add --set reward.terms.consonance=1")


def vllm_memory(config: Config) -> str:
    """What vLLM will hold in this process, computed from the policy's config.json."""
    from fastsmart.policy.checkpoint import policy_size
    from fastsmart.sampling.vllm_plan import plan
    from fastsmart.train.provenance import resolved_device, resolved_dtype

    completions = config.train.prompts * config.sampling.group
    rows = min(config.sampling.max_rows, completions)
    dtype, device = resolved_dtype(config.policy), resolved_device(config.policy)
    sampling = replace(config.sampling, max_rows=rows)
    return str(plan(policy_size(config.policy.source), sampling, dtype.itemsize, device.type == "cuda"))


def top(options: argparse.Namespace) -> int:
    import time

    from rich.console import Console
    from rich.live import Live

    from fastsmart.train.top import Top

    view, console = Top(options.run), Console()
    if options.once or not console.is_terminal or view.ended:
        console.print(view.render(), highlight=False)
        return 0
    with Live(view.render(), console=console, auto_refresh=False, screen=True) as live:
        while not view.ended:
            time.sleep(1.0)
            live.update(view.render(), refresh=True)
    console.print(view.render(), highlight=False)
    return 0


def sample(options: argparse.Namespace) -> int:
    from fastsmart import decode, load_policy, prompts
    from fastsmart import sample as draw
    from fastsmart.files import make_folder
    from fastsmart.policy.state import policy_source

    policy = load_policy(policy_source(options.policy), vocabulary=options.vocabulary)
    asked = prompts.procedural(
        policy.vocab,
        options.number,
        seed=options.seed,
        time_signatures=options.time_signature or ["4/4"],
        tempo_range=tuple(options.tempo),
    )
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
    )
    notes = decode(rollout.sequences(), policy.vocab)
    for i in range(len(notes)):
        path = out / f"{i + 1:03d}.mid"
        notes.to_midi(i, path)
        if options.wav:
            _render_one(notes, i, path.with_suffix(".wav"), options.soundfont)
        print(f"{path}  {asked.text(i)}: {int(notes.counts[i])} notes, {notes.end_s[i]:.1f} s")
    return 0


def render(options: argparse.Namespace) -> int:
    from fastsmart.audio import RenderSettings, render_files
    from fastsmart.files import make_folder
    from fastsmart.notes import read_midi
    from fastsmart.progress import bar

    jobs = [
        (path, (Path(options.out) / below if options.out else path).with_suffix(".flac" if options.flac else ".wav"))
        for path, below in _files(options.files, MIDI_SUFFIXES)
    ]
    for folder in {target.parent for _, target in jobs}:
        make_folder(folder)
    settings = RenderSettings(options.soundfont, "fluidsynth", reverb=options.reverb, workers=options.workers)
    failed = 0
    with bar("rendering") as show:
        for done, ((_, target), (_, error)) in enumerate(
            zip(jobs, render_files(jobs, settings, read_midi), strict=True), start=1
        ):
            if error is None:
                print(target, flush=True)
            else:  # this file's fault: the others go on
                print(f"fastsmart: {error}", file=sys.stderr)
                failed += 1
            show(done, len(jobs))
    return 2 if failed else 0


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
    from fastsmart.audio.building import build_bank
    from fastsmart.progress import bar

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

    from fastsmart.audio.building import fidelity
    from fastsmart.notes import NoteBatch, read_midi
    from fastsmart.reward.windows import cut_windows

    paths = [path for path, _ in _files(options.files, MIDI_SUFFIXES)]
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
        print(f"{path}: {int(clip.counts[0])} notes, {decibels:.1f} dB")
    print(f"{len(found)} clips: minimum {min(found):.1f} dB, median {statistics.median(found):.1f} dB")
    return 0


def score(options: argparse.Namespace) -> int:
    from fastsmart.files import os_errors_as_user_errors, write_atomic
    from fastsmart.progress import bar
    from fastsmart.reward import RewardSettings
    from fastsmart.study.scoring import FileScorer, scored_before

    settings = RewardSettings(
        terms=dict.fromkeys(options.reward, 1.0),
        audiobox_checkpoint=options.checkpoint,
        audiobox_dtype=options.dtype,
        clap_model=options.clap_model,
        clap_prompt=options.clap_prompt,
        clap_classes=tuple(options.clap_class),
        clap_class=options.clap_class[0] if options.clap_class else "",
    )
    files = [str(path) for path, _ in _files(options.files, MIDI_SUFFIXES + AUDIO_SUFFIXES)]
    out, before = Path(options.out) if options.out else None, {}
    if out and out.exists():
        if not options.resume:
            raise UserError(f"{out} exists; go on with it with --resume, or choose another --out")
        before = scored_before(out, options.reward)
    scorer = FileScorer(settings, options.statistics, options.soundfont, options.max_seconds, options.device)
    if scorer.random:
        print("fastsmart: the weights of audiobox are random, its scores mean nothing", file=sys.stderr)
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
    return 2 if failed else 0


def pretrain(options: argparse.Namespace) -> int:
    import torch

    from fastsmart.files import cpu_cores
    from fastsmart.policy.crops import CropSettings
    from fastsmart.policy.pretrain import PretrainSettings
    from fastsmart.policy.pretrain import pretrain as run_pretraining
    from fastsmart.policy.transformer import PolicySize
    from fastsmart.progress import bar
    from fastsmart.stopping import stop_signals
    from fastsmart.study.card import STATISTICS_FILE, real_statistics, write_release
    from fastsmart.tokens.dataset import TokenDataset, encode_folder
    from fastsmart.tokens.vocabulary import load_vocabulary

    vocab, out = load_vocabulary(options.vocabulary), Path(options.out)
    torch.set_num_threads(options.threads or cpu_cores())
    if (out / "dataset").is_dir():
        dataset = TokenDataset.open(out / "dataset")
        if dataset.source != str(Path(options.midi).resolve()) or dataset.vocab.tokens != vocab.tokens:
            raise UserError(f"{out / 'dataset'} was encoded from {dataset.source}; choose another --out, or remove it")
    else:
        with bar("encoding") as show:
            dataset = encode_folder(options.midi, out / "dataset", vocab, 0, lambda done, total, _: show(done, total))
    for name, reason in dataset.damaged:
        print(f"left out {name}: {reason}", file=sys.stderr)
    print(f"{len(dataset)} pieces, {dataset.offsets[-1]:,} tokens, {len(dataset.damaged)} damaged files left out")
    given = {
        key: value
        for key in ("steps", "batch", "learning_rate", "patience", "eval_every", "seed", "device")
        if (value := getattr(options, key)) is not None
    }
    settings = PretrainSettings(compile=options.compile, **given)
    if options.length:
        settings = replace(settings, crop=CropSettings(length=options.length))
    size = PolicySize(len(vocab), options.hidden, options.ffn, options.layers, options.heads, options.heads)

    try:
        statistics = real_statistics(dataset, settings, options.name)
    except UserError as error:
        statistics = None
        print(f"the release will have no {STATISTICS_FILE}: {error}", file=sys.stderr)

    def report(line: dict[str, Any]) -> None:
        show(line["step"], settings.steps)
        if "valid_loss" in line:
            rate, losses = line["tokens_per_s"], (line["train_loss"], line["valid_loss"])
            print(
                f"step {line['step']}  training {losses[0]:.3f}  validation {losses[1]:.3f}  {rate:.0f} tokens/s",
                flush=True,
            )

    with stop_signals() as stop, bar("training") as show:
        result = run_pretraining(dataset, size, settings, out, options.resume, stop, report)
    if stop:
        print(f"saved at step {result.step}; go on with --resume")
        return stop.exit_code
    command = shlex.join(["fastsmart", *sys.argv[1:]])
    print(write_release(result, dataset, settings, statistics, out / "release", options.name, options.licence, command))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from fastsmart.progress import stages
    from fastsmart.study.evaluate import evaluate as run_evaluation

    config, policies = _study_config(options), options.policy
    if len(policies) == 1 and _is_run(policies[0]):
        policies = [config.policy.source, *policies]
    with stages() as show:
        found = run_evaluation(
            policies,
            options.out,
            config,
            options.prompts,
            options.best_of,
            options.soundfont,
            options.training_set,
            show,
        )
    print(found.text())
    print(f"all of it is in {found.path / 'metrics.csv'}; as a page: fastsmart report {found.path}")
    return 0


def report(options: argparse.Namespace) -> int:
    from fastsmart.progress import stages
    from fastsmart.study.evaluate import evaluate as run_evaluation
    from fastsmart.study.evaluation import EVALUATION_FILE, Evaluation
    from fastsmart.study.report import write_report
    from fastsmart.train.folder import RunFolder

    source = Path(options.source)
    with stages() as show:
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
    print(f"open {page} in a browser")
    return 0


def listen(options: argparse.Namespace) -> int:
    return {"make": _listen_make, "analyse": _listen_analyse, "power": _listen_power}[options.job](options)


def _listen_make(options: argparse.Namespace) -> int:
    from fastsmart.progress import stages
    from fastsmart.study.evaluation import Evaluation
    from fastsmart.study.listening import ListeningSettings, make_test

    settings = ListeningSettings(
        options.design, options.prompts, options.seconds, options.checks, options.repeats, options.question
    )
    with stages() as show:
        page, key = make_test(Evaluation.open(options.evaluation), options.out, settings, options.policy, show)
    print(f"send {page} to listeners; keep {key}, and analyse with: fastsmart listen analyse ANSWERS --key {key}")
    return 0


def _listen_analyse(options: argparse.Namespace) -> int:
    from fastsmart.files import write_atomic
    from fastsmart.study.ratings import analyse, as_text, read_answers

    files = [path for path, _ in _files(options.answers, (".json",)) if path.name != Path(options.key).name]
    result = analyse(read_answers(files, options.key, options.keep_inattentive))
    print(as_text(result))
    if options.out:
        write_atomic(options.out, json.dumps(result, indent=1) + "\n")
    return 0


def _listen_power(options: argparse.Namespace) -> int:
    from fastsmart.study.mixed import choice_power, rating_power
    from fastsmart.study.ratings import LISTENERS

    for listeners in LISTENERS:
        if options.design == "rating":
            spread = {"residual": options.sd, "clip": options.clip_sd}
            power = rating_power(options.effect, spread, listeners, options.prompts)
        else:
            power = choice_power(options.effect, listeners, options.prompts)
        print(f"{listeners:3d} listeners: {power:.0%}")
    return 0


def sweep(options: argparse.Namespace) -> int:
    from fastsmart.study.sweep import read_sweep

    plan = read_sweep(options.sweep)
    if options.dry_run:
        for number, (name, config) in enumerate(plan.runs.items()):
            print(f"{number}  {name}: {config.train.steps} steps")
        return 0

    from fastsmart.progress import stages
    from fastsmart.study.sweep import run_sweep
    from fastsmart.train.display import Plain

    with stages() as show:
        exit_code = run_sweep(plan, options.out, options.index, options.training_set, Plain, show)
    if exit_code == 0:
        print(f"runs, evaluation, figures/frontier.svg and report.html are in {options.out}")
    return exit_code


def doctor(options: argparse.Namespace) -> int:
    from fastsmart.doctor import examine

    return examine()


def _study_config(options: argparse.Namespace) -> Any:
    """The config asked for; that of the first run among the policies where none was; else the demo's."""
    from fastsmart.config import Config, assigned, read_config
    from fastsmart.presets import load_preset
    from fastsmart.train.folder import CONFIG_FILE

    runs = [Path(_source(p)) / CONFIG_FILE for p in options.policy if _is_run(p)]
    if options.preset or options.config:
        config = load_preset(options.preset) if options.preset else Config()
    else:
        config = read_config(runs[0]) if runs else load_preset("demo")
    if options.config:
        config = read_config(options.config, config)
    return assigned(config, options.set)


def _source(policy: str) -> str:
    return policy.partition("=")[2] or policy


def _is_run(policy: str) -> bool:
    return (Path(_source(policy)) / "config.toml").is_file()


def _render_one(notes: Any, i: int, path: Path, soundfont: str) -> None:
    from fastsmart.audio import RenderSettings, render_file

    render_file(notes.select([i]), 0, path, RenderSettings(soundfont))


def _files(names: list[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """The files named, and those of the right kind below the folders named, each with its path below the folder.

    Raises UserError when there are none.
    """
    found: list[tuple[Path, Path]] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += sorted((p, p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in suffixes)
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise UserError(f"no file {name}")
    if not found:
        raise UserError(f"no files ({', '.join(suffixes)}) in {', '.join(names)}")
    return found
