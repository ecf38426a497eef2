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
from fastsmart.music.ngrams import figures
from fastsmart.music.training_set import TrainingSet, require_training_set
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.tokens.decode import decode
from fastsmart.trainer.batch import MicroBatch, packed, uploaded
from fastsmart.trainer.rounds import Arrays, Round, RoundAlgorithm
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, completion_logprobs, known_mean, reference_logprobs

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


class Dpo(RoundAlgorithm[Pairs]):
    """Rounds of preference steps (see `fastsmart.dpo.settings.DpoSettings`)."""

    section, making = "dpo", "reference"

    def __init__(self, trainer: Trainer, folder: Path, start: tuple[int, int] = (0, 0)) -> None:
        require_training_set(trainer.config.dpo.training_set, "dpo.training_set")
        super().__init__(trainer, folder, start)
        self.training = self._training_set(folder / "training-set") if self.settings.training_set else None

    def made_of(self, found: Round) -> Pairs:
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
            "chosen_reward": known_mean(reward[np.unique(chosen)]),
            "rejected_reward": known_mean(reward[np.unique(rejected)]),
            "refused": {name: int(values.sum()) for name, values in refused.items()},
        }
        return Pairs(chosen, rejected, reference, about)

    def _refused(self, found: Round) -> dict[str, np.ndarray]:
        """Which completions may not be chosen, bool [N], by the reason."""
        rollout, vocab = found.rollout, self.trainer.policy.vocab
        last = rollout.ids[np.arange(len(rollout)), rollout.lengths - 1]
        reasons = {
            "empty": lambda: found.batch.notes < self.settings.fewest_notes,
            "duplicate": lambda: repeated(
                [row[:length] for row, length in zip(rollout.ids, rollout.lengths, strict=True)], found.batch.group
            ),
            "cut-off": lambda: last != vocab.eos_id,
        }
        refused = {name: reasons[name]() for name in self.settings.refuse}
        if self.training is None:
            return refused
        notes = decode(rollout.sequences(), vocab, self.trainer.config.audio.max_seconds)
        return refused | {"copy": self.training.distance(figures(notes)) < self.settings.copy_distance}

    def _training_set(self, keep: Path) -> TrainingSet:
        """The pieces that copies are told by; the leader encodes them into `keep`, then the others read them."""
        ranks, found = self.trainer.ranks, []
        for leads in (True, False):
            if ranks.leader is leads:
                source, vocab = self.settings.training_set, self.trainer.policy.vocab
                found.append(TrainingSet.open(source, keep, vocab, lambda done, total: None))
            ranks.broadcast(0)
        return found[0]

    def _reference(self, rollout: Rollout, needed: np.ndarray) -> Arrays:
        """Log-prob of each of these completions [U] under the reference."""
        trainer = self.trainer
        policy = trainer.reference if self.settings.reference == "base" else trainer.policy
        batches = trainer.share_in_micro_batches(rollout.select(needed))
        sums = np.zeros(len(trainer.ranks.share(len(needed))))
        found = reference_logprobs(policy.eval(), batches, *trainer.forward_options)
        for batch, logprob in zip(batches, found, strict=True):
            sums[batch.completions.numpy()] = completion_sums(logprob, batch.sequence, len(batch.lengths)).cpu().numpy()
        return {"logprob": trainer.ranks.gather(sums[:, None], len(needed))[:, 0]}

    def chosen(self, made: Pairs, number: int, step: int) -> np.ndarray:
        """Numbers of pairs."""
        seed = (self.trainer.settings.seed, RandomStream.ROUND, number)
        return pairs_of_step(len(made.chosen), self.settings.pairs, step, seed)

    def learn(self, found: Round, made: Pairs, chosen: np.ndarray) -> Update:
        """Take a preference step on the pairs of this step."""
        trainer, count = self.trainer, len(chosen)
        if not count:  # nothing was better than anything else, so there is nothing to learn
            stats = dict.fromkeys(SUMS, float("nan")) | {"pairs": 0.0, "tokens": 0.0}
            return Update(stats, 0.0, trainer.learning_rate)
        share = trainer.ranks.share(count)
        mine = chosen[share.start : share.stop]
        size = trainer.settings.micro_batch
        total, change = self.step_on(
            pair_batches(found.rollout, made.chosen[mine], made.rejected[mine], size, trainer.device),
            lambda batch: self._add_gradient(batch, made.reference, count),
            sums=len(SUMS) + 1,
        )
        means = {name: value / count for name, value in zip(SUMS, total, strict=False)}
        return replace(change, stats=means | {"pairs": float(count), "tokens": total[-1]})

    def about(self, found: Round, made: Pairs) -> tuple[np.ndarray, dict[str, Any]]:
        used = np.zeros(len(found.rollout))
        used[np.concatenate([made.chosen, made.rejected])] = 1.0
        return used, made.about

    def evidence_of(self, found: Round, made: Pairs, chosen: np.ndarray) -> dict[str, np.ndarray]:
        pairs = {"chosen": made.chosen[chosen], "rejected": made.rejected[chosen]}
        return {**vars(found.rollout), **pairs, "reference": made.reference}

    def _add_gradient(self, batch: MicroBatch, reference: np.ndarray, count: int) -> torch.Tensor:
        """Add a micro-batch's share of the gradient of the mean loss over `count` pairs; gives `SUMS` and the tokens of
        its pairs, float64."""
        trainer, half = self.trainer, len(batch.lengths) // 2
        logprob = completion_logprobs(trainer.policy, batch, *trainer.forward_options).logprob
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
