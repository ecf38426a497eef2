"""Credit for single notes: log-ratios are regressed on how much each note changes the reward that is to be expected.

A clip's reward does not say which of its notes earned it, so the gradient of whole clips is mostly noise, and its nats
of KL divergence buy little reward. Here the reward to be expected is regressed on features of what has been played so
far, over the clips of a round (`fastsmart.credit.value`); a note is worth the change it makes, and the policy's
log-ratio of the note is regressed on that worth: a step of soft policy iteration, as REBEL takes it for whole
completions (Gao et al. 2024, arXiv 2404.16767), with a temporal difference in place of the reward.

Shape letters: N clips of a round, L tokens of the longest completion, S segments (a note with what stands before it) of
a micro-batch, M completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmart.credit.prefixes import Prefixes, note_ends, note_prefixes
from fastsmart.credit.value import PrefixValue, explained, without
from fastsmart.errors import UserError
from fastsmart.music.features import FEATURES
from fastsmart.policy.optimizer import forget_moments
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.algorithm import StepResult
from fastsmart.trainer.batch import metrics
from fastsmart.trainer.micro_batch import MicroBatch, micro_batches, uploaded
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.rounds import Arrays, Round, Rounds
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, completion_logprobs, reference_logprobs, step_on_gradients

FOLDS = 4  # of prompts: the value that judges a clip has not been fitted to clips of its prompt
SUMS = ("loss", "log_ratio", "segments")  # over the clips of a step
_UNIT_KEY = "credit_unit"


class Credit:
    """An `Algorithm`: rounds of regression on the credit of notes (see `fastsmart.credit.settings.CreditSettings`).

    folder : of the run, where its rounds lie

    Raises UserError for a policy whose notes have no token that ends them.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.settings = trainer, trainer.config.credit
        self.rounds = Rounds(trainer, folder, "credit")
        self.unit: float | None = trainer.record.get(_UNIT_KEY)
        self._held: tuple[Round, Arrays] | None = None
        self._scored: dict[int, tuple[np.ndarray, ...]] = {}  # by round: see `_of_round`
        self._last = np.zeros(0, np.int64)
        note_ends(trainer.policy.vocab)  # refuses now what could not be cut into notes after the first rollout
        self._neutral = _columns(self.settings.neutral)

    def step(self, progress: Progress | None = None) -> StepResult:
        trainer, (number, step) = self.trainer, self.rounds.place
        sampled: ScoredRollout | None = None
        if self._held is None or self._held[0].number != number:
            found, sampled = self.rounds.current(progress)
            if self.unit is None:
                self.unit = _spread(found.batch.scores.total)
            with trainer.worker.trace("credit"):
                self._held = found, self.rounds.kept("credit", lambda: self._credit(found))
        found, credit = self._held
        if step == 0:
            forget_moments(trainer.optimizer)  # of the round before
        self._last = self._taken(len(found.rollout), number, step)
        with trainer.worker.trace("update"):
            change = self._learn(found.rollout, credit)
        measured = {name: found.stats[name] for name in ("kl", "kl_per_completion", "token_mult_prob_error")}
        change = replace(change, stats=change.stats | measured)
        line = metrics(trainer.steps_done + 1, found.batch, torch.from_numpy(credit["advantage"].sum(1)), change)
        about = {name: float(credit[name]) for name in ("value_r2", "half_value_r2")}
        line["round"] = {"number": number, "distance": found.stats["distance"], **about}
        return StepResult(change, line, sampled, len(found.rollout) if sampled else 0)

    @property
    def state(self) -> dict[str, Any]:
        return {} if self.unit is None else {_UNIT_KEY: self.unit}

    @property
    def ends_round(self) -> bool:
        return self.rounds.ends

    def evidence(self) -> dict[str, np.ndarray]:
        assert self._held is not None
        found, credit = self._held
        return {**vars(found.rollout.select(self._last)), "advantage": credit["advantage"][self._last]}

    def _taken(self, count: int, number: int, step: int) -> np.ndarray:
        """Numbers of the clips of a step; a function of seed, round and step, which takes all before any again."""
        size = min(self.settings.clips, count)
        first, taken = divmod(step * size, count)
        order = [self._order(count, number, first + turn) for turn in range(2)]
        return np.concatenate(order)[taken : taken + size]

    def _order(self, count: int, number: int, turn: int) -> np.ndarray:
        key = (RandomStream.ROUND, number, turn)
        random = np.random.default_rng(np.random.SeedSequence(self.trainer.settings.seed, spawn_key=key))
        return random.permutation(count)

    def _credit(self, found: Round) -> Arrays:
        """What a round's clips are to learn, the same on every rank.

        target    : float32 [N, L], wanted log-ratio to the round's policy of the segment that a token is in
        advantage : float32 [N, L], worth of the note that a token ends, in units of the base's reward; 0 elsewhere
        ends      : bool [N, L], whether a token ends its segment
        logprob   : float32 [N, L], under the round's policy
        value_r2, half_value_r2 : share of the variance of the reward that values explain of whole clips and of their
                    halves, of clips that they were not fitted to
        """
        rollout, here, reward = found.rollout, *self._judged(found)
        worth = self._values(here, reward, found.batch.group, found.number)
        unit = self.unit or 1.0
        ends, advantage = np.zeros(rollout.ids.shape, bool), np.zeros(rollout.ids.shape, np.float32)
        change, later = here.steps(worth), np.flatnonzero(here.tokens > 0)
        where = here.clip[later], here.tokens[later] - 1
        ends[where], advantage[where] = True, change / unit
        advantage[~np.isfinite(reward)] = 0.0
        logprob = self._logprobs(rollout, base=False)
        target = self.settings.strength * advantage
        if self.settings.pull:
            base = self._logprobs(rollout, base=True)
            drift = np.add.reduceat(np.append((logprob - base).ravel(), 0.0), _begins(ends)) if ends.any() else 0.0
            target[ends] -= self.settings.pull * drift
        known = np.isfinite(reward)
        half = here.tokens >= rollout.lengths[here.clip] // 2
        first = np.array(
            [np.flatnonzero(half[a:b])[0] + a for a, b in zip(here.offsets, here.offsets[1:], strict=False)]
        )
        return {
            "target": target,
            "advantage": advantage,
            "ends": ends,
            "logprob": logprob,
            "value_r2": np.array(explained(worth[here.offsets[1:] - 1][known], reward[known])),
            "half_value_r2": np.array(explained(worth[first][known], reward[known])),
        }

    def _values(self, here: Prefixes, reward: np.ndarray, group: np.ndarray, number: int) -> np.ndarray:
        """Values of the prefixes of a round, float64 [P], each by a regression on the clips of other prompts."""
        longest = self.trainer.config.sampling.max_tokens
        first = max(0, number - self.settings.window + 1)
        self._scored = {n: self._scored.get(n) or self._of_round(n) for n in range(first, number)}
        earlier = list(self._scored.values())
        columns = [np.concatenate(part) if part else None for part in zip(*earlier, strict=True)] or [None] * 3
        fold, values = group[here.clip] % FOLDS, np.zeros(len(here.clip))
        for left_out in np.unique(fold):
            fits = (fold != left_out) & np.isfinite(reward[here.clip])
            if len(np.unique(fold)) == 1:  # one prompt: better its own clips than none
                fits = np.isfinite(reward[here.clip])
            parts = here.features[fits], here.tokens[fits], reward[here.clip[fits]]
            features, tokens, known = (
                p if c is None else np.concatenate([c, p]) for c, p in zip(columns, parts, strict=True)
            )
            judged = fold == left_out
            value = PrefixValue(features, tokens, known, longest)
            values[judged] = value(here.features[judged], here.tokens[judged])
        return values

    def _of_round(self, number: int) -> tuple[np.ndarray, ...]:
        """Features, tokens and reward of the prefixes of an earlier round, of clips that have one."""
        here, reward = self._judged(self.rounds.earlier(number))
        known = np.isfinite(reward[here.clip])
        return here.features[known], here.tokens[known], reward[here.clip[known]]

    def _judged(self, found: Round) -> tuple[Prefixes, np.ndarray]:
        """The prefixes of a round and the rewards [N] that its notes are judged by."""
        here, reward = self._prefixes(found.rollout), found.batch.scores.total.astype(np.float64)
        whole = here.features[here.offsets[1:] - 1]
        return here, without(reward, whole[:, self._neutral]) if self._neutral else reward

    def _prefixes(self, rollout: Rollout) -> Prefixes:
        config = self.trainer.config
        prompts, completions = (
            TokenBatch.pack([row[:length] for row, length in zip(ids, lengths, strict=True)])
            for ids, lengths in ((rollout.prompt_ids, rollout.prompt_lengths), (rollout.ids, rollout.lengths))
        )
        heard = config.audio.max_seconds
        return note_prefixes(prompts, completions, self.trainer.policy.vocab, config.sampling.max_tokens, heard)

    def _logprobs(self, rollout: Rollout, base: bool) -> np.ndarray:
        """Log-probs of completion tokens under the round's policy or the base, float32 [N, L], 0 beyond the ends."""
        trainer, config, n = self.trainer, self.trainer.config, len(rollout)
        share = trainer.ranks.share(n)
        mine = rollout.select(share)
        found = np.zeros(mine.ids.shape)
        batches = list(micro_batches(mine, config.train.micro_batch, trainer.device)) if len(mine) else []
        policy = trainer.reference if base else trainer.policy.eval()
        given = config.sampling.temperature, trainer.dtype, config.grpo.kernel
        for batch, logprob in zip(batches, reference_logprobs(policy, batches, *given), strict=True):
            row, step = _places(batch)
            found[row, step] = logprob.cpu().double()
        return trainer.ranks.gather(found, n).astype(np.float32)

    def _learn(self, rollout: Rollout, credit: Arrays) -> Update:
        """Take a step on the mean squared error over this step's clips, of which each rank computes its share."""
        trainer, config, count = self.trainer, self.trainer.config, len(self._last)
        if not credit["target"].any():  # no note was worth more than another; what is left would be rounding
            return Update(dict.fromkeys(SUMS, float("nan")) | {"tokens": 0}, 0.0, trainer.learning_rate)
        share = trainer.ranks.share(count)
        mine = self._last[share.start : share.stop]
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=trainer.device)
        trainer.policy.train()
        for batch in micro_batches(rollout.select(mine), config.train.micro_batch, trainer.device) if len(mine) else ():
            sums += self._add_gradient(batch, mine, credit, count)
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
        return replace(change, stats=means | {"tokens": int(total[-1])})

    def _add_gradient(self, batch: MicroBatch, mine: np.ndarray, credit: Arrays, count: int) -> Tensor:
        """Add a micro-batch's share of the gradient; gives `SUMS` and its tokens, float64."""
        trainer, config = self.trainer, self.trainer.config
        given = config.sampling.temperature, trainer.dtype, config.grpo.kernel
        row, step = _places(batch)
        clip = mine[row]
        before, ends = credit["logprob"][clip, step], credit["ends"][clip, step]
        segment = np.concatenate([[0], np.cumsum(ends)[:-1]])
        target = uploaded(credit["target"][clip, step][ends], trainer.device)
        ratio = completion_logprobs(trainer.policy, batch, *given).logprob - uploaded(before, trainer.device)
        found = torch.zeros_like(target).index_add(0, uploaded(segment, trainer.device), ratio)
        loss = 0.5 * (found - target).square().sum()
        (loss / count).backward()
        parts = (loss.detach().double(), ratio.detach().double().sum())
        numbers = torch.tensor([float(len(target)), float(len(row))], dtype=torch.float64, device=trainer.device)
        return torch.cat([torch.stack(parts), numbers])


def _columns(names: Sequence[str]) -> list[int]:
    """Columns of these features among those of a prefix. Raises UserError for one that there is not."""
    for name in names:
        if name not in FEATURES:
            raise UserError(f"credit.neutral has {name!r}; choose of {', '.join(FEATURES)}")
    return [FEATURES.index(name) for name in names]


def _places(batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """Number in the rollout of the completion that each token of a micro-batch is of, and its place there, [M] each."""
    sequence, offsets = batch.sequence.cpu().numpy(), batch.offsets.cpu().numpy()
    return batch.completions.numpy()[sequence], np.arange(len(sequence)) - offsets[sequence]


def _begins(ends: np.ndarray) -> np.ndarray:
    """Places in the flattened [N, L] at which each segment begins, in order."""
    rows, columns = np.nonzero(ends)
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    before = np.concatenate([[0], columns[:-1] + 1])
    return rows * ends.shape[1] + np.where(first, 0, before)


def _spread(reward: np.ndarray) -> float:
    """Standard deviation of what could be scored; 1 where that is nothing, or all alike."""
    known = reward[np.isfinite(reward)].astype(np.float64)
    return float(known.std()) or 1.0 if len(known) else 1.0
