"""Pairs of a round: which completions are chosen, which are rejected, in which order the pairs come.

Shape letters: N completions of a round, K pairs, B pairs of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose(reward: np.ndarray, pool: np.ndarray, refused: np.ndarray, keep: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the chosen and of the rejected completion of every pair, int64 [K] each.

    reward  : [N], NaN = could not be scored, which is neither chosen nor rejected
    pool    : whole numbers [N]; completions are ranked within their pool, such as those of one prompt
    refused : bool [N], what may be rejected and never chosen
    keep    : share of a pool that is chosen, and that is rejected, at most a half; at least one of each

    Of a pool the best are chosen, walking down as many as are refused but not below its upper half, and the worst are
    rejected. Each chosen one makes a pair with each rejected one that has less reward: where all have the same there is
    no pair. Of equal rewards the lower number counts as the better.
    """
    pairs = [np.zeros((0, 2), np.int64)]
    for name in np.unique(pool):
        members = np.flatnonzero((pool == name) & np.isfinite(reward))
        ranked = members[np.argsort(-reward[members], kind="stable")]
        count = max(1, int(keep * len(ranked) + 0.5))
        upper = ranked[: len(ranked) // 2]
        chosen = upper[~refused[upper]][:count]
        rejected = ranked[max(len(ranked) - count, len(upper)) :]
        product = np.stack(np.meshgrid(chosen, rejected, indexing="ij"), axis=-1).reshape(-1, 2)
        pairs.append(product[reward[product[:, 0]] > reward[product[:, 1]]])
    both = np.concatenate(pairs)
    return both[:, 0], both[:, 1]


def pairs_of_step(count: int, size: int, step: int, seed: tuple[int, ...]) -> np.ndarray:
    """Numbers of the `size` pairs of a step of a round, int64 [B]; none where there are no pairs.

    All `count` pairs come in random order before one comes again in another order; a function of its arguments alone.

    step : counted from the round's beginning
    """
    if not count:
        return np.zeros(0, np.int64)
    places = np.arange(step * size, (step + 1) * size)
    orders = {
        turn: np.random.default_rng(np.random.SeedSequence(seed[0], spawn_key=(*seed[1:], turn))).permutation(count)
        for turn in set((places // count).tolist())
    }
    return np.array([orders[int(place) // count][int(place) % count] for place in places], np.int64)


def repeated(pieces: Sequence[np.ndarray], pool: np.ndarray) -> np.ndarray:
    """Whether each of N completions is, number by number, one before it in its pool, bool [N].

    pieces : N arrays, as of tokens or of patches; pool [N]
    """
    seen: set[tuple[int, bytes]] = set()
    found = np.zeros(len(pieces), bool)
    for i, piece in enumerate(pieces):
        key = int(pool[i]), piece.tobytes()
        found[i] = key in seen
        seen.add(key)
    return found
