"""The choice of the next pair of clips: the one about which an answer is expected to tell most."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import numpy as np

from fastsmart.reward.taste import Taste

MOST_CLIPS = 64  # that are paired with each other: 2,016 pairs take some milliseconds


def next_pair(taste: Taste, clips: Mapping[str, np.ndarray], seen: Collection[str]) -> tuple[str, str] | None:
    """Ids of the clips to play left and right; None where fewer than two have not been played yet.

    clips : `features` [F] of the finished clips by id, oldest first; of more than 64 unseen ones the newest are taken
    seen  : ids that have been played, whether or not they were answered; none of them is played again

    Which one is left does not depend on how good they are.
    """
    seen = set(seen)
    unseen = [name for name in clips if name not in seen][-MOST_CLIPS:]
    if len(unseen) < 2:
        return None
    table = np.stack([clips[name] for name in unseen])
    first, second = np.triu_indices(len(unseen), 1)
    best = int(taste.information(table, first, second).argmax())
    pair = unseen[first[best]], unseen[second[best]]
    turned = hashlib.sha256("/".join(sorted(pair)).encode()).digest()[0] & 1
    a, b = sorted(pair)
    return (b, a) if turned else (a, b)
