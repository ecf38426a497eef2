"""Prefixes of clips that end with a whole note, and what can be counted in them.

Shape letters: N clips, P prefixes of all clips, clip by clip, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numba
import numpy as np

from fastsmart.errors import UserError
from fastsmart.music.features import features
from fastsmart.notes import NoteBatch
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import asked_styles
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

AT_ONCE = 20_000  # prefixes decoded together: some hundred MB

Counting = Callable[[NoteBatch], Mapping[str, np.ndarray]]  # what else to count in N clips, float64 [N] by name


def nothing_else(notes: NoteBatch) -> Mapping[str, np.ndarray]:
    """A `Counting` of nothing."""
    return {}


@dataclass(frozen=True)
class Prefixes:
    """Prefixes of N clips: of each its prompt alone, then one more after every note, and the whole clip.

    clip     : int64 [P]
    tokens   : int64 [P], completion tokens
    features : float64 [P, F]
    offsets  : int64 [N + 1], clip n holds prefixes offsets[n] .. offsets[n + 1] - 1
    """

    clip: np.ndarray
    tokens: np.ndarray
    features: np.ndarray
    offsets: np.ndarray

    def steps(self, values: np.ndarray) -> np.ndarray:
        """Change of values [P] from each prefix of a clip to the next, [P - N]."""
        return np.diff(values)[self.clip[1:] == self.clip[:-1]]


def note_prefixes(
    prompts: TokenBatch,
    completions: TokenBatch,
    vocab: Vocabulary,
    longest: int,
    max_seconds: float,
    also: Counting = nothing_else,
) -> Prefixes:
    """The prefixes of N clips and their features.

    longest     : tokens at which a completion is cut off; a shorter one has ended by itself
    max_seconds : of a clip, that a reward hears; features count no more
    also        : counts more of the notes that a reward hears

    Features are those of `fastsmart.music.features`, what is counted also, the seconds played so far, whether these are
    all that a reward hears, the tokens, whether the policy has ended the clip, and, where prompts ask for several
    styles, which of them a clip is to be in: what a note is worth may depend on it. Raises UserError as `note_ends`
    does.
    """
    ends = note_ends(vocab)
    lengths = completions.lengths
    cuts = [_cuts(ids, ends) for ids in completions]
    clip, tokens = np.repeat(np.arange(len(cuts)), [len(c) for c in cuts]), np.concatenate(cuts)
    ended = (tokens == lengths[clip]) & (lengths[clip] < longest)
    found = [
        _features(prompts, completions, vocab, clip[s : s + AT_ONCE], tokens[s : s + AT_ONCE], max_seconds, also)
        for s in range(0, len(clip), AT_ONCE)
    ]
    offsets = np.concatenate([[0], np.cumsum([len(c) for c in cuts])])
    asked = np.array(asked_styles(prompts, vocab))
    styles = [asked[clip] == style for style in sorted(set(asked))]
    counted = np.column_stack([np.concatenate(found), tokens, ended, *(styles if len(styles) > 1 else [])])
    return Prefixes(clip, tokens, counted, offsets)


def swapped(
    prompts: TokenBatch,
    completions: TokenBatch,
    vocab: Vocabulary,
    prefixes: Prefixes,
    chosen: np.ndarray,
    place: np.ndarray,
    token: np.ndarray,
    max_seconds: float,
    also: Counting = nothing_else,
) -> np.ndarray:
    """Features [J, F] of prefixes of these numbers [J], with one token each in place of what was played.

    prefixes     : of the same clips, with as much counted
    place, token : int [J], where in the completion, and what
    """
    clip, tokens = prefixes.clip[chosen], prefixes.tokens[chosen]
    found = np.concatenate(
        [
            _features(
                prompts, completions, vocab, clip[part], tokens[part], max_seconds, also, (place[part], token[part])
            )
            for part in (slice(s, s + AT_ONCE) for s in range(0, len(chosen), AT_ONCE))
        ]
    )
    return np.column_stack([found, prefixes.features[chosen, found.shape[1] :]])


def note_ends(vocab: Vocabulary) -> np.ndarray:
    """Whether each token ends a note, bool [V]: those of durations. Raises UserError where there are none."""
    ends = np.zeros(len(vocab), bool)
    ends[vocab.ids_of("Duration")] = True
    if not ends.any():
        raise UserError(
            "train.algorithm 'credit' needs notes that end with a token of their duration, as REMI's do; this policy's "
            "vocabulary has none"
        )
    return ends


def _cuts(ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Token counts of a completion's prefixes, ascending, from 0 to all of them."""
    return np.unique(np.concatenate([[0], np.flatnonzero(ends[ids]) + 1, [len(ids)]]))


def _features(
    prompts: TokenBatch,
    completions: TokenBatch,
    vocab: Vocabulary,
    clip: np.ndarray,
    tokens: np.ndarray,
    max_seconds: float,
    also: Counting,
    swap: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Features of some prefixes that their notes decide, [P, F]; 0 where one has no value.

    swap : of each a place in the completion and the token that is to stand there, [P] each
    """
    sequences = _beginnings(prompts, completions, clip, tokens)
    if swap is not None:
        sequences.ids[sequences.offsets[:-1] + prompts.lengths[clip] + swap[0]] = swap[1]
    played = np.asarray(decode(sequences, vocab).end_s)
    heard = decode(sequences, vocab, max_seconds=max_seconds)
    columns = [np.nan_to_num(values) for values in (*features(heard).values(), *also(heard).values())]
    return np.column_stack([*columns, np.minimum(played, max_seconds), played >= max_seconds])


def _beginnings(prompts: TokenBatch, completions: TokenBatch, clip: np.ndarray, tokens: np.ndarray) -> TokenBatch:
    """Prompts of the clips of these numbers [P], each with so many tokens [P] of its completion."""
    offsets = np.zeros(len(clip) + 1, np.int64)
    np.cumsum(prompts.lengths[clip] + tokens, out=offsets[1:])
    ids = np.empty(offsets[-1], np.int32)
    _copy(ids, offsets, prompts.ids, prompts.offsets, completions.ids, completions.offsets, clip)
    return TokenBatch(ids, offsets)


@numba.njit(cache=True, nogil=True)
def _copy(
    ids: np.ndarray,
    offsets: np.ndarray,
    prompts: np.ndarray,
    prompt_offsets: np.ndarray,
    completions: np.ndarray,
    completion_offsets: np.ndarray,
    clip: np.ndarray,
) -> None:
    for row in range(len(clip)):
        n, at = clip[row], offsets[row]
        for i in range(prompt_offsets[n], prompt_offsets[n + 1]):
            ids[at] = prompts[i]
            at += 1
        for i in range(offsets[row + 1] - at):
            ids[at + i] = completions[completion_offsets[n] + i]
