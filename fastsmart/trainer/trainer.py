"""The state of a run in training, and the step that its algorithm takes."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch

from fastsmart.config import Config
from fastsmart.kernels.jit import choose_kernel
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.average import WeightAverage
from fastsmart.policy.checkpoints import BEST_KEY, KEPT_KEY, Checkpoints, Snapshot
from fastsmart.policy.device import resolved_device, resolved_dtype
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.optimizer import make_optimizer, scheduled_rate
from fastsmart.policy.transformer import Policy
from fastsmart.run.provenance import statistics_path
from fastsmart.sampling import Rollout
from fastsmart.trainer.algorithm import Algorithm
from fastsmart.trainer.batch import MicroBatch, micro_batches
from fastsmart.trainer.evaluate import held_out_distance
from fastsmart.trainer.merged_runs import MergedRuns
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.rollout_worker import RolloutScheduler, RolloutWorker
from fastsmart.trainer.update import Update

_SKIPPED_KEY = "skipped_in_a_row"
_AVERAGED_KEY = "averaged_steps"
_BASE_KEY = "held_out_diversity_of_base"


class Trainer:
    """Policy, reference, optimizer and rollout worker of a run, going on from the newest of the checkpoints.

        with Trainer(config, checkpoints, ranks) as trainer:
            trainer.algorithm = make_algorithm(trainer, folder)
            while trainer.steps_done < config.train.steps:
                update, line = trainer.step()
                trainer.sync_weights()  # before the worker evaluates this policy
                checkpoints.write(trainer.snapshot())

    quarantine : folder for clips that end render workers

    algorithm  : how a step learns; it is made when the engine holds the policy
    steps_done : the version of `policy`
    skipped    : how many of the last steps, in a row, had a gradient that was not finite
    previous   : with train.pipeline "one-step-off" the policy of the step before, else None
    forward_options : temperature, dtype and kernel of every pass over completions (see `completion_logprobs`)
    average    : of the weights after each step, where train.average asks for one, else None
    record     : of the checkpoint that the run goes on from, empty at its beginning
    merge      : of the runs that follow each other, where [merge] is set, else None
    base_distance : `held_out_distance` of the untrained policy, where a floor of diversity is set; None = not measured

    Raises UserError where the policy, a checkpoint or a reward cannot be read.
    """

    algorithm: Algorithm

    def __init__(self, config: Config, checkpoints: Checkpoints, ranks: Ranks, quarantine: Path | None = None) -> None:
        self.config, self.ranks, self.settings = config, ranks, config.train
        self.device, self.dtype = resolved_device(config.policy), resolved_dtype(config.policy)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # where Triton's kernels run
        choose_kernel(config.grpo.kernel, self.device)  # refuses now what could not run after the first rollout
        source, vocabulary = config.policy.source, config.policy.vocabulary
        self.forward_options = config.sampling.temperature, self.dtype, config.grpo.kernel
        self.reference = load_policy(source, device=self.device, vocabulary=vocabulary)
        self.policy = copy.deepcopy(self.reference)
        self.optimizer = make_optimizer(
            self.policy, self.settings.learning_rate, self.settings.betas, self.settings.weight_decay
        )
        self.record = saved = checkpoints.load(self.policy, self.optimizer)
        self.steps_done, self.skipped = saved.get("step", 0), saved.get(_SKIPPED_KEY, 0)
        self.previous = checkpoints.previous(self.policy)
        decay, steps = self.settings.average, saved.get(_AVERAGED_KEY, 0)
        self.average = WeightAverage(decay, checkpoints.average, steps) if decay else None
        self.base_distance: float | None = saved.get(_BASE_KEY)
        self.merge = MergedRuns(config, checkpoints.folder.parent, ranks) if config.merge.active else None

        self.statistics = statistics_path(config)
        policy, version = self.sampler_weights()
        self.worker = RolloutWorker(config, policy, self.statistics, self.dtype, version, quarantine, ranks)
        self.scheduler = RolloutScheduler(self.worker)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.close()

    def sampler_weights(self) -> tuple[Policy, int]:
        """The policy that the next batch is drawn by, and its version."""
        done = self.steps_done
        return (self.previous, done - 1) if self.previous is not None else (self.policy, done)

    def step(self, progress: Progress | None = None) -> tuple[Update, dict[str, Any]]:
        """Take the algorithm's next step; gives the update and the step's line of metrics.

        The line is without `health` and without what an evaluation adds. `progress` is told of the rollout's stages.
        """
        start = time.perf_counter()
        if self.merge and self.merge.begins(self.steps_done):
            self.merge.restart(self.policy, self.reference, self.optimizer)
        taken = self.algorithm.step(progress)
        change, line = taken.update, taken.line
        self.steps_done += 1
        if self.merge:
            self.merge.after_step(self.steps_done, self.policy, self.reference)
        if self.average and not change.skipped:
            self.average.add(self.policy)
        self.skipped = self.skipped + 1 if change.skipped else 0
        spent = self.worker.trace.pop_times()
        line["time"] = timing(*spent, time.perf_counter() - start, taken.sampled, taken.clips)
        return change, line

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        settings = self.settings
        step, steps, peak = self.steps_done, settings.steps, settings.learning_rate
        if self.merge:
            step, steps, peak = self.merge.course(step)
        return scheduled_rate(step, steps, peak, settings.schedule, settings.warmup)

    def micro_batches(self, rollout: Rollout) -> list[MicroBatch]:
        """Completions in micro-batches of `train.micro_batch`, on the device; none of none."""
        return list(micro_batches(rollout, self.settings.micro_batch, self.device))

    def share_in_micro_batches(self, rollout: Rollout) -> list[MicroBatch]:
        """This rank's share of completions that all ranks have, numbered from 0, as `micro_batches`."""
        return self.micro_batches(rollout.select(self.ranks.share(len(rollout))))

    def sync_weights(self) -> None:
        """Give the sampler the policy as it is now, when it has sampled what it is sampling."""
        self.scheduler.sync_weights(self.policy, self.steps_done)

    def kept(self, summary: dict[str, Any]) -> float | None:
        """Diversity of a held-out evaluation as a share of the untrained policy's, which is that of the first summary
        of a run; None where no floor is set, and where those clips were too short to differ by it."""
        if not self.config.diversity.floor:
            return None
        distance = held_out_distance(summary["diversity"])
        if self.steps_done == 0:
            self.base_distance = distance
        return distance / self.base_distance if distance is not None and self.base_distance else None

    def snapshot(self, held_out_reward: float | None = None, kept: float | None = None) -> Snapshot:
        """The present state, and the held-out reward and share of diversity it was measured to have."""
        record: dict[str, Any] = {_SKIPPED_KEY: self.skipped}
        if self.base_distance is not None:
            record[_BASE_KEY] = self.base_distance
        if kept is not None:
            record[KEPT_KEY] = kept
        record |= self.algorithm.state
        if held_out_reward is not None:
            record[BEST_KEY] = held_out_reward
        weights = None
        if self.average is not None:
            weights, record[_AVERAGED_KEY] = self.average.weights, self.average.steps
        return Snapshot.of(self.steps_done, self.policy, self.optimizer, record, self.previous, weights)


def timing(
    seconds: dict[str, float], idle: dict[str, float], total: float, scored: ScoredRollout | None, clips: int
) -> dict[str, Any]:
    """Seconds of the step and of each stage on this rank, idle shares of its resources, and the rates people ask for.

    Stages that run side by side add up to more than the step. `tokens_per_s` is the rate of this rank's sampler,
    `clips_per_s` that of all ranks' steps with their `clips`. `gpu_mixed` of this rank's clips were mixed on its GPU.
    A step that has sampled nothing (`scored` None) has the rates 0.
    """
    return {
        "step": total,
        **seconds,
        "tokens_per_s": int(scored.rollout.lengths.sum()) / max(scored.sample_s, 1e-9) if scored else 0.0,
        "clips_per_s": clips / max(total, 1e-9),
        "gpu_mixed": scored.gpu_mixed if scored else 0,
        "idle": idle,
    }
