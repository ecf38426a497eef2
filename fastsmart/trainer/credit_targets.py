"""What the clips of a round are to learn, note by note.

Shape letters: N clips of a round, L tokens of the longest completion, K alternatives of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastsmart.credit.alternatives import NO_CHOICES, Choices, choices, drawn, token_kinds
from fastsmart.credit.prefixes import Counting, Prefixes, note_ends, note_prefixes, nothing_else, swapped
from fastsmart.credit.value import CrossFittedValue, explained, without
from fastsmart.errors import UserError
from fastsmart.kernels.logprob import logprob
from fastsmart.music.features import FEATURES
from fastsmart.policy.transformer import Policy
from fastsmart.reward.constraints import Constraint
from fastsmart.reward.settings import RewardSettings
from fastsmart.sampling import RandomStream, Rollout
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.batch import MicroBatch, uploaded
from fastsmart.trainer.rounds import Arrays, Round, Rounds
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import completion_states

FOLDS = 4  # of prompts: the value that judges a clip has not been fitted to clips of its prompt


class CreditTargets:
    """Log-ratios that the policy is to reach, of a run's rounds one after the other; the same on every rank.

    Raises UserError for a policy whose notes have no token that ends them, and for a neutral feature there is not.
    """

    def __init__(self, trainer: Trainer, rounds: Rounds) -> None:
        self.trainer, self.rounds, self.settings = trainer, rounds, trainer.config.credit
        self.ends, self.kinds = note_ends(trainer.policy.vocab), token_kinds(trainer.policy.vocab)
        self._neutral = _columns(self.settings.neutral)
        self._also = _also_counted(trainer.config.reward)
        self._scored: dict[int, tuple[np.ndarray, ...]] = {}  # by round: see `_of_round`

    def of(self, found: Round, unit: float, strength: float, pull: float) -> Arrays:
        """What a round's clips are to learn.

        unit           : standard deviation of the base's reward
        strength, pull : of this round, as `CreditSettings` has them

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
        chosen = NO_CHOICES
        if self.settings.alternatives:
            chosen = choices(rollout.ids, rollout.lengths, self.ends, self.kinds)
        earlier, tokens, of_tokens = self._passed(self.trainer.policy.eval(), rollout, chosen)
        own, drift, given_back = advantage.copy(), np.zeros(rollout.ids.shape), np.zeros_like(of_tokens)
        if pull:
            base, _, base_of_tokens = self._passed(self.trainer.reference, rollout, chosen, tokens)
            drift, given_back = earlier - base, pull * (of_tokens - base_of_tokens)
        alternatives: Arrays = {}
        if self.settings.alternatives:
            worths = self._worths(rollout, chosen, tokens[:, 1:], here, worth, value)
            worths *= known[chosen.clip][:, None] / unit
            # what is credited to a choice is not credited to the rest of its note as well
            np.add.at(own, (chosen.clip, chosen.end - 1), -worths[:, 0])
            drift[chosen.at] = 0.0
            columns = {
                "chosen": np.ones(len(chosen), bool),
                "others": tokens[:, 1:].astype(np.int32),
                "other_target": (strength * worths - given_back).astype(np.float32),
                "other_logprob": of_tokens,
            }
            alternatives = {name: _table(rollout.ids.shape, chosen.at, values) for name, values in columns.items()}
        target = strength * own
        if pull and ends.any():
            target[ends] -= pull * np.add.reduceat(np.append(drift.ravel(), 0.0), _begins(ends))
        return alternatives | {
            "target": target.astype(np.float32),
            "advantage": advantage,
            "ends": ends,
            "logprob": earlier,
            "value_r2": np.array(explained(worth[here.offsets[1:] - 1][known], reward[known])),
            "half_value_r2": np.array(explained(worth[_halves(here, rollout.lengths)][known], reward[known])),
        }

    def _worths(
        self,
        rollout: Rollout,
        chosen: Choices,
        others: np.ndarray,
        here: Prefixes,
        worth: np.ndarray,
        value: CrossFittedValue,
    ) -> np.ndarray:
        """Values [J, 1 + K] of J choices and of their alternatives [J, K] about their mean."""
        width = rollout.ids.shape[1] + 1
        prefix = np.searchsorted(here.clip * width + here.tokens, chosen.clip * width + chosen.end)
        worths = np.repeat(worth[prefix][:, None], 1 + others.shape[1], axis=1)
        choice, number = np.nonzero(others != rollout.ids[chosen.at][:, None])
        if len(choice):
            swap = prefix[choice], chosen.place[choice], others[choice, number]
            vocab, heard = self.trainer.policy.vocab, self.trainer.config.audio.max_seconds
            features = swapped(*_packed(rollout), vocab, here, *swap, heard, self._also)
            worths[choice, 1 + number] = value(chosen.clip[choice], features, here.tokens[prefix[choice]])
        return worths - worths.mean(1, keepdims=True)

    @torch.no_grad()
    def _passed(
        self, policy: Policy, rollout: Rollout, chosen: Choices, tokens: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-probs under a policy, in one pass of it over the clips: of completion tokens, float32 [N, L], 0 beyond
        the ends; then of J choices the tokens, int64 [J, 1 + K], and their log-probs, float32 [J, 1 + K].

        tokens : of the choices; None = what was played, and alternatives that this policy draws now
        """
        trainer, (temperature, _, kernel) = self.trainer, self.trainer.forward_options
        n, width = rollout.ids.shape
        share, number = trainer.ranks.share(n), np.full((n, width), -1)
        number[chosen.at] = np.arange(len(chosen))
        draw = self._draw(rollout, chosen)
        table = np.zeros((len(share), width, 1 + 2 * (1 + self.settings.alternatives)))
        weight = policy.lm_head.weight
        for batch in trainer.share_in_micro_batches(rollout):
            row, step = places(batch)
            states = completion_states(policy, batch, *trainer.forward_options)
            table[row, step, 0] = logprob(states, weight, batch.ids, temperature, kernel).logprob.cpu()
            which = number[row + share.start, step]
            picked = np.flatnonzero(which >= 0)
            of_all = states[uploaded(picked, trainer.device)] @ weight.T.float() / temperature
            of_all, which = of_all.log_softmax(-1), which[picked]
            ids = draw(of_all, which) if tokens is None else tokens[which]
            values = of_all.gather(1, uploaded(ids, trainer.device)).cpu().numpy()
            table[row[picked], step[picked], 1:] = np.concatenate([ids, values], axis=1)  # ids are below 2^24
        whole = trainer.ranks.gather(table.reshape(len(share), -1), n).reshape(n, width, -1)
        ids, values = np.split(whole[chosen.at][:, 1:], 2, axis=1)
        return whole[..., 0].astype(np.float32), ids.astype(np.int64), values.astype(np.float32)

    def _draw(self, rollout: Rollout, chosen: Choices) -> Callable[[Tensor, np.ndarray], np.ndarray]:
        """Draw of alternatives: log-probs [j, V] of all tokens at some choices and the numbers of these [j] -> what was
        played and its alternatives, int64 [j, 1 + K]."""
        key = (RandomStream.ALTERNATIVES, self.rounds.place[0])
        random = np.random.default_rng(np.random.SeedSequence(self.trainer.settings.seed, spawn_key=key))
        uniform = random.random((len(chosen), self.settings.alternatives), np.float32)
        played = rollout.ids[chosen.at]

        def draw(logprobs: Tensor, which: np.ndarray) -> np.ndarray:
            others = drawn(logprobs.cpu().numpy(), played[which], self.kinds, uniform[which])
            return np.column_stack([played[which], others]).astype(np.int64)

        return draw

    def _value(self, here: Prefixes, reward: np.ndarray, group: np.ndarray, number: int) -> CrossFittedValue:
        """The value of prefixes, fitted to the clips of this round and of those within the window before it."""
        first = max(self.rounds.first, number - self.settings.window + 1)
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
        return note_prefixes(*_packed(rollout), self.trainer.policy.vocab, longest, heard, self._also)


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


def _table(shape: tuple[int, ...], at: tuple[np.ndarray, ...], values: np.ndarray) -> np.ndarray:
    """Values [J, ...] at places of a table [N, L, ...], zeros elsewhere."""
    table = np.zeros((*shape, *values.shape[1:]), values.dtype)
    table[at] = values
    return table


def _columns(names: Sequence[str]) -> list[int]:
    """Columns of these features among those of a prefix. Raises UserError for one that there is not."""
    for name in names:
        if name not in FEATURES:
            raise UserError(f"credit.neutral has {name!r}; choose of {', '.join(FEATURES)}")
    return [FEATURES.index(name) for name in names]


def _also_counted(reward: RewardSettings) -> Counting:
    """Of notes: how nearly they meet each constraint, where the reward asks for any, since no other feature tells."""
    return Constraint(reward.constraint).degrees if reward.terms.get("constraint") else nothing_else


def _halves(here: Prefixes, lengths: np.ndarray) -> np.ndarray:
    """Number of each clip's first prefix with half of its tokens, int64 [N]."""
    enough = here.tokens >= lengths[here.clip] // 2
    return np.array([np.flatnonzero(enough[a:b])[0] + a for a, b in pairwise(here.offsets)])


def _begins(ends: np.ndarray) -> np.ndarray:
    """Places in the flattened [N, L] at which each segment begins, in order."""
    rows, columns = np.nonzero(ends)
    first = np.concatenate([[True], rows[1:] != rows[:-1]])
    before = np.concatenate([[0], columns[:-1] + 1])
    return rows * ends.shape[1] + np.where(first, 0, before)
