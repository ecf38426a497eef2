"""Has a policy play piece after piece, a few tokens at a time, so that whoever waits for a note is served first.

Shape letters: R pieces that are played side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat

import numpy as np

from fastsmart.policy.transformer import Policy
from fastsmart.sampling import SamplingSettings
from fastsmart.sampling.native import NativeEngine
from fastsmart.tokens.token_batch import TokenBatch

# A part begins with a pass over all that has been played, so the first are short, for the first note to come soon, and
# the later ones long; none is so long that someone who comes in between would wait for it.
PARTS = (8, 8, 16, 32)
PART = 48


class Player:
    """Plays with the newest weights it was given.

    What is `urgent` goes before what is not, which then rests between two parts. Safe to use from several threads.
    """

    def __init__(self, policy: Policy, version: int = 0) -> None:
        self.vocab, self.room = policy.vocab, policy.size.max_positions
        self._engine = NativeEngine(policy, version)
        self._turn = threading.Condition()
        self._busy, self._waiting = False, 0

    @property
    def version(self) -> int:
        """Version of the policy that plays now."""
        return self._engine.version

    def load(self, policy: Policy, version: int) -> None:
        """Play with these weights from the next piece on; pieces that are being played go on with them, too."""
        with self._in_turn(urgent=True):
            self._engine.load(policy, version)

    def play(
        self, prompts: Sequence[np.ndarray], most: int, seed: tuple[int, ...], urgent: bool = False
    ) -> Iterator[list[np.ndarray]]:
        """Continue R prompts and yield all pieces as they are after each part: int32 [tokens so far], R of them.

        The same weights, prompts and seed give the same pieces. A piece that the policy has ended, or that has `most`
        tokens more than its prompt, does not grow.

        Raises UserError when the policy has no room for prompt and tokens, or has diverged.
        """
        pieces = [np.asarray(prompt, np.int32) for prompt in prompts]
        growing, drawn = np.arange(len(pieces)), 0
        sizes = chain(PARTS if urgent else (), repeat(PART))
        for number, size in enumerate(sizes):
            if not len(growing) or drawn >= most:
                return
            part = SamplingSettings(group=1, max_tokens=min(size, most - drawn))
            batch = TokenBatch.pack([pieces[i] for i in growing])
            with self._in_turn(urgent):
                found = sorted(self._engine.stream(batch, part, (*seed, number)), key=lambda c: c.index)
            for i, completion in zip(growing, found, strict=True):
                pieces[i] = np.concatenate([pieces[i], completion.ids])
            growing = growing[[int(c.ids[-1]) != self.vocab.eos_id for c in found]]
            drawn += part.max_tokens
            yield list(pieces)

    @contextmanager
    def _in_turn(self, urgent: bool) -> Iterator[None]:
        with self._turn:
            self._waiting += urgent
            self._turn.wait_for(lambda: not self._busy and (urgent or not self._waiting))
            self._waiting -= urgent
            self._busy = True
        try:
            yield
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()
