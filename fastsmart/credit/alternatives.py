"""Other tokens that a note could have had, and what the clip would then be worth.

Of a note that was played the policy might have chosen another pitch, velocity or duration. The value of the prefix with
one of these in place of the token needs no sampling and no sound, so a token can be judged against several others
instead of against what usually comes: the expectation over the policy's choices is taken, where a single sample would
add its noise (the all-action policy gradient of Sutton et al. 2001; here by K draws).

Shape letters: N clips, L tokens of the longest completion, J choices (tokens that have alternatives), K alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsmart.tokens.vocabulary import Vocabulary

KINDS = ("Pitch", "Velocity", "Duration")


@dataclass(frozen=True)
class Choices:
    """Tokens of N completions that have alternatives, clip by clip.

    clip, place : int64 [J], of each
    end         : int64 [J], tokens of the completion up to the end of its note
    """

    clip: np.ndarray
    place: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.clip)

    @property
    def at(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the choices in tables [N, L]."""
        return self.clip, self.place


NO_CHOICES = Choices(*np.zeros((3, 0), np.int64))


def token_kinds(vocab: Vocabulary) -> np.ndarray:
    """Number of the kind in `KINDS` of each token, int8 [V]; -1 for all others."""
    kinds = np.full(len(vocab), -1, np.int8)
    for number, kind in enumerate(KINDS):
        kinds[vocab.ids_of(kind)] = number
    return kinds


def choices(ids: np.ndarray, lengths: np.ndarray, ends: np.ndarray, kinds: np.ndarray) -> Choices:
    """The choices among completions [N, L] of these lengths [N].

    ends  : bool [V], whether a token ends a note
    kinds : of `token_kinds`

    Tokens after the last whole note have none.
    """
    within = np.arange(ids.shape[1]) < lengths[:, None]
    ended = np.where(ends[ids] & within, np.arange(1, ids.shape[1] + 1), ids.shape[1] + 1)
    end = np.minimum.accumulate(ended[:, ::-1], axis=1)[:, ::-1]
    clip, place = np.nonzero((kinds[ids] >= 0) & within & (end <= ids.shape[1]))
    return Choices(clip, place, end[clip, place].astype(np.int64))


def drawn(logits: np.ndarray, token: np.ndarray, kinds: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """K alternatives int32 [J, K] of tokens [J], drawn by the policy among those of the same kind; perhaps the same.

    logits  : float [J, V]
    uniform : float [J, K], in [0, 1)
    """
    same = kinds == kinds[token][:, None]
    chance = np.where(same, np.exp(logits - logits.max(1, keepdims=True, where=same, initial=-np.inf)), 0.0)
    total = np.cumsum(chance, axis=1)
    found = (total[:, None, :] <= uniform[..., None] * total[:, -1:, None]).sum(-1)
    last = len(kinds) - 1 - same[:, ::-1].argmax(1)  # where rounding leads beyond the end
    return np.minimum(found, last[:, None]).astype(np.int32)
