"""Where a session stands, beside its choices, as `session.json` keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastsmart.live.settings import BOLDEST, BOLDNESS, LISTENER, LONGEST_NAME
from fastsmart.machine.files import read_file, write_atomic
from fastsmart.taste.choices import NAME

Pair = tuple[str, str]
MOST_HEARD = 4000  # ids of clips that were played and not judged


@dataclass(frozen=True)
class Place:
    """Where a session stands.

    listener : whose choices are written down
    boldness : from 0 to `BOLDEST`
    paused   : whether training rests
    pair     : ids of the clips that are heard now, left and right; None = none yet
    later    : pairs that an undo has put off, to be heard next
    heard    : clips that were played and not judged, oldest first
    phrase   : ids of the answers to a phrase, while one is being answered; empty while the policy plays freely
    bars     : of the phrase's file that are taken; 0 = all
    """

    listener: str = LISTENER
    boldness: int = BOLDNESS
    paused: bool = False
    pair: Pair | None = None
    later: tuple[Pair, ...] = ()
    heard: tuple[str, ...] = ()
    phrase: tuple[str, ...] = ()
    bars: int = 0

    def save(self, path: Path) -> None:
        """Write it in one step; raises UserError when the disk is full."""
        write_atomic(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Place:
        """Read what `save` wrote; a new place where there is nothing, or nothing whole: choices do not depend on it."""
        try:
            tree = json.loads(read_file(path).decode("utf-8"))
            place = Place(
                str(tree["listener"]),
                int(tree["boldness"]),
                bool(tree["paused"]),
                _pair(tree["pair"]) if tree["pair"] else None,
                tuple(map(_pair, tree["later"])),
                tuple(map(_name, tree["heard"])),
                tuple(map(_name, tree["phrase"])),
                int(tree.get("bars", 0)),
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return Place()
        sound = 0 < len(place.listener) <= LONGEST_NAME and 0 <= place.boldness <= BOLDEST
        return place if sound and place.listener.isprintable() and place.bars >= 0 else Place()


def _name(value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError("no id of a clip")
    return value


def _pair(value: Any) -> Pair:
    left, right = map(_name, value)
    return left, right
