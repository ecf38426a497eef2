"""Keeps clips ready that nobody has heard, played by the newest policy, their sound rendered."""

from __future__ import annotations

import sys
import threading
import uuid
from collections.abc import Callable
from functools import partial

import numpy as np

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.live.player import Player
from fastsmart.live.session import STANDARD_CLIPS, Session
from fastsmart.live.sound import Sound
from fastsmart.policy.hf_format import load_policy
from fastsmart.taste import Clip
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.token_batch import TokenBatch

AT_ONCE = 4  # pieces that are played side by side
LOOK_EVERY_S = 1.0  # for a newer policy


class Composer(threading.Thread):
    """A thread that plays clips into a session.

    newest : gives version and place of the policy that is to play
    idle   : called once, when there is nothing else to do for the first time
    error  : why it cannot go on, in a sentence; "" while it can
    """

    def __init__(
        self, session: Session, player: Player, sound: Sound, config: Config, newest: Callable[[], tuple[int, str]]
    ) -> None:
        super().__init__(name="composer", daemon=True)
        self.session, self.player, self.sound, self.config, self.newest = session, player, sound, config, newest
        self.error = ""
        self.idle: Callable[[], None] | None = None
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._random = np.random.default_rng()

    def look(self) -> None:
        """Look now whether there is something to do."""
        self._wake.set()

    def stop(self) -> None:
        """End after the piece that is being played."""
        self._stopped.set()
        self._wake.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                worked, error = self._work(), ""
            except UserError as failure:
                worked, error = False, str(failure)
            if error != self.error:
                self.error = error
                if error:
                    print(f"fastsmart: {error}", file=sys.stderr, flush=True)
                self.session.changed()
            if error:
                self._stopped.wait(LOOK_EVERY_S)  # whatever else happens, or it would fail without a pause
            elif not worked:
                self._wake.wait(LOOK_EVERY_S)
                self._wake.clear()

    def _work(self) -> bool:
        """Take over newer weights, play some clips, or render what will be heard; False = nothing was to be done."""
        version, place = self.newest()
        if version != self.player.version:
            self.player.load(load_policy(place), version)
            self.session.changed()
            return True
        measured = self.session.standard is not None or version != 0
        wanted = self.session.settings.ready if measured else max(self.session.settings.ready, STANDARD_CLIPS + 2)
        if self.session.waiting(version) < wanted:
            return self._play()
        if self._render():
            return True
        idle, self.idle = self.idle, None
        if idle:
            idle()
        return False

    def _play(self) -> bool:
        """Play some clips into the session; those without notes are not for anybody's ears."""
        version = self.player.version
        start, seed = int(self._random.integers(2**31)), int(self._random.integers(2**31))
        prompts = make_prompts(self.config.prompts, self.player.vocab, "train", start, AT_ONCE)
        pieces = list(prompts)
        for played in self.player.play(pieces, self.config.sampling.max_tokens, (seed,)):
            if self._stopped.is_set():
                return False
            pieces = played
        notes = decode(TokenBatch.pack(pieces), self.player.vocab, self.config.audio.max_seconds)
        made = [
            Clip.of(f"clip-{uuid.uuid4().hex[:12]}", pieces[i], len(prompts.row(i)), notes.select([i]), version)
            for i in range(len(pieces))
            if notes.counts[i] > 1
        ]
        self.session.add(made, lambda: self.newest()[0])
        return True

    def _render(self) -> bool:
        """Render a clip that may be heard soon and is not rendered yet."""
        for id in self.session.soon():
            if not self.sound.has(id):
                self.sound.clip(id, partial(self.session.notes, id))
                return True
        return False
