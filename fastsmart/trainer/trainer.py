"""The policy that learns: its reference, its optimizer, and how far it has come."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from fastsmart.config import Config
from fastsmart.kernels.jit import choose_kernel
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.checkpoints import BEST_KEY, Checkpoints, Snapshot
from fastsmart.policy.device import resolved_device, resolved_dtype
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.optimizer import make_optimizer, scheduled_rate
from fastsmart.policy.transformer import Policy
from fastsmart.run.trace import Trace
from fastsmart.trainer.batch import Batch
from fastsmart.trainer.diversity_control import DiversityControl
from fastsmart.trainer.micro_batch import micro_batches
from fastsmart.trainer.rehearsal import rehearse
from fastsmart.trainer.rollout_worker import ScoredRollout
from fastsmart.trainer.update import Update, reference_logprobs, update

_SKIPPED_KEY = "skipped_in_a_row"
_CONTROL_KEY = "diversity_control"
MISMATCH_STATS = ("token_mult_prob_error", "mismatch_k3", "logprob_gap_max")


class Trainer:
    """Goes on from the newest of the checkpoints, or starts from the config's policy.

    step     : optimizer batches done; the version of `policy`
    skipped  : how many of the last of them, in a row, had a gradient that was not finite
    previous : with train.pipeline "one-step-off" the policy of the step before, else None
    control  : what keeps the outputs different from each other, set when the base has been sampled; None = nothing
    saved_control : its state in the checkpoint that the run goes on from

    Raises UserError where the policy or a checkpoint cannot be read.
    """

    def __init__(self, config: Config, checkpoints: Checkpoints, ranks: Ranks) -> None:
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
        self.step, self.skipped = saved.get("step", 0), saved.get(_SKIPPED_KEY, 0)
        self.previous = checkpoints.previous(self.policy)
        self.control: DiversityControl | None = None
        self.saved_control: dict[str, Any] | None = saved.get(_CONTROL_KEY)

    def sampler_weights(self) -> tuple[Policy, int]:
        """The policy that the next batch is drawn by, and its version."""
        return (self.previous, self.step - 1) if self.previous is not None else (self.policy, self.step)

    def train_step(self, scored: ScoredRollout, batch: Batch, advantage: torch.Tensor, trace: Trace) -> Update:
        """The optimizer steps of one batch; the statistics are those of the last, and how far sampler and trainer are
        apart is that of the first, before which they are to be the same.

        scored      : of this rank's completions
        batch, advantage : of all ranks' completions; float32 [N]
        """
        settings, temperature = self.settings, self.config.sampling.temperature
        self.previous = copy.deepcopy(self.policy) if settings.pipeline == "one-step-off" else None
        batches = list(micro_batches(scored.rollout, settings.micro_batch, self.device))
        ref_logprobs = reference_logprobs(self.reference, batches, temperature, self.dtype, self.config.grpo.kernel)
        mismatch: dict[str, float] = {}
        for _ in range(settings.iterations):
            self._rehearse()
            change = update(
                self.policy,
                self.optimizer,
                batches,
                ref_logprobs,
                advantage[batch.mine.start : batch.mine.stop],
                self.config.grpo,
                temperature=temperature,
                learning_rate=scheduled_rate(
                    self.step, settings.steps, settings.learning_rate, settings.schedule, settings.warmup
                ),
                max_grad_norm=settings.max_grad_norm,
                dtype=self.dtype,
                lengths=torch.from_numpy(batch.lengths),
                ranks=self.ranks,
                trace=trace,
            )
            mismatch = mismatch or {name: change.stats[name] for name in MISMATCH_STATS}
            if change.skipped:
                break
        self.step += 1
        self.skipped = self.skipped + 1 if change.skipped else 0
        return replace(change, stats=change.stats | mismatch)

    def _rehearse(self) -> None:
        """Add the gradient of the clips that this step rehearses, this rank's share of them."""
        if self.control is None or not self.control.settings.rehearse:
            return
        drawn, settings = self.control.rehearsal(self.settings.seed, self.step), self.control.settings
        mine = self.ranks.share(len(drawn))
        batches = list(micro_batches(drawn.select(mine), self.settings.micro_batch, self.device)) if mine else []
        temperature, kernel = self.config.sampling.temperature, self.config.grpo.kernel
        tokens, weight = int(drawn.lengths.sum()), settings.rehearse_weight
        rehearse(self.policy, batches, tokens, weight, temperature, self.dtype, kernel)

    def snapshot(self, held_out_reward: float | None = None) -> Snapshot:
        """The present state, and the held-out reward it was measured to have."""
        record: dict[str, Any] = {_SKIPPED_KEY: self.skipped}
        if self.control is not None:
            record[_CONTROL_KEY] = self.control.state
        if held_out_reward is not None:
            record[BEST_KEY] = held_out_reward
        return Snapshot.of(self.step, self.policy, self.optimizer, record, self.previous)
