"""The step of a run: sample a batch, score it, learn from it."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastsmart.config import Config
from fastsmart.grpo.advantages import group_advantages, normalised_sum
from fastsmart.kernels.jit import choose_kernel
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.average import WeightAverage
from fastsmart.policy.checkpoints import BEST_KEY, KEPT_KEY, Checkpoints, Snapshot
from fastsmart.policy.device import resolved_device, resolved_dtype
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.optimizer import make_optimizer, scheduled_rate
from fastsmart.policy.transformer import Policy
from fastsmart.run.provenance import statistics_path
from fastsmart.trainer.batch import Batch, metrics, timing
from fastsmart.trainer.diversity_control import DiversityControl
from fastsmart.trainer.evaluate import held_out_distance
from fastsmart.trainer.micro_batch import micro_batches
from fastsmart.trainer.rehearsal import rehearse
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.rollout_worker import RolloutScheduler, RolloutWorker
from fastsmart.trainer.update import Update, reference_logprobs, update

_SKIPPED_KEY = "skipped_in_a_row"
_CONTROL_KEY = "diversity_control"
_AVERAGED_KEY = "averaged_steps"
_BASE_KEY = "held_out_diversity_of_base"
MISMATCH_STATS = ("token_mult_prob_error", "mismatch_k3", "logprob_gap_max")


class Trainer:
    """Policy, reference, optimizer and rollout worker of a run, going on from the newest of the checkpoints.

        with Trainer(config, checkpoints, ranks) as trainer:
            while trainer.steps_done < config.train.steps:
                update, line = trainer.step()
                trainer.sync_weights()  # before the worker evaluates this policy
                checkpoints.write(trainer.snapshot())

    quarantine : folder for clips that end render workers

    steps_done : the version of `policy`
    skipped    : how many of the last steps, in a row, had a gradient that was not finite
    previous   : with train.pipeline "one-step-off" the policy of the step before, else None
    average    : of the weights after each step, where train.average asks for one, else None
    scored     : this rank's completions of the last step
    advantage  : theirs, float32 [n]
    control    : what keeps the outputs different from each other, set when the base has been sampled; None = nothing
    saved_control : its state in the checkpoint that the run goes on from
    base_distance : `held_out_distance` of the untrained policy, where a floor of diversity is set; None = not measured

    Raises UserError where the policy, a checkpoint or a reward cannot be read.
    """

    scored: ScoredRollout
    advantage: torch.Tensor

    def __init__(self, config: Config, checkpoints: Checkpoints, ranks: Ranks, quarantine: Path | None = None) -> None:
        self.config, self.ranks, self.settings = config, ranks, config.train
        self.device, self.dtype = resolved_device(config.policy), resolved_dtype(config.policy)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # where Triton's kernels run
        choose_kernel(config.grpo.kernel, self.device)  # refuses now what could not run after the first rollout
        source, vocabulary = config.policy.source, config.policy.vocabulary
        self.reference = load_policy(source, device=self.device, vocabulary=vocabulary)
        self.policy = copy.deepcopy(self.reference)
        self.optimizer = make_optimizer(
            self.policy, self.settings.learning_rate, self.settings.betas, self.settings.weight_decay
        )
        saved = checkpoints.load(self.policy, self.optimizer)
        self.steps_done, self.skipped = saved.get("step", 0), saved.get(_SKIPPED_KEY, 0)
        self.previous = checkpoints.previous(self.policy)
        decay, steps = self.settings.average, saved.get(_AVERAGED_KEY, 0)
        self.average = WeightAverage(decay, checkpoints.average, steps) if decay else None
        self.control: DiversityControl | None = None
        self.saved_control: dict[str, Any] | None = saved.get(_CONTROL_KEY)
        self.base_distance: float | None = saved.get(_BASE_KEY)

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
        """Sample the next batch, score it, and learn from it; gives the update and the step's line of metrics.

        The line is without `health` and without what an evaluation adds. `progress` is told of the rollout's stages.
        """
        config, trace, start = self.config, self.worker.trace, time.perf_counter()
        self.scored = self.scheduler.next(self.steps_done, self.policy, progress)
        batch = Batch.gather(self.scored, config.train.prompts, self.ranks, with_rows=self.control is not None)
        advantage, about = self._advantages(batch)
        self.advantage = advantage[batch.mine.start : batch.mine.stop]
        with trace("update"):
            change = self._learn(batch)
        line = metrics(self.steps_done, batch, advantage, change) | about
        line["time"] = timing(*trace.pop_times(), time.perf_counter() - start, self.scored, len(advantage))
        return change, line

    def sync_weights(self) -> None:
        """Give the sampler the policy as it is now, when it has sampled what it is sampling."""
        self.scheduler.sync_weights(self.policy, self.steps_done)

    def _advantages(self, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """Advantage of each completion of all ranks, float32 [N], and what the line of metrics says about it."""
        if self.control is None:
            return advantages(batch, self.config), {}
        with self.worker.trace("diversity"):
            advantage, about = self.control.advantages(batch)
        return advantage, {"diversity": about}

    def _learn(self, batch: Batch) -> Update:
        """Take the optimizer steps of a batch, of whose completions `scored` and `advantage` are this rank's.

        The statistics are those of the last, but how far sampler and trainer are apart is measured at the first, before
        which the two hold the same policy.
        """
        settings, temperature = self.settings, self.config.sampling.temperature
        self.previous = copy.deepcopy(self.policy) if settings.pipeline == "one-step-off" else None
        batches = list(micro_batches(self.scored.rollout, settings.micro_batch, self.device))
        ref_logprobs = reference_logprobs(self.reference, batches, temperature, self.dtype, self.config.grpo.kernel)
        mismatch: dict[str, float] = {}
        for _ in range(settings.iterations):
            self._rehearse()
            change = update(
                self.policy,
                self.optimizer,
                batches,
                ref_logprobs,
                self.advantage,
                self.config.grpo,
                temperature=temperature,
                learning_rate=scheduled_rate(
                    self.steps_done, settings.steps, settings.learning_rate, settings.schedule, settings.warmup
                ),
                max_grad_norm=settings.max_grad_norm,
                dtype=self.dtype,
                lengths=torch.from_numpy(batch.lengths),
                ranks=self.ranks,
                trace=self.worker.trace,
            )
            mismatch = mismatch or {name: change.stats[name] for name in MISMATCH_STATS}
            if change.skipped:
                break
        self.steps_done += 1
        if self.average and not change.skipped:
            self.average.add(self.policy)
        self.skipped = self.skipped + 1 if change.skipped else 0
        return replace(change, stats=change.stats | mismatch)

    def _rehearse(self) -> None:
        """Add the gradient of the clips that this step rehearses, this rank's share of them."""
        if self.control is None or not self.control.settings.rehearse:
            return
        drawn, settings = self.control.rehearsal(self.settings.seed, self.steps_done), self.control.settings
        mine = self.ranks.share(len(drawn))
        batches = list(micro_batches(drawn.select(mine), self.settings.micro_batch, self.device)) if mine else []
        temperature, kernel = self.config.sampling.temperature, self.config.grpo.kernel
        tokens, weight = int(drawn.lengths.sum()), settings.rehearse_weight
        rehearse(self.policy, batches, tokens, weight, temperature, self.dtype, kernel)

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
        if self.control is not None:
            record[_CONTROL_KEY] = self.control.state
        if held_out_reward is not None:
            record[BEST_KEY] = held_out_reward
        weights = None
        if self.average is not None:
            weights, record[_AVERAGED_KEY] = self.average.weights, self.average.steps
        return Snapshot.of(self.steps_done, self.policy, self.optimizer, record, self.previous, weights)


def advantages(batch: Batch, config: Config) -> torch.Tensor:
    """Advantage of each completion of all ranks, float32 [N], from the sum of its scores as reward.normalize has it."""
    signal, group = torch.from_numpy(batch.scores.total), torch.from_numpy(batch.group)
    if config.reward.normalize == "group":
        terms = {name: torch.from_numpy(values) for name, values in batch.scores.terms.items()}
        signal = normalised_sum(terms, config.reward.terms, group)
    return group_advantages(signal, group, config.train.advantage_scale)
