"""Direct preference optimisation in rounds: sample and score, choose pairs, take preference steps (CLaMP-DPO's way).

Wang et al. 2025 (NotaGen, arXiv 2502.18008) choose by the likeness of an output to pieces of its style; here any reward
chooses. Shape letters: N completions of a round, K pairs of it, U completions that are in a pair, B pairs of a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmart.dpo.losses import completion_sums, pair_loss
from fastsmart.dpo.pairs import choose, pairs_of_step, repeated
from fastsmart.policy.optimizer import forget_moments
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.trainer.algorithm import StepResult
from fastsmart.trainer.batch import metrics
from fastsmart.trainer.micro_batch import MicroBatch, micro_batches, packed, uploaded
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.rounds import Arrays, Round, Rounds
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, completion_logprobs, reference_logprobs, step_on_gradients

# Sums over the pairs of a step; their means are metrics
SUMS = ("loss", "chosen_gain", "rejected_gain", "margin", "accuracy", "penalised")


@dataclass(frozen=True)
class Pairs:
    """The pairs of a round.

    chosen, rejected : int64 [K], numbers of completions
    reference        : float64 [N], log-prob of each completion in a pair under the reference; 0 of the others
    about            : what the lines of metrics say of them
    """

    chosen: np.ndarray
    rejected: np.ndarray
    reference: np.ndarray
    about: dict[str, Any]


class Dpo:
    """An `Algorithm`: rounds of preference steps (see `fastsmart.dpo.settings.DpoSettings`).

    folder : of the run, where its rounds lie
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.settings = trainer, trainer.config.dpo
        self.rounds = Rounds(trainer, folder, "dpo")
        self._held: tuple[Round, Pairs] | None = None
        self._last = np.zeros(0, np.int64)

    def step(self, progress: Progress | None = None) -> StepResult:
        trainer, (number, step) = self.trainer, self.rounds.place
        sampled: ScoredRollout | None = None
        if self._held is None or self._held[0].number != number:
            found, sampled = self.rounds.current(progress)
            with trainer.worker.trace("reference"):
                self._held = found, self._pairs(found)
        found, pairs = self._held
        if step == 0:
            forget_moments(trainer.optimizer)  # of the round before
        seed = (trainer.settings.seed, RandomStream.ROUND, number)
        self._last = pairs_of_step(len(pairs.chosen), self.settings.pairs, step, seed)
        with trainer.worker.trace("update"):
            change = self._learn(found, pairs)
        used = torch.zeros(len(found.rollout))
        used[np.concatenate([pairs.chosen, pairs.rejected])] = 1.0
        about = {"number": number, "distance": found.stats["distance"], **pairs.about}
        line = metrics(trainer.steps_done + 1, found.batch, used, change) | {"round": about}
        return StepResult(change, line, sampled, len(used) if sampled else 0)

    @property
    def state(self) -> dict[str, Any]:
        return {}

    @property
    def ends_round(self) -> bool:
        return self.rounds.ends

    def evidence(self) -> dict[str, np.ndarray]:
        assert self._held is not None
        found, pairs = self._held
        chosen, rejected = pairs.chosen[self._last], pairs.rejected[self._last]
        return {**vars(found.rollout), "chosen": chosen, "rejected": rejected, "reference": pairs.reference}

    def _pairs(self, found: Round) -> Pairs:
        """The pairs of a round and the reference's log-probs, which all ranks compute together once a round.

        Completions are ranked within their prompt: only such have one reference distribution.
        """
        reward, refused, pool = found.batch.scores.total, self._refused(found), found.batch.group
        never = np.logical_or.reduce([np.zeros(len(reward), bool), *refused.values()])
        chosen, rejected = choose(reward, pool, never, self.settings.keep)
        needed = np.unique(np.concatenate([chosen, rejected]))
        reference = np.zeros(len(reward))
        reference[needed] = self.rounds.kept("reference", lambda: self._reference(found.rollout, needed))["logprob"]
        about = {
            "pairs": len(chosen),
            "chosen_reward": _mean(reward[np.unique(chosen)]),
            "rejected_reward": _mean(reward[np.unique(rejected)]),
            "refused": {name: int(values.sum()) for name, values in refused.items()},
        }
        return Pairs(chosen, rejected, reference, about)

    def _refused(self, found: Round) -> dict[str, np.ndarray]:
        """Which completions may not be chosen, bool [N], by the reason."""
        rollout, vocab = found.rollout, self.trainer.policy.vocab
        last = rollout.ids[np.arange(len(rollout)), rollout.lengths - 1]
        reasons = {
            "empty": lambda: found.batch.notes < self.settings.fewest_notes,
            "duplicate": lambda: repeated(rollout.ids, rollout.lengths, found.batch.group),
            "cut-off": lambda: last != vocab.eos_id,
        }
        return {name: reasons[name]() for name in self.settings.refuse}

    def _reference(self, rollout: Rollout, needed: np.ndarray) -> Arrays:
        """Log-prob of each of these completions [U] under the reference."""
        trainer, config = self.trainer, self.trainer.config
        policy = trainer.reference if self.settings.reference == "base" else trainer.policy
        share = trainer.ranks.share(len(needed))
        mine = rollout.select(needed[share.start : share.stop])
        sums = np.zeros(len(mine))
        batches = list(micro_batches(mine, config.train.micro_batch, trainer.device)) if len(mine) else []
        temperature, kernel = config.sampling.temperature, config.grpo.kernel
        found = reference_logprobs(policy.eval(), batches, temperature, trainer.dtype, kernel)
        for batch, logprob in zip(batches, found, strict=True):
            sums[batch.completions.numpy()] = completion_sums(logprob, batch.sequence, len(batch.lengths)).cpu().numpy()
        return {"logprob": trainer.ranks.gather(sums[:, None], len(needed))[:, 0]}

    def _learn(self, found: Round, pairs: Pairs) -> Update:
        """Take a preference step on the pairs of this step, of which each rank computes its share."""
        trainer, config, count = self.trainer, self.trainer.config, len(self._last)
        measured = {name: found.stats[name] for name in ("kl", "kl_per_completion", "token_mult_prob_error")}
        if not count:  # nothing was better than anything else, so there is nothing to learn
            stats = measured | dict.fromkeys(SUMS, float("nan")) | {"pairs": 0.0, "tokens": 0.0}
            return Update(stats, 0.0, trainer.learning_rate)
        share = trainer.ranks.share(count)
        mine = self._last[share.start : share.stop]
        chosen, rejected = pairs.chosen[mine], pairs.rejected[mine]
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=trainer.device)
        trainer.policy.train()
        for batch in pair_batches(found.rollout, chosen, rejected, config.train.micro_batch, trainer.device):
            sums += self._add_gradient(batch, pairs.reference, count)
        total, change = step_on_gradients(
            trainer.policy,
            trainer.optimizer,
            sums,
            learning_rate=trainer.learning_rate,
            max_grad_norm=config.train.max_grad_norm,
            ranks=trainer.ranks,
            trace=trainer.worker.trace,
        )
        means = {name: value / count for name, value in zip(SUMS, total, strict=False)}
        return replace(change, stats=means | {"pairs": float(count), "tokens": total[-1]} | measured)

    def _add_gradient(self, batch: MicroBatch, reference: np.ndarray, count: int) -> torch.Tensor:
        """Add a micro-batch's share of the gradient of the mean loss over `count` pairs; gives `SUMS` and the tokens of
        its pairs, float64."""
        trainer, config, half = self.trainer, self.trainer.config, len(batch.lengths) // 2
        given = config.sampling.temperature, trainer.dtype, config.grpo.kernel
        logprob = completion_logprobs(trainer.policy, batch, *given).logprob
        base = uploaded(reference[batch.completions.numpy()], trainer.device)
        normalised = self.settings.length_normalised
        lengths: torch.Tensor | float = uploaded(batch.lengths.double(), trainer.device) if normalised else 1.0
        ours, base = completion_sums(logprob, batch.sequence, 2 * half) / lengths, base / lengths
        pairs = pair_loss(ours[:half], ours[half:], base[:half], base[half:], self.settings.beta, self.settings.penalty)
        (pairs.loss.sum() / count).backward()
        better, fallen = pairs.chosen > pairs.rejected, pairs.chosen < 0
        parts = (pairs.loss.detach(), pairs.chosen, pairs.rejected, pairs.margin, better.double(), fallen.double())
        tokens = torch.tensor(float(batch.lengths.sum()), dtype=torch.float64, device=trainer.device)
        return torch.stack([*(part.sum() for part in parts), tokens])


def pair_batches(
    rollout: Rollout, chosen: np.ndarray, rejected: np.ndarray, size: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Pairs in micro-batches of B chosen completions and then the B rejected ones, those of the longest pairs first.

    size : completions of a micro-batch where all are as long as the longest of all pairs; of shorter ones it takes
           more, as many tokens, padding included, but never less than one pair
    """
    total = (rollout.prompt_lengths + rollout.lengths).astype(np.int64)
    longest = np.maximum(total[chosen], total[rejected])
    order = np.argsort(-longest, kind="stable")
    room, start = size * int(longest.max(initial=1)), 0
    while start < len(order):
        taken = order[start : start + max(1, room // (2 * int(longest[order[start]])))]
        yield packed(rollout, np.concatenate([chosen[taken], rejected[taken]]), device)
        start += len(taken)


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")
