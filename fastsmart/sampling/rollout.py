"""Completions and rollouts, and the contract that every sampling engine keeps.

Shape letters: P prompts, G completions a prompt, N = P x G completions, L tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastsmart.errors import UserError
from fastsmart.sampling.settings import SamplingSettings
from fastsmart.tokens.token_batch import TokenBatch

if TYPE_CHECKING:
    from fastsmart.policy.transformer import Policy


class RandomStream(IntEnum):
    """The second number of a sampling seed, after `train.seed`: what the completions are for. No two are alike."""

    TRAIN = 0
    EVALUATE = 1
    BEST_OF = 2
    PARITY = 3
    CALIBRATE = 4
    ROUND = 5
    ALTERNATIVES = 6


@dataclass(frozen=True)
class Completion:
    """One finished completion.

    index    : its number, counted from `first` of the call that drew it; it answers prompt `(index - first) // G`
    ids      : int32 [length], EOS included where the policy ended the piece itself
    logprobs : float32 [length], log-probability of each id under the distribution it was drawn from
    version  : of the policy that drew it
    """

    index: int
    ids: np.ndarray
    logprobs: np.ndarray
    version: int


@dataclass(frozen=True)
class Rollout:
    """N completions in order of their index, padded on the right.

    prompt_ids, prompt_lengths : int32 [N, longest prompt], int32 [N]
    ids, lengths               : int32 [N, L], int32 [N]; padding is 0
    logprobs                   : float32 [N, L], of the distribution really sampled from; padding is 0
    group                      : int32 [N], number of the prompt
    version                    : policy version
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    group: np.ndarray
    version: int

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, i: int) -> np.ndarray:
        """Prompt and completion i in one, int32."""
        return np.concatenate([self.prompt_ids[i, : self.prompt_lengths[i]], self.ids[i, : self.lengths[i]]])

    def select(self, chosen: range | np.ndarray) -> Rollout:
        """The completions of the given numbers, in this order."""
        part = np.asarray(chosen, np.int64)
        return replace(self, **{name: values[part] for name, values in vars(self).items() if name != "version"})

    @staticmethod
    def concat(parts: Sequence[Rollout]) -> Rollout:
        """The completions of all in order, whose prompts are different ones, drawn by one policy version."""
        (version,) = {part.version for part in parts}
        prompts = np.cumsum([0] + [int(part.group[-1]) + 1 for part in parts])

        def wide(name: str) -> np.ndarray:
            tables = [getattr(part, name) for part in parts]
            width = max(table.shape[1] for table in tables)
            return np.concatenate([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables])

        prompt_lengths, lengths = (
            np.concatenate([getattr(p, n) for p in parts]) for n in ("prompt_lengths", "lengths")
        )
        group = np.concatenate([part.group + before for part, before in zip(parts, prompts, strict=False)])
        group = group.astype(np.int32)
        return Rollout(wide("prompt_ids"), prompt_lengths, wide("ids"), lengths, wide("logprobs"), group, version)

    def sequences(self) -> TokenBatch:
        """Every prompt with its completion, packed."""
        return TokenBatch.pack([self.sequence(i) for i in range(len(self))])

    @staticmethod
    def gather(completions: Iterable[Completion], prompts: TokenBatch, group: int, first: int = 0) -> Rollout:
        """Put finished completions, in whatever order they came, in order of their index, which counts from `first`."""
        ordered = sorted(completions, key=lambda c: c.index)
        if not ordered or [c.index - first for c in ordered] != list(range(len(prompts) * group)):
            raise ValueError(f"{len(ordered)} completions of {len(prompts)} prompts x {group} came back")
        which = np.repeat(np.arange(len(prompts), dtype=np.int32), group)
        prompt_ids, prompt_lengths = pad([prompts.row(p) for p in range(len(prompts))], np.int32)
        ids, lengths = pad([c.ids for c in ordered], np.int32)
        logprobs, _ = pad([c.logprobs for c in ordered], np.float32)
        versions = {c.version for c in ordered}
        if len(versions) != 1:
            raise ValueError(f"completions of several policy versions in one rollout: {sorted(versions)}")
        return Rollout(prompt_ids[which], prompt_lengths[which], ids, lengths, logprobs, which, versions.pop())


class Engine(Protocol):
    """A sampler: holds its own copy of a policy's weights and streams completions as they finish."""

    version: int

    def load(self, policy: Policy, version: int) -> None:
        """Take over the policy's weights; completions carry `version` from now on."""

    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        """Draw `settings.group` completions of each prompt and yield each as soon as it ends, numbered from `first`.

        Completion i depends on the weights, its prompt, `seed` and i alone, not on which others are drawn beside it
        (up to rounding in the matrix products).
        """

    def first_difference(self, policy: Policy) -> str | None:
        """Name of the first of the policy's tensors that the engine computes with in another version; None = none."""

    def close(self) -> None:
        """Give back what the engine holds."""


def check_prompts(prompts: TokenBatch, settings: SamplingSettings, max_positions: int) -> None:
    """Raises UserError for an empty prompt, and for completions longer than the policy's `max_positions`."""
    longest = int(prompts.lengths.max(initial=0)) + settings.max_tokens
    if longest > max_positions:
        raise UserError(
            f"prompt and completion make {longest} tokens, the policy holds {max_positions} (max_position_embeddings, "
            "or sliding_window where that is less, in its config.json); lower sampling.max_tokens"
        )
    if len(prompts) and prompts.lengths.min() < 1:
        raise UserError("a prompt is empty; a policy needs at least one token, such as BOS, to start from")


def not_finite() -> UserError:
    """The error of an engine whose policy has diverged."""
    return UserError("the policy's logits are no longer finite; go back to an earlier checkpoint")


def pad(rows: list[np.ndarray], dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array, zeros on the right, and their lengths, int32."""
    lengths = np.array([len(r) for r in rows], np.int32)
    out: np.ndarray = np.zeros((len(rows), int(lengths.max(initial=0))), dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out, lengths
