"""The whole step, ours and the public pipeline's, taking turns in one process on the same work; stage by stage.

    make bench-peers
    python bench/step.py --peer public --soundfont /usr/share/sounds/sf2/FluidR3_GM.sf2 --out bench/results/step.json

A step of the paper: 32 completions of 256 tokens (4 prompts x 8) by a 17.2 M policy that plays real music, cut at 10 s,
one soundfont, Audiobox of the published size with random weights, one optimizer step; float32, all threads to whoever
has the turn. Ours is the step of a real training run in float32, with int8 scoring, and in bfloat16, policy and scoring
both, where the processor is fast in it; one stage after the other, so that each has its time, and as it comes
("overlapped"). The public pipeline is in bench/peers/public.py; its second form leaves gradient checkpointing off,
which TRL has on.

The floors are those of float32 arithmetic: int8 and bfloat16 may stay below their own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from harness import REFERENCE, Work, chosen_peers, interleaved, measured_ceilings, parser, report
from policies import PAPER, playing_policy
from results import write_result
from score import GFLOP as WINDOW_GFLOP
from stages import decoding_work, parse, run, tried, update_work

from fastsmart.audio import find_soundfont
from fastsmart.audio.bank_tools import build_bank
from fastsmart.config import Config
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.packed_linear import bfloat16_is_fast
from fastsmart.notes import NoteBatch
from fastsmart.policy.checkpoints import Checkpoints
from fastsmart.policy.hf_format import save_policy
from fastsmart.policy.settings import PolicySettings
from fastsmart.policy.transformer import Policy
from fastsmart.presets import smart_paper
from fastsmart.reward.audiobox import make_random_weights
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.settings import PromptSettings
from fastsmart.tokens.vocabulary import load_vocabulary
from fastsmart.trainer.grpo import Grpo
from fastsmart.trainer.trainer import Trainer

PEERS = ("public", "public-without-checkpointing")
STAGES = ("sample", "decode", "render", "score", "update", "sync", "whole")
OURS = "fastsmart float32"
AUDIO_HZ, PROMPT = 16_000, 4
NOTE_BYTES, ID_BYTES, WAVE_BYTES, SAMPLE_BYTES = 26, 4, 2, 4  # of the arrays that hold them

Times = dict[str, float]  # stage -> seconds


def main() -> None:
    arguments = parser(__doc__, runs=3, peers=PEERS)
    arguments.add_argument("--prompts", type=int, default=4, help="of a step (4)")
    arguments.add_argument("--group", type=int, default=8, help="completions of a prompt (8)")
    arguments.add_argument("--tokens", type=int, default=256, help="of a completion (256)")
    arguments.add_argument("--soundfont", default="", help="SF2 or SF3 file; default: the first one installed")
    options = parse(arguments, {"prompts": 1, "group": 2, "tokens": 32, "runs": 1})
    figures = measured(options)
    if options.out:
        write_result(options.out, figures)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    ceilings = measured_ceilings(options.device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        policy, checkpoint = playing_policy(PAPER), Path(folder, "policy")
        save_policy(policy, checkpoint)
        audiobox = make_random_weights(Path(folder, "checkpoint.pt"))
        config = step_config(options, checkpoint, audiobox)
        build_bank(config.audio)  # once a soundfont, some seconds
        contenders: dict[str, OwnStep | Any] = {}
        left_out: dict[str, str] = {}
        for peer in chosen_peers(options, PEERS):
            contenders[peer] = public_step(config, peer, options.runs + 1, audiobox)
            stack.callback(contenders[peer].close)
        for dtype in dtypes(options.device):
            for pipeline, name in (("off", f"fastsmart {dtype}"), ("overlap", f"fastsmart {dtype}, overlapped")):
                own = tried(name, partial(OwnStep, changed(config, dtype, pipeline), Path(folder, "runs")), left_out)
                if own is None:
                    continue
                contenders[name] = own
                stack.callback(own.close)
        taken: dict[str, list[Times]] = {name: [] for name in contenders}
        jobs = {name: noted(contender.step, taken[name]) for name, contender in contenders.items()}
        whole = interleaved(jobs, options.runs, options.device)
        notes = contenders[OURS].notes
    work = floors(policy, options.tokens, notes)
    print(f"{len(notes)} clips of {notes.counts.mean():.1f} notes and {clip_s(notes).mean():.2f} s on average")
    stages = {}
    for stage in STAGES:
        seconds = {REFERENCE: whole[REFERENCE]}
        for name, steps in taken.items():
            each = whole[name] if stage == "whole" else [times[stage] for times in steps[1:] if stage in times]
            if len(each) == options.runs and ("overlapped" not in name or stage == "whole"):
                seconds[name] = each
        stages[stage] = report(stage, seconds, OURS, work[stage], ceilings)
    return {
        "clips": {"number": len(notes), "notes": float(notes.counts.mean()), "seconds": float(clip_s(notes).mean())},
        "soundfont": Path(config.audio.soundfont).name,
        "left_out": left_out,
        "stages": stages,
        "public_over": table(stages),
    }


def step_config(options: argparse.Namespace, checkpoint: Path, audiobox: Path) -> Config:
    """The paper's run with a policy and prompts that give about 55 notes and nearly 10 s a clip (the policy knows 4/4;
    faster pieces end before), and this machine's soundfont."""
    paper = smart_paper()
    return replace(
        paper,
        policy=PolicySettings(str(checkpoint), device=options.device, dtype="float32"),
        prompts=PromptSettings(time_signatures=("4/4",), tempo_min=60.0, tempo_max=100.0),
        sampling=replace(paper.sampling, group=options.group, max_tokens=options.tokens, ignore_eos=True),
        audio=replace(paper.audio, soundfont=str(find_soundfont(options.soundfont))),
        reward=replace(paper.reward, audiobox_checkpoint=str(audiobox)),
        train=replace(paper.train, prompts=options.prompts, threads=options.threads),
    )


