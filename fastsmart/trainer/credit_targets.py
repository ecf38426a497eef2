"""What the clips of a round are to learn, note by note.

Shape letters: N clips of a round, L tokens of the longest completion, K alternatives of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastsmart.credit.alternatives import Choices, choices, drawn, token_kinds
from fastsmart.credit.prefixes import Prefixes, note_ends, note_prefixes, swapped
from fastsmart.credit.value import CrossFittedValue, explained, without
from fastsmart.errors import UserError
from fastsmart.music.features import FEATURES
from fastsmart.policy.transformer import Policy
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.micro_batch import MicroBatch, micro_batches, uploaded
from fastsmart.trainer.rounds import Arrays, Round, Rounds
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import completion_states, reference_logprobs

FOLDS = 4  # of prompts: the value that judges a clip has not been fitted to clips of its prompt


class CreditTargets:
    """Log-ratios that the policy is to reach, of a run's rounds one after the other; the same on every rank.

    Raises UserError for a policy whose notes have no token that ends them, and for a neutral feature there is not.
    """

    def __init__(self, trainer: Trainer, rounds: Rounds) -> None:
        self.trainer, self.rounds, self.settings = trainer, rounds, trainer.config.credit
        self.ends, self.kinds = note_ends(trainer.policy.vocab), token_kinds(trainer.policy.vocab)
        self._neutral = _columns(self.settings.neutral)
        self._scored: dict[int, tuple[np.ndarray, ...]] = {}  # by round: see `_of_round`

    def of(self, found: Round, unit: float) -> Arrays:
        """What a round's clips are to learn.

        unit : standard deviation of the base's reward

        target    : float32 [N, L], at a token that ends a segment (a note with what stands before it, or the rest of
                    the clip) the wanted log-ratio to the round's policy of its tokens, without those that have
                    alternatives; 0 elsewhere
        advantage : float32 [N, L], worth of the note that a token ends, in units of the base's reward; 0 elsewhere
        ends      : bool [N, L], whether a token ends its segment
        logprob   : float32 [N, L], under the round's policy
        chosen    : bool [N, L], whether a token has alternatives; this and what follows only where there are any
        others    : int32 [N, L, K], the alternatives
        other_target  : float32 [N, L, 1 + K], wanted log-ratios of the token itself and of its alternatives
        other_logprob : float32 [N, L, 1 + K], under the round's policy
        value_r2, half_value_r2 : share of the variance of the reward that values explain of whole clips and of their
                    halves, of clips that they were not fitted to
        """
        rollout, (here, reward) = found.rollout, self._judged(found)
        value = self._value(here, reward, found.batch.group, found.number)
        worth = value(here.clip, here.features, here.tokens)
        known = np.isfinite(reward)
        ends, advantage = np.zeros(rollout.ids.shape, bool), np.zeros(rollout.ids.shape, np.float32)
        later = np.flatnonzero(here.tokens > 0)
        where = here.clip[later], here.tokens[later] - 1
        ends[where], advantage[where] = True, here.steps(worth) / unit
        advantage[~known] = 0.0
        alternatives: Arrays = {}
        own, drift = advantage.copy(), np.zeros(rollout.ids.shape)
        logprob = self._logprobs(rollout, base=False)
        if self.settings.pull:
            drift = logprob - self._logprobs(rollout, base=True)
        if self.settings.alternatives:
            found_choices = choices(rollout.ids, rollout.lengths, self.ends, self.kinds)
            worths, alternatives = self._alternatives(rollout, found_choices, here, worth, value)
            worths *= known[found_choices.clip][:, None] / unit
            alternatives["other_target"][found_choices.at] += self.settings.strength * worths
            # what is credited to a choice is not credited to the rest of its note as well
            np.add.at(own, (found_choices.clip, found_choices.end - 1), -worths[:, 0])
            drift[found_choices.at] = 0.0
        target = self.settings.strength * own
        if self.settings.pull and ends.any():
            target[ends] -= self.settings.pull * np.add.reduceat(np.append(drift.ravel(), 0.0), _begins(ends))
        half = here.tokens >= rollout.lengths[here.clip] // 2
        first = np.array([np.flatnonzero(half[a:b])[0] + a for a, b in pairwise(here.offsets)])
        return alternatives | {
            "target": target.astype(np.float32),
            "advantage": advantage,
            "ends": ends,
            "logprob": logprob,
            "value_r2": np.array(explained(worth[here.offsets[1:] - 1][known], reward[known])),
            "half_value_r2": np.array(explained(worth[first][known], reward[known])),
        }

    def _alternatives(
        self, rollout: Rollout, found: Choices, here: Prefixes, worth: np.ndarray, value: CrossFittedValue
    ) -> tuple[np.ndarray, Arrays]:
        """Values [J, 1 + K] of J choices and of their alternatives about their mean, and the arrays of `of` about them,
        whose targets hold no more than what is to be given back."""
        others = self._others(rollout, found)
        earlier = self._other_logprobs(self.trainer.policy.eval(), rollout, found, others)
        width = rollout.ids.shape[1] + 1
        prefix = np.searchsorted(here.clip * width + here.tokens, found.clip * width + found.end)
        worths = np.repeat(worth[prefix][:, None], 1 + others.shape[1], axis=1)
        choice, number = np.nonzero(others != rollout.ids[found.at][:, None])
        if len(choice):
            swap = prefix[choice], found.place[choice], others[choice, number]
            vocab, heard = self.trainer.policy.vocab, self.trainer.config.audio.max_seconds
            features = swapped(*_packed(rollout), vocab, here, *swap, heard)
            worths[choice, 1 + number] = value(found.clip[choice], features, here.tokens[prefix[choice]])
        given_back = np.zeros_like(earlier)
        if self.settings.pull:
            base = self._other_logprobs(self.trainer.reference, rollout, found, others)
            given_back = self.settings.pull * (earlier - base)
        chosen = np.zeros(rollout.ids.shape, bool)
        chosen[found.at] = True
        arrays = {"chosen": chosen, "others": np.zeros((*chosen.shape, others.shape[1]), np.int32)}
        for name, values in (("other_target", -given_back), ("other_logprob", earlier)):
            arrays[name] = np.zeros((*chosen.shape, values.shape[1]), np.float32)
            arrays[name][found.at] = values
        arrays["others"][found.at] = others
        return worths - worths.mean(1, keepdims=True), arrays

    def _others(self, rollout: Rollout, found: Choices) -> np.ndarray:
        """Alternatives of J choices, int32 [J, K], drawn by the round's policy."""
        key = (RandomStream.ALTERNATIVES, self.rounds.place[0])
        random = np.random.default_rng(np.random.SeedSequence(self.trainer.settings.seed, spawn_key=key))
        uniform = random.random((len(found), self.settings.alternatives), np.float32)

        def draw(logprobs: Tensor, mine: np.ndarray) -> np.ndarray:
            return drawn(logprobs.cpu().numpy(), rollout.ids[found.at][mine], self.kinds, uniform[mine])

        return self._of_choices(self.trainer.policy.eval(), rollout, found, draw)[:, :-1].astype(np.int32)

    def _other_logprobs(self, policy: Policy, rollout: Rollout, found: Choices, others: np.ndarray) -> np.ndarray:
        """Log-probs under a policy of J choices and their alternatives, float32 [J, 1 + K]."""
        ids = np.column_stack([rollout.ids[found.at], others]).astype(np.int64)

        def pick(logprobs: Tensor, mine: np.ndarray) -> np.ndarray:
            return logprobs.gather(1, uploaded(ids[mine], logprobs.device)).cpu().numpy()

        return self._of_choices(policy, rollout, found, pick).astype(np.float32)

    @torch.no_grad()
    def _of_choices(
        self, policy: Policy, rollout: Rollout, found: Choices, function: Callable[[Tensor, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """A function of log-probs [j, V] of all tokens at some choices, and of their numbers [j], for all J choices."""
        trainer, config, n, width = self.trainer, self.trainer.config, len(rollout), rollout.ids.shape[1]
        share, number = trainer.ranks.share(n), np.full(rollout.ids.shape, -1)
        number[found.at] = np.arange(len(found))
        columns = self.settings.alternatives + 1
        table = np.zeros((len(share), width, columns))
        for batch in self._micro_batches(rollout):
            row, step = places(batch)
            here = number[row + share.start, step]
            picked = np.flatnonzero(here >= 0)
            given = config.sampling.temperature, trainer.dtype, config.grpo.kernel
            states = completion_states(policy, batch, *given)[uploaded(picked, trainer.device)]
            logprobs = (states @ policy.lm_head.weight.T.float() / config.sampling.temperature).log_softmax(-1)
            values = function(logprobs, here[picked])
            table[row[picked], step[picked], : values.shape[1]] = values
        return trainer.ranks.gather(table.reshape(len(share), -1), n).reshape(n, width, columns)[found.at]

    def _value(self, here: Prefixes, reward: np.ndarray, group: np.ndarray, number: int) -> CrossFittedValue:
        """The value of prefixes, fitted to the clips of this round and of those within the window before it."""
        first = max(0, number - self.settings.window + 1)
        self._scored = {n: self._scored.get(n) or self._of_round(n) for n in range(first, number)}
        fits = np.isfinite(reward)[here.clip]
        earlier = list(self._scored.values())
        fold = group % FOLDS
        fitted = [np.full(len(part[1]), -1) for part in earlier] + [fold[here.clip[fits]]]
        parts = [*earlier, (here.features[fits], here.tokens[fits], reward[here.clip[fits]])]
        features, tokens, known = (np.concatenate(column) for column in zip(*parts, strict=True))
        longest = self.trainer.config.sampling.max_tokens
        return CrossFittedValue(fold, features, tokens, known, np.concatenate(fitted), longest)

    def _of_round(self, number: int) -> tuple[np.ndarray, ...]:
        """Features, tokens and reward of the prefixes of an earlier round, of clips that have one."""
        here, reward = self._judged(self.rounds.earlier(number))
        known = np.isfinite(reward[here.clip])
        return here.features[known], here.tokens[known], reward[here.clip[known]]

    def _judged(self, found: Round) -> tuple[Prefixes, np.ndarray]:
        """The prefixes of a round and the rewards [N] that its notes are judged by."""
        here, reward = self._prefixes(found.rollout), found.batch.scores.total.astype(np.float64)
        if self._neutral:
            whole = here.features[here.offsets[1:] - 1]
            reward = without(reward, whole[:, self._neutral], self.settings.neutral_share)
        return here, reward

    def _prefixes(self, rollout: Rollout) -> Prefixes:
        config = self.trainer.config
        longest, heard = config.sampling.max_tokens, config.audio.max_seconds
        return note_prefixes(*_packed(rollout), self.trainer.policy.vocab, longest, heard)

    def _logprobs(self, rollout: Rollout, base: bool) -> np.ndarray:
        """Log-probs of completion tokens under the round's policy or the base, float32 [N, L], 0 beyond the ends."""
        trainer, config, n = self.trainer, self.trainer.config, len(rollout)
        found = np.zeros((len(trainer.ranks.share(n)), rollout.ids.shape[1]))
        batches = self._micro_batches(rollout)
        policy = trainer.reference if base else trainer.policy.eval()
        given = config.sampling.temperature, trainer.dtype, config.grpo.kernel
        for batch, values in zip(batches, reference_logprobs(policy, batches, *given), strict=True):
            row, step = places(batch)
            found[row, step] = values.cpu().double()
        return trainer.ranks.gather(found, n).astype(np.float32)

    def _micro_batches(self, rollout: Rollout) -> list[MicroBatch]:
        """This rank's share of the completions, numbered from 0."""
        mine = rollout.select(self.trainer.ranks.share(len(rollout)))
        size = self.trainer.config.train.micro_batch
        return list(micro_batches(mine, size, self.trainer.device)) if len(mine) else []


def places(batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """Number in the rollout of the completion that each token of a micro-batch is of, and its place there, [M] each."""
    sequence, offsets = batch.sequence.cpu().numpy(), batch.offsets.cpu().numpy()
    return batch.completions.numpy()[sequence], np.arange(len(sequence)) - offsets[sequence]


def _packed(rollout: Rollout) -> tuple[TokenBatch, TokenBatch]:
    """Prompts and completions."""
    prompts, completions = (
        TokenBatch.pack([row[:length] for row, length in zip(ids, lengths, strict=True)])
        for ids, lengths in ((rollout.prompt_ids, rollout.prompt_lengths), (rollout.ids, rollout.lengths))
    )
    return prompts, completions


def _columns(names: Sequence[str]) -> list[int]:
    """Columns of these features among those of a prefix. Raises UserError for one that there is not."""
    for name in names:
        if name not in FEATURES:
            raise UserError(f"credit.neutral has {name!r}; choose of {', '.join(FEATURES)}")
    return [FEATURES.index(name) for name in names]


def _begins(ends: np.ndarray) -> np.ndarray:
    """Places in the flattened [N, L] at which each segment begins, in order."""
    rows, columns = np.nonzero(ends)
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    before = np.concatenate([[0], columns[:-1] + 1])
    return rows * ends.shape[1] + np.where(first, 0, before)
