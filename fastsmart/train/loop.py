"""A training run, from the first prompt to the last checkpoint."""

from __future__ import annotations

import copy
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastsmart.config import Config
from fastsmart.files import cpu_cores
from fastsmart.grpo.advantages import group_advantages
from fastsmart.policy.checkpoint import load_policy
from fastsmart.policy.optimizer import make_optimizer, scheduled_rate
from fastsmart.policy.transformer import Policy
from fastsmart.reward import combine
from fastsmart.stopping import StopRequest, stop_signals
from fastsmart.tokens.prompts import make_prompts
from fastsmart.train.curves import draw_curves
from fastsmart.train.display import Display, Silent
from fastsmart.train.evaluate import before_after, evaluate, write_listening
from fastsmart.train.folder import RunFolder
from fastsmart.train.metrics import metrics, timing
from fastsmart.train.parity import check_engine, health_warning
from fastsmart.train.provenance import provenance, resolved_device, resolved_dtype, statistics_path
from fastsmart.train.stations import Performance, Stations
from fastsmart.train.update import Update, micro_batches, reference_logprobs, update

TRAINING_STREAM = 0  # second number of the seed; evaluation draws from stream 1, the check of the engine from 2
APART = ("token_mult_prob_error", "mismatch_k3", "logprob_gap_max")


@dataclass(frozen=True)
class Run:
    """How a run ended.

    policy  : the tuned policy, in eval mode
    path    : the run folder
    step    : the last step
    before, after : summaries of the held-out evaluations (see `evaluate.summarise`); None where it did not come to it
    exit_code : 0, or 128 + signal when it was asked to stop
    """

    policy: Policy
    path: Path
    step: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    exit_code: int


def train(config: Config, out: str | Path, resume: bool = False, display: Display | None = None) -> Run:
    """Tune a policy as the config says, into the folder `out`; with `resume`, go on with the run that is there.

    SIGINT and SIGTERM let the step under way end, save a checkpoint and leave. A run killed at any moment and resumed
    writes the metrics of one never killed (on a CPU to the last digit), apart from those under `time`.

    Raises UserError for whatever in config, files or machine the user can mend.
    """
    folder = RunFolder.reopen(out) if resume else RunFolder.create(out, config)
    config, show = folder.config, display or Silent()
    knobs = config.train
    torch.set_num_threads(knobs.threads or cpu_cores())
    device, dtype = resolved_device(config.policy), resolved_dtype(config.policy)
    reference = load_policy(config.policy.source, device=device, vocabulary=config.policy.vocabulary)
    policy = copy.deepcopy(reference)
    optimizer = make_optimizer(policy, knobs.learning_rate, knobs.betas, knobs.weight_decay)
    step = folder.checkpoints.load(policy, optimizer).get("step", 0)
    statistics = statistics_path(config)

    with stop_signals() as stop, Stations(config, policy, statistics, dtype, step, folder.path / "failed") as stations:
        folder.write_provenance(provenance(config, reference, statistics, stations.pool is not None))
        folder.metrics.forget_after(step)
        check_engine(stations.engine, policy, config, step, dtype)
        with show:
            show.start(config, folder.path, step)
            if step == 0:
                held_out, summary = evaluate(stations, show.stage)
                write_listening(stations, held_out, folder.listen, "before")
                log(folder, show, {"step": 0, "eval": summary, "time": stations.clock.reset()})
            while step < knobs.steps and not stop:
                start = time.perf_counter()
                prompts = make_prompts(config.prompts, policy.vocab, "train", step * knobs.prompts, knobs.prompts)
                seed = (knobs.seed, TRAINING_STREAM, step)
                performance = stations.perform(prompts, config.sampling, seed, show.stage)
                advantage = advantages(performance, config)
                with stations.clock("update"):
                    rate = scheduled_rate(step, knobs.steps, knobs.learning_rate, knobs.schedule, knobs.warmup)
                    change = improve(policy, reference, optimizer, performance, advantage, config, rate, dtype)
                step += 1
                with stations.clock("sync"):
                    stations.engine.load(policy, step)
                line = metrics(step, performance, advantage, change)
                line["time"] = timing(stations.clock.reset(), time.perf_counter() - start, performance)
                if step == knobs.steps or (knobs.eval_every and step % knobs.eval_every == 0):
                    held_out, line["eval"] = evaluate(stations, show.stage)
                    line["time"]["evaluate"] = sum(stations.clock.reset().values())
                    if step == knobs.steps:
                        write_listening(stations, held_out, folder.listen, "after")
                log(folder, show, line)
                if warning := health_warning(stations.engine, policy, config, change, dtype):
                    show.message(f"step {step}: {warning}")
                if knobs.save_every and step % knobs.save_every == 0:
                    folder.checkpoints.save(step, policy, optimizer)
            if step > folder.checkpoints.step:
                folder.checkpoints.save(step, policy, optimizer)
            return conclude(folder, show, policy, step, stop)


def advantages(performance: Performance, config: Config) -> torch.Tensor:
    """Advantage of each completion, float32 [N], from the training signal its scores combine to."""
    scores, group = performance.scores, performance.rollout.group
    signal_ = combine(scores.terms, config.reward.terms, group, config.reward.normalize)
    return group_advantages(torch.from_numpy(signal_), torch.from_numpy(group), config.train.advantage_scale)


def improve(
    policy: Policy,
    reference: Policy,
    optimizer: torch.optim.Optimizer,
    performance: Performance,
    advantage: torch.Tensor,
    config: Config,
    learning_rate: float,
    dtype: torch.dtype,
) -> Update:
    """The optimizer steps of one batch; the statistics are those of the last, and how far sampler and trainer are apart
    is that of the first, before which they are to be the same."""
    batches = list(micro_batches(performance.rollout, config.train.micro_batch, policy.device))
    temperature = config.sampling.temperature
    anchors = reference_logprobs(reference, batches, temperature, dtype)
    apart: dict[str, float] = {}
    for _ in range(config.train.iterations):
        change = update(
            policy,
            optimizer,
            batches,
            anchors,
            advantage,
            config.grpo,
            temperature=temperature,
            learning_rate=learning_rate,
            max_grad_norm=config.train.max_grad_norm,
            dtype=dtype,
        )
        apart = apart or {name: change.stats[name] for name in APART}
    return replace(change, stats=change.stats | apart)


def log(folder: RunFolder, show: Display, line: dict[str, Any]) -> None:
    folder.metrics.append(line)
    show.line(line)


def conclude(folder: RunFolder, show: Display, policy: Policy, step: int, stop: StopRequest) -> Run:
    """Draw the curves, write the table where there is an after, and say how it ended."""
    evaluations = [line["eval"] for line in folder.metrics.lines() if "eval" in line]
    finished = step >= folder.config.train.steps and len(evaluations) > 1
    before, after = evaluations[0] if evaluations else None, evaluations[-1] if finished else None
    draw_curves(folder.metrics.lines(), folder.path / "curves.png")
    if before and after:
        folder.write("before_after.md", before_after(before, after, step))
    if stop and step < folder.config.train.steps:
        name = signal.Signals(stop.signal_number).name
        show.message(f"{name}: saved at step {step}; go on with: fastsmart train --out {folder.path} --resume")
    exit_code = stop.exit_code if step < folder.config.train.steps else 0
    return Run(policy.eval(), folder.path, step, before, after, exit_code)