def dtypes(device: str) -> tuple[str, ...]:
    """What our own steps are taken in on a device."""
    if device != "cpu":
        return ("float32", "float16")
    return ("float32", "int8", "bfloat16") if bfloat16_is_fast() else ("float32", "int8")


def changed(config: Config, dtype: str, pipeline: str) -> Config:
    """With scoring in `dtype`, in bfloat16 the policy too, and this train.pipeline."""
    policy = replace(config.policy, dtype=dtype) if dtype == "bfloat16" else config.policy
    return replace(
        config,
        policy=policy,
        reward=replace(config.reward, audiobox_dtype=dtype),
        train=replace(config.train, pipeline=pipeline),
    )


def affinity() -> set[int]:
    """Cores of this thread; none where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This thread on these cores, and on its own again afterwards."""
    before = affinity()
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)


def noted(step: Callable[[], Times], taken: list[Times]) -> Callable[[], None]:
    return lambda: taken.append(step())


class OwnStep:
    """A training run's `Trainer.step`, on the cores that a run has.

    notes : of the last step's completions
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.trainer = Trainer(config, Checkpoints(folder), Ranks())
        self.trainer.algorithm = self.grpo = Grpo(self.trainer, folder)
        self.cores = affinity()  # of this thread while it trains: on a GPU one core, which the next contender takes too
        self.trainer.worker.rejoin_cores()

    def step(self) -> Times:
        """Take one step; gives the seconds of each stage."""
        with on_cores(self.cores):
            self.trainer.worker.trace.pop_times()  # what the other contenders' turns took
            return self.trainer.step()[1]["time"]

    @property
    def notes(self) -> NoteBatch:
        return self.grpo.scored.notes

    def close(self) -> None:
        self.trainer.worker.close()


def public_step(config: Config, peer: str, steps: int, audiobox: Path) -> Any:
    """TRL's trainer on the same policy, prompts and soundfont."""
    from peers.public import PublicTrainer, public_reward

    vocab, seconds = load_vocabulary(config.policy.source), defaultdict(float)
    prompts = make_prompts(config.prompts, vocab, "train", 0, steps * config.train.prompts)
    reward = public_reward(config.audio.soundfont, audiobox, vocab.tokenizer, seconds)
    return PublicTrainer(
        config.policy.source,
        [prompts.row(i) for i in range(len(prompts))],
        steps,
        reward,
        seconds,
        group=config.sampling.group,
        max_tokens=config.sampling.max_tokens,
        gradient_checkpointing=peer == "public",
    )


def clip_s(notes: NoteBatch) -> np.ndarray:
    """Seconds of each clip."""
    return np.minimum(notes.end_s, 10.0)


def floors(policy: Policy, tokens: int, notes: NoteBatch) -> dict[str, list[Work]]:
    """What each stage has to do at least; Audiobox need not listen beyond a clip's end."""
    clips = len(notes)
    heard = AUDIO_HZ * float(np.minimum(notes.duration_s, 10.0 - notes.onset_s).sum())
    clips_s = float(clip_s(notes).sum())
    works = {
        "sample": decoding_work(policy, clips, PROMPT, tokens, 4),
        "decode": [Work("ids and notes", 0.0, 1e-9 * (ID_BYTES * clips * tokens + NOTE_BYTES * len(notes.pitch)))],
        "render": [Work("notes mixed", 2e-9 * heard, 1e-9 * (WAVE_BYTES * heard + SAMPLE_BYTES * AUDIO_HZ * clips_s))],
        "score": [Work("Audiobox", WINDOW_GFLOP * clips_s / 10.0)],
        "update": update_work(policy, clips, PROMPT + tokens - 1),
        "sync": [Work("weights read and written", 0.0, 8e-9 * policy.num_parameters)],
    }
    return {**works, "whole": [work for stage in works.values() for work in stage]}


def table(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Print seconds of every contender at every stage, how many times as fast as the public pipeline that is, and the
    floor's share; gives median, least and most of the ratios by stage and contender."""
    over: dict[str, dict[str, list[float]]] = {stage: {} for stage in STAGES}
    names = [name for name in stages["whole"]["contenders"] if name != REFERENCE]
    print(f"{'s, public / it, floor / it':29}" + "".join(f"{stage:>9}{'':13}" for stage in STAGES))
    print(f"{'floor':29}" + "".join(f"{stages[stage]['floor_s']:9.4f}{'':13}" for stage in STAGES))
    for name in names:
        cells = []
        for stage in STAGES:
            contenders = stages[stage]["contenders"]
            if name not in contenders:
                cells.append(f"{'':22}")
                continue
            own = contenders[name]
            ratio = ""
            if "public" in contenders:
                pairs = [p / o for p, o in zip(contenders["public"]["each_s"], own["each_s"], strict=True)]
                over[stage][name] = [statistics.median(pairs), min(pairs), max(pairs)]
                ratio = f"{statistics.median(pairs):.3g}x"
            cells.append(f"{own['median_s']:9.4f}{ratio:>7}{stages[stage]['floor_s'] / own['median_s']:5.0%} ")
        print(f"{name:29}" + "".join(cells))
    return over


if __name__ == "__main__":
    run(main)
