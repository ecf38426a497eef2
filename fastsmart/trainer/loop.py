"""A training run, from the first prompt to the last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastsmart.config import Config
from fastsmart.machine.cpu_affinity import bind_cores
from fastsmart.machine.distributed import Ranks, join_ranks
from fastsmart.machine.gc_control import gc_at_steps
from fastsmart.machine.hardware import compute_threads
from fastsmart.machine.signals import StopRequest, stop_signals
from fastsmart.policy.device import resolved_device
from fastsmart.run.display import Display
from fastsmart.run.folder import RunFolder
from fastsmart.run.provenance import provenance
from fastsmart.run.recorder import Recorder
from fastsmart.trainer.algorithms import make_algorithm
from fastsmart.trainer.evaluate import evaluate_held_out
from fastsmart.trainer.outcome import MAX_SKIPPED, Run, finish, finished_run, give_up, tuned_policy
from fastsmart.trainer.parity import check_engine, health_warning, mismatch_limit
from fastsmart.trainer.trainer import Trainer


def train(
    config: Config,
    out: str | Path,
    resume: bool = False,
    display: Display | None = None,
    ranks: Ranks | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Run:
    """Tune a policy as the config says, into the folder `out`; with `resume`, go on with the run that is there.

    Started by torchrun, every rank calls this with the same arguments (`ranks`: see `join_ranks`, which is the
    default). SIGINT and SIGTERM let the step under way end, save a checkpoint and return from here; the process goes
    on, and a script that is to leave too looks at `Run.exit_code`. A run killed at any moment and resumed, on any
    number of ranks, writes the metrics of one never killed (on one rank of a CPU to the last digit), apart from those
    under `time` and `health`. A finished run is only read.

    changes : new values of keys that a resumed run may change (see `resumed_config`), such as {"train.steps": 400},
              which makes a finished run longer

    Raises UserError for whatever in config, files or machine the user can mend, while another process trains in the
    folder, and when the gradient has not been finite three steps in a row.
    """
    ranks = ranks or join_ranks()
    with RunFolder.open(out, config, resume, ranks, changes) as folder:
        if resume and ranks.broadcast(folder.concluded) and (policy := tuned_policy(folder)):
            return finished_run(folder, policy, display if ranks.leader else None)
        return _train(folder, display, ranks)


def _train(folder: RunFolder, display: Display | None, ranks: Ranks) -> Run:
    """The rest of a run, from where its folder is."""
    config, settings = folder.config, folder.config.train
    with (
        stop_signals() as stop,
        open_run(folder, ranks, display) as (trainer, recorder),
        gc_at_steps() as collect,
    ):
        worker, limit = trainer.worker, mismatch_limit(config, trainer.dtype)
        if trainer.steps_done == 0:
            found = evaluate_held_out(worker, recorder, "before")
            trainer.kept(found["eval"])  # what every later one is a share of
            recorder.line({"step": 0, **found})
        while trainer.steps_done < settings.steps and not should_stop(stop, ranks):
            change, line = trainer.step(recorder.stage)
            step, reward, kept = trainer.steps_done, None, None
            if step == settings.steps or (settings.eval_every and step % settings.eval_every == 0):
                trainer.sync_weights()
                found = evaluate_held_out(worker, recorder, "after" if step == settings.steps else "")
                line["eval"], reward = found["eval"], found["eval"]["reward"]["mean"]
                line["time"] |= found["time"]
                kept = trainer.kept(found["eval"])
            recorder.line(line, trainer.scheduler.dropped)
            if line["staleness"] == 0 and change.mismatch(limit):
                trainer.sync_weights()
                warning = health_warning(worker.engine, trainer.policy, change, limit)
                recorder.note(f"step {step}: {warning}")
            due = trainer.algorithm.ends_round or (settings.save_every and step % settings.save_every == 0)
            if recorder.better(reward, kept) or due:
                recorder.save(trainer.snapshot(reward, kept))
            if trainer.skipped >= MAX_SKIPPED:
                give_up(recorder, trainer)
            collect(step)
        if trainer.steps_done > recorder.saved:
            recorder.save(trainer.snapshot())
        recorder.finish()
        return finish(folder, recorder, trainer, stop)


@contextmanager
def open_run(folder: RunFolder, ranks: Ranks, display: Display | None = None) -> Iterator[tuple[Trainer, Recorder]]:
    """Open a run for its next step; the engine has been checked to hold the policy's weights."""
    config = folder.config
    bind_cores(ranks)
    on_gpu = resolved_device(config.policy).type != "cpu"  # there this thread launches only
    torch.set_num_threads(config.train.threads or (1 if on_gpu else compute_threads(ranks.local_world)))
    with Trainer(config, folder.checkpoints, ranks, folder.path / "failed") as trainer:
        worker, done = trainer.worker, trainer.steps_done
        with Recorder(folder, ranks, worker.trace, worker.writing, worker.pool, display) as recorder:
            recorder.start(done, provenance(config, trainer.reference, trainer.statistics, worker.renders_with))
            sampler, version = trainer.sampler_weights()
            check_engine(worker.engine, sampler, config, version, trainer.dtype)
            trainer.algorithm = make_algorithm(trainer, folder.path)
            yield trainer, recorder


def should_stop(stop: StopRequest, ranks: Ranks) -> bool:
    """Whether somebody has asked any rank to stop; all ranks get the same answer."""
    stop.signal_number = ranks.max(stop.signal_number)
    return bool(stop)
