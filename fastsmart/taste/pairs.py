"""The choice of the next pair of clips: the one about which an answer is expected to tell most, or a check.

Answers about the former are the least foreseeable, so they hardly show whether the listener is understood. Every fourth
pair is a check: the one of whose answer the taste is surest. Who answers at random soon unlearns it there."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import numpy as np

from fastsmart.reward.taste import Taste

CHECK_EVERY = 4
MOST_CLIPS = 64  # that are paired with each other: 2,016 pairs take some milliseconds


def next_pair(taste: Taste, clips: Mapping[str, np.ndarray], seen: Collection[str]) -> tuple[str, str] | None:
    """Ids of the clips to play left and right; None where fewer than two have not been played yet.

    clips : `features` [F] of the finished clips by id, oldest first; of more than 64 unseen ones the newest are taken
    seen  : ids that have been played, whether or not they were answered; none of them is played again

    It is a check where the taste knows 7, 11, 15, ... choices. Which one is left does not depend on how good they are.
    """
    seen = set(seen)
    unseen = [name for name in clips if name not in seen][-MOST_CLIPS:]
    if len(unseen) < 2:
        return None
    table = np.stack([clips[name] for name in unseen])
    first, second = np.triu_indices(len(unseen), 1)
    if taste.choices > CHECK_EVERY and taste.choices % CHECK_EVERY == CHECK_EVERY - 1:
        best = int(taste.probabilities(table, first, second)[:, :2].max(axis=1).argmax())
    else:
        best = int(taste.information(table, first, second).argmax())
    pair = unseen[first[best]], unseen[second[best]]
    turned = hashlib.sha256("/".join(sorted(pair)).encode()).digest()[0] & 1
    a, b = sorted(pair)
    return (b, a) if turned else (a, b)
