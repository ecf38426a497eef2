"""Settings of `fastsmart live`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from fastsmart.errors import UserError
from fastsmart.limits import MOST_COMPONENTS

LOOPBACK = "127.0.0.1"
PORT = 8723
BOLDEST = 10
BOLDNESS = 6  # of a new page
LISTENER = "me"  # of a new page
LONGEST_NAME = 40


@dataclass(frozen=True)
class LiveSettings:
    """Settings of a page that plays, listens and has a policy trained.

    Raises UserError naming the option whose value cannot be used.
    """

    policy: str = "pop909-tiny"
    """Policy that plays at first: shipped name, checkpoint or run folder, hub id."""
    listener: str | None = None
    """Name that choices are written down under; None = the one before, at first "me"."""
    joint: bool = False
    """Whether the choices of all listeners make one taste."""
    host: str = LOOPBACK
    """Address to listen at; any other than a loopback address opens the page to the network."""
    port: int = PORT
    """Port to listen at; 0 = any that is free."""
    seconds: float = 10.0
    """Longest clip that is compared, in seconds; of an answer, beside the phrase it answers."""
    max_tokens: int = 250
    """Tokens that the policy adds to a prompt at most."""
    ready: int = 12
    """Clips kept ready that nobody has heard."""
    most_clips: int = 4000
    """Files of clips kept; of those above, the oldest that no choice is about go."""
    threads: int = 1
    """Threads that sampling computes with; the other cores are for the training beside it."""
    embedding: int | None = None
    """Components of what the first policy makes of a clip that a taste has beside named features; None = as many as the
    folder has, in a new one 0."""
    soundfont: str = ""
    """Path of an SF2 or SF3 file; "" = one that is installed."""
    boldness: int | None = None
    """How far its training goes towards what is liked, from 0 to 10, until the page says otherwise; None = as before,
    at first 6."""
    train: bool = True
    """Whether a process beside the page trains the policy."""

    def __post_init__(self) -> None:
        limits = {
            "port": (0, 65535),
            "seconds": (2, 60),
            "max_tokens": (8, 4096),
            "ready": (4, 1000),
            "most_clips": (64, 10**6),
            "threads": (1, 1024),
            "boldness": (0, BOLDEST),
            "embedding": (0, MOST_COMPONENTS),
        }
        for key, (low, high) in limits.items():
            if getattr(self, key) is not None and not low <= getattr(self, key) <= high:
                raise UserError(
                    f"--{key.replace('_', '-')} is {getattr(self, key)}; it must be from {low:g} to {high:g}"
                )
        if not self.policy:
            raise UserError("--policy is empty; name a shipped policy, a checkpoint folder or a hub id")
        name = self.listener
        if name is not None and (not 0 < len(name.strip()) <= LONGEST_NAME or not name.isprintable()):
            raise UserError(f"--listener must have from 1 to {LONGEST_NAME} printable characters")


def goal_of(boldness: int) -> float:
    """Mean of the reward `taste` that training goes to, in its own units (standard deviations of the base's clips)."""
    return 0.2 * boldness
