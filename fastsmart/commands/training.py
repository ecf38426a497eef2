"""The bodies of pretrain, train, bench, profile and top."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsmart.errors import UserError
from fastsmart.words import counted

if TYPE_CHECKING:
    from fastsmart.config import Config
    from fastsmart.machine.distributed import Ranks
    from fastsmart.tokens.dataset import TokenDataset
    from fastsmart.tokens.vocabulary import Vocabulary


PRETRAIN_OPTIONS = (
    "steps",
    "batch",
    "learning_rate",
    "patience",
    "eval_every",
    "valid_rows",
    "seed",
    "device",
    "init",
    "dtype",
    "style_steps",
)


def pretrain(options: argparse.Namespace) -> int:
    import torch

    from fastsmart.machine.hardware import compute_threads
    from fastsmart.machine.progress import bar
    from fastsmart.machine.signals import stop_signals
    from fastsmart.policy.crops import CropSettings
    from fastsmart.policy.device import usable_device
    from fastsmart.policy.pretrain import PretrainSettings
    from fastsmart.policy.pretrain import pretrain as run_pretraining
    from fastsmart.policy.style_crops import evened
    from fastsmart.policy.style_tokens import learn_style_tokens
    from fastsmart.policy.transformer import PolicySize
    from fastsmart.study.card import STATISTICS_FILE, real_statistics, write_release
    from fastsmart.tokens.labels import metres_of, read_labels
    from fastsmart.tokens.vocabulary import load_vocabulary

    vocab, out = load_vocabulary(options.vocabulary), Path(options.out)
    torch.set_num_threads(options.threads or compute_threads())
    given = {key: value for key in PRETRAIN_OPTIONS if (value := getattr(options, key)) is not None}
    settings = PretrainSettings(compile=options.compile, **given)
    if options.length:
        settings = replace(settings, crop=CropSettings(length=options.length))
    size = PolicySize(len(vocab), options.hidden, options.ffn, options.layers, options.heads, options.heads)
    usable_device(settings.device, "--device")

    dataset = _encoded(options.midi, out / "dataset", vocab)
    for name, reason in dataset.damaged:
        print(f"left out {name}: {reason}", file=sys.stderr)
    damaged = counted(len(dataset.damaged), "damaged file")
    print(f"{counted(len(dataset), 'piece')}, {dataset.offsets[-1]:,} tokens, {damaged} left out")
    labels = None
    if options.styles:
        labels = read_labels(options.styles, dataset.files, dataset.source, settings.valid_share, settings.seed)
        dataset = evened(dataset, replace(labels.named(), metres=metres_of(labels, dataset)))

    def report(line: dict[str, Any]) -> None:
        show(line["step"], settings.steps)
        if "valid_loss" in line:
            rate, losses = line["tokens_per_s"], (line["train_loss"], line["valid_loss"])
            print(
                f"step {line['step']}  training {losses[0]:.3f}  validation {losses[1]:.3f}  {rate:.0f} tokens/s",
                flush=True,
            )

    with stop_signals() as stop, bar("training") as show:
        result = run_pretraining(dataset, size, settings, out, options.resume, stop, report, labels)
    if stop:
        print(f"saved at step {result.step}; go on with --resume")
        return stop.exit_code
    if labels and settings.style_steps:
        result = replace(result, policy=learn_style_tokens(result.policy, dataset, labels, settings))
    try:
        statistics = real_statistics(dataset, settings, options.name, labels)
    except UserError as error:
        statistics = None
        print(f"the release has no {STATISTICS_FILE}: {error}", file=sys.stderr)
    command = shlex.join(["fastsmart", *sys.argv[1:]])
    about = options.name, options.licence, command
    print(write_release(result, dataset, settings, statistics, out / "release", *about, labels))
    return 0


def _encoded(midi: str, folder: Path, vocab: Vocabulary) -> TokenDataset:
    """The pieces below `midi` as they were encoded into the folder, or are now."""
    from fastsmart.machine.progress import bar
    from fastsmart.tokens.dataset import TokenDataset, encode_folder

    if not folder.is_dir():
        with bar("encoding") as show:
            return encode_folder(midi, folder, vocab, 0, lambda done, total, _: show(done, total))
    dataset = TokenDataset.open(folder)
    if dataset.source != str(Path(midi).resolve()) or dataset.vocab.tokens != vocab.tokens:
        raise UserError(f"{folder} was encoded from {dataset.source}; choose another --out, or remove it")
    return dataset


def train(options: argparse.Namespace) -> int:
    from fastsmart.config import to_toml
    from fastsmart.machine.distributed import join_ranks
    from fastsmart.notagen.engine import STYLE_MARK
    from fastsmart.notagen.weights import is_notagen
    from fastsmart.run.folder import RunFolder
    from fastsmart.run.resumed_config import resumed_config

    if not options.out and (options.resume or not options.dry_run):
        raise UserError("name the folder of the run with --out, for example --out runs/demo")
    resume = options.resume == "yes" or (options.resume == "auto" and RunFolder.begun(options.out))
    if options.dry_run:
        config, changes = _asked(options, resume)
        if resume:
            config = resumed_config(config, changes, Path(options.out), RunFolder.read(options.out).checkpoints.step)
        print(to_toml(config), end="")
        if config.sampling.engine == "vllm" and not config.sampling.vllm.server:
            print(f"\n# {vllm_memory(config)}")
        return 0
    ranks = join_ranks()
    resume = bool(ranks.broadcast(resume))  # rank 0 may be about to start the run
    config, changes = _asked(options, resume)
    if not resume:
        _need_reward(config)
    if is_notagen(config.policy.source.partition(STYLE_MARK)[0]):
        return _train_sheets(config, options.out, resume, ranks, changes)

    from fastsmart.run.display import Plain, Terminal
    from fastsmart.trainer.loop import train as run_training

    display = Terminal() if sys.stdout.isatty() else Plain()
    run = run_training(config, options.out, resume, display, ranks, changes)
    ranks.close()
    if run.after and ranks.leader:
        _say_outcome(run.path)
    return run.exit_code


def _train_sheets(config: Config, out: str, resume: bool, ranks: Ranks, changes: dict[str, Any]) -> int:
    """Train NotaGen, which has a loop of its own."""
    from fastsmart.run.display import Plain, Terminal
    from fastsmart.trainer.sheet_dpo import train_sheets

    if ranks.world > 1:
        raise UserError("NotaGen is trained in one process; leave out torchrun")
    run = train_sheets(config, out, resume, Terminal() if sys.stdout.isatty() else Plain(), changes)
    if not run.exit_code:
        _say_outcome(run.path)
    return run.exit_code


def _say_outcome(path: Path) -> None:
    """Print the table of before and after, and say what to open."""
    table, listen, curves = path / "before_after.md", path / "listen", path / "curves.png"
    if table.is_file():
        print(table.read_text(encoding="utf-8"))
        page = listen / "index.html"
        looked = f", look at {curves}" if curves.is_file() else ""
        print(f"listen to {page if page.is_file() else listen}{looked}")


def blend(options: argparse.Namespace) -> int:
    from fastsmart.config import read_config
    from fastsmart.policy.blend import write_blends
    from fastsmart.run.folder import CONFIG_FILE

    run, base = Path(options.run), options.base
    vocabulary = ""
    if not base:
        if not (run / CONFIG_FILE).is_file():
            raise UserError(f"{run} is no run, which would say what it was tuned from; name that with --base POLICY")
        base, vocabulary = (settings := read_config(run / CONFIG_FILE).policy).source, settings.vocabulary
    out = options.out or run / "blends"
    how = {"average": options.average, "added": options.add, "temperature": options.temperature}
    for folder in write_blends(base, options.run, options.alphas, out, vocabulary, **how):
        print(folder)
    return 0


def _asked(options: argparse.Namespace, resume: bool) -> tuple[Config, dict[str, Any]]:
    """The config of a run to begin; or that of the run there is, and the values of the options that differ from it.

    Options alone change the run's own config; a preset or a file stands for all of its keys.
    """
    from fastsmart.config import with_overrides
    from fastsmart.run.folder import RunFolder
    from fastsmart.run.resumed_config import differences

    if not resume:
        return _run_config(options), {}
    own = RunFolder.read(options.out).config
    whole = options.preset or options.config
    return own, differences(own, _run_config(options) if whole else with_overrides(own, _sets(options)))


def profile(options: argparse.Namespace) -> int:
    config = _run_config(options)
    _need_reward(config)

    from fastsmart.machine.progress import bar
    from fastsmart.profiling.page import write_page
    from fastsmart.profiling.profile import profile as run_profile

    with bar("profiling") as show:
        found = run_profile(config, options.out, options.steps, options.warmup, show)
    page = write_page(found, Path(options.out) / "profile.html")
    for cost in found["costs"]:
        print(f"{cost['share']:.0%} of a step  {cost['what']}")
    print(f"open {page} in a browser, and {page.with_name('trace.json')} at ui.perfetto.dev")
    return 0


def top(options: argparse.Namespace) -> int:
    import time

    from rich.console import Console
    from rich.live import Live

    from fastsmart.run.top import Top

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


def bench(options: argparse.Namespace) -> int:
    config = _run_config(options)
    _need_reward(config)

    from fastsmart.machine.distributed import join_ranks
    from fastsmart.machine.progress import bar
    from fastsmart.profiling.throughput import RESULT_FILE, as_text, contenders
    from fastsmart.profiling.throughput import bench as run_bench

    configs, ranks = contenders(config, options.against), join_ranks()
    with bar("turns") as show:
        found = run_bench(configs, options.out, options.steps, options.warmup, options.rounds, show, ranks)
    ranks.close()
    if ranks.leader:
        print(as_text(found))
        print(f"every step of every turn is in {Path(options.out) / RESULT_FILE}")
    return 0


def _run_config(options: argparse.Namespace) -> Config:
    """The config of preset, file and options, in this order."""
    from fastsmart.config import Config, read_config, with_overrides
    from fastsmart.presets import load_preset

    config = load_preset(options.preset) if options.preset else Config()
    if options.config:
        config = read_config(options.config, config)
    return with_overrides(config, _sets(options))


def _sets(options: argparse.Namespace) -> list[str]:
    """Settings given by --set and the options that are short for it."""
    from fastsmart.config import toml_value

    sets = options.set + ([f"sampling.engine={options.engine}"] if options.engine else [])
    if rewards := getattr(options, "reward", []):
        sets = [f"reward.terms={{{', '.join(f'{toml_value(name)} = 1.0' for name in rewards)}}}", *sets]
    return sets + ([f"train.pipeline={options.pipeline}"] if options.pipeline else [])


def _need_reward(config: Config) -> None:
    if not config.reward.terms:
        raise UserError("reward.terms names no reward; start from --preset demo or add --set reward.terms.consonance=1")


def vllm_memory(config: Config) -> str:
    """Memory that vLLM will hold in this process, computed from the policy's config.json."""
    from fastsmart.policy.device import resolved_device, resolved_dtype
    from fastsmart.policy.hf_format import policy_size
    from fastsmart.sampling.vllm_config import memory_needed

    completions = config.train.prompts * config.sampling.group
    rows = min(config.sampling.max_rows, completions)
    dtype, device = resolved_dtype(config.policy), resolved_device(config.policy)
    sampling = replace(config.sampling, max_rows=rows)
    return str(memory_needed(policy_size(config.policy.source), sampling, dtype.itemsize, device.type == "cuda"))
