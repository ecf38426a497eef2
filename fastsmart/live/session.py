"""What is being listened to: the pair that is heard now, the choices, and what they have taught. All of it is on disk.

A choice is in `choices.jsonl` before anything is made of it; `session.json` holds the rest that a reload, or a server
that was killed and started again, goes on with.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.live.place import MOST_HEARD, Pair, Place
from fastsmart.live.settings import BOLDEST, LONGEST_NAME, LiveSettings, goal_of
from fastsmart.machine.files import make_folder
from fastsmart.notes import NoteBatch
from fastsmart.reward.taste import Taste
from fastsmart.reward.taste_embedding import ClipEmbedding
from fastsmart.reward.taste_features import LEAST_CLIPS, Standard
from fastsmart.taste import Choice, Clip, append_choice, next_pair, standing
from fastsmart.taste.choices import of_listener
from fastsmart.taste.replay import CHOICES_FILE, LESSONS, STANDARD_FILE, TasteFolder

SESSION_FILE = "session.json"
EARLIER = "earlier"  # folder of what a reset has put aside
SOON = 16  # clips that are rendered before anybody asks for them
ANSWER = "answer-"  # how the ids of answers to a phrase begin
STANDARD_CLIPS = 2 * LEAST_CLIPS  # of the first policy, in whose units a taste counts


class Stale(UserError):
    """What was asked is about a pair or a choice that is not the present one."""


class Session:
    """One session, which every open page shows. Safe to use from several threads.

    changed  : called after every change
    place    : where it stands
    choices  : lines of the file, oldest first, those of other listeners and those taken back too
    taste    : of what stands of the present listener's choices; None while the first policy's clips are not measured
    damaged  : a sentence for every line of the file that could not be read
    unheard  : clips by id, oldest first, that were never played
    """

    def __init__(self, out: str | Path, settings: LiveSettings, changed: Callable[[], None] = lambda: None) -> None:
        self.folder, self.settings, self.changed = TasteFolder(Path(out)), settings, changed
        self._lock = threading.RLock()
        make_folder(self.folder.path)
        log = self.folder.choices()
        self.choices, self.damaged = list(log.choices), log.damaged
        self.place = Place.load(self.folder.path / SESSION_FILE)
        said: dict[str, Any] = {
            "listener": settings.listener and settings.listener.strip(),
            "boldness": settings.boldness,
        }
        self.place = replace(self.place, **{key: value for key, value in said.items() if value is not None})
        heard = {*self._judged(), *self.place.heard}
        self.unheard: dict[str, Clip] = {}
        for id in self.folder.clips.ids():
            with suppress(UserError):  # a damaged one that nobody has judged is no loss
                if id not in heard:
                    self.unheard[id] = self.folder.clips.load(id)
        self.standard: Standard | None = None
        self.taste: Taste | None = None
        if (self.folder.path / STANDARD_FILE).is_file():
            self.standard = self._known_standard()
        else:
            self._measure()
        if self.standard is not None:
            self._learn(self._saved_taste())
        answered = {(c.left, c.right) for c in standing(self.choices)}  # perhaps just before a kill
        pairs = [pair for pair in (self.place.pair, *self.place.later) if pair and pair not in answered]
        pairs = [pair for pair in pairs if all(map(self.has, pair))]
        self.place = replace(self.place, pair=pairs[0] if pairs else None, later=tuple(pairs[1:]))
        if not pairs:
            self._deal()

    # ------------------------------------------------------------------------------------------- what a listener does

    def choose(self, left: str, right: str, answer: str) -> None:
        """Write down the answer about the present pair, learn from it, and go on to the next pair.

        Raises Stale for another pair, UserError for what is no answer and where the disk is full; then nothing changes,
        unless the answer has been written down: then it counts, and the next pair is heard all the same.
        """
        with self._change():
            if self.place.pair != (left, right):
                raise Stale("these two have been judged already; here are the next two")
            if not (self.has(left) and self.has(right)):
                raise Stale("these two are still being played; choose when both have ended")
            self._write(Choice.new(self.place.listener, left, right, answer))
            try:
                self._learn(self.taste)
            finally:
                self._deal()

    def undo(self) -> None:
        """Take back the listener's last choice and hear its pair again; raises Stale where there is none."""
        with self._change():
            mine = of_listener(standing(self.choices), self.place.listener)
            if not mine:
                raise Stale("there is no choice to take back")
            self._write(Choice.new(self.place.listener, undo=mine[-1].id))
            try:
                self._learn(self.taste)
            finally:
                now = () if self.place.pair is None else (self.place.pair,)
                again = (mine[-1].left, mine[-1].right)
                self._keep(pair=again, later=tuple(pair for pair in (*now, *self.place.later) if pair != again))

    def skip(self) -> None:
        """Go on to another pair without an answer."""
        with self._change():
            self._set_aside(self.place.pair or ())
            self._deal()

    def configure(self, boldness: Any = None, paused: Any = None, listener: Any = None) -> None:
        """Change what is not None; raises UserError for a value that cannot be meant."""
        with self._change():
            if boldness is not None:
                if type(boldness) is not int or not 0 <= boldness <= BOLDEST:
                    raise UserError(f"boldness is a whole number from 0 to {BOLDEST}")
                self._keep(boldness=boldness)
            if paused is not None:
                if type(paused) is not bool:
                    raise UserError("paused is true or false")
                self._keep(paused=paused)
            if listener is not None:
                name = listener.strip() if isinstance(listener, str) else ""
                if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
                    raise UserError(f"a listener's name has from 1 to {LONGEST_NAME} characters")
                self._keep(listener=name)
                self._learn(self._saved_taste())

    def reset(self) -> Path:
        """Begin again without choices. What there was is put aside, with the lessons it was taught in, into the
        folder that is returned, from which it can be replayed."""
        with self._change():
            aside = self.folder.path / EARLIER / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
            make_folder(aside / "clips")
            copied = [self.folder.clips.path(id) for id in self._judged()] + [self.folder.path / STANDARD_FILE]
            for path in filter(Path.is_file, copied):
                shutil.copy(path, aside / path.relative_to(self.folder.path))
            later = (id for id, clip in self._free().items() if clip.version > 0)
            played = {*self._judged(), *self.place.phrase, *(self.place.pair or ()), *later}
            self._never_again(played)  # before the choices about them go, for a kill between the two
            for name in (LESSONS, "taste.json", "tastes", CHOICES_FILE):
                if (self.folder.path / name).exists():
                    (self.folder.path / name).rename(aside / name)
            self.choices, self.taste = [], None
            self._keep(pair=None, later=(), phrase=())
            self._learn(None)
            self._deal()
            return aside

    # ----------------------------------------------------------------------------------------------- what is played

    def add(self, clips: Iterable[Clip], newest: Callable[[], int] | None = None) -> None:
        """Take in new clips; two of them are heard next where nothing is heard now.

        newest : gives the version of the newest policy; clips of later ones, which were given up while they were being
                 played, are left out. None = take all
        """
        with self._change():
            known = newest() if newest else None
            for clip in clips:
                if known is not None and clip.version > known:
                    continue
                if self.standard is not None:
                    clip = clip.embedded(self.standard.embedding)
                self.folder.clips.save(clip)
                self.unheard[clip.id] = clip
            if self.standard is None:
                self._measure()
            self._prune()
            if self.place.pair is None:
                self._deal()

    def begin_answers(self, ids: tuple[str, ...], bars: int = 0) -> None:
        """Hear the first two of these answers to a phrase, whose clips are still to come; of its file so many bars."""
        with self._change():
            self._set_aside((*(self.place.pair or ()), *self.place.phrase))
            self._keep(phrase=ids, bars=bars, pair=(ids[0], ids[1]), later=())

    def end_phrase(self) -> None:
        """Let the policy play freely again."""
        with self._change():
            self._set_aside(self.place.phrase)
            self._keep(phrase=(), pair=None)
            self._deal()

    def forget_after(self, version: int) -> None:
        """Play none of the clips of later policies that nobody has heard yet."""
        with self._change():
            self._set_aside(id for id, clip in self._free().items() if clip.version > version)
            if self.place.pair and any(id in self.place.heard for id in self.place.pair):
                self._deal()

    def has(self, id: str) -> bool:
        """Whether a clip is finished and there."""
        return id in self.unheard or self.folder.clips.path(id).is_file()

    def clip(self, id: str) -> Clip:
        """A clip; raises UserError where there is none."""
        with self._lock:
            return self.unheard.get(id) or self.folder.clips.load(id)

    def notes(self, id: str) -> NoteBatch:
        """The notes of a clip; raises UserError where there is none."""
        return self.clip(id).notes

    def soon(self) -> list[str]:
        """Finished clips that may be heard soon, those of the present pair first."""
        with self._lock:
            pairs = [self.place.pair or (), *self.place.later, self.place.phrase]
            ids = [*(id for pair in pairs for id in pair), *reversed(self._newest({*self.place.heard}))]
            return [id for id in dict.fromkeys(ids) if self.has(id)][:SOON]

    def waiting(self, version: int) -> int:
        """How many free clips of a policy nobody has heard."""
        with self._lock:
            return sum(clip.version == version for clip in self._free().values())

    # ------------------------------------------------------------------------------------------------ what is known

    @property
    def listener(self) -> str | None:
        """Whose choices make the taste; None = everybody's."""
        return None if self.settings.joint else self.place.listener

    def judgements(self) -> list[Choice]:
        """The choices that make the taste: those of the listener that have not been taken back."""
        with self._lock:
            return standing(of_listener(self.choices, self.listener))

    def taste_to_train_on(self, path: Path) -> tuple[str, int, float, str | None] | None:
        """Write the present taste there; gives the id of the last choice it knows, how many it stands on, the goal of
        the present boldness and whose it is. None where nothing is known yet."""
        with self._lock:
            if self.taste is None or not self.taste.choices:
                return None
            self.taste.save(path)
            return self.choices[-1].id, self.taste.choices, goal_of(self.place.boldness), self.listener

    # ----------------------------------------------------------------------------------------------------- inside

    @contextmanager
    def _change(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        finally:  # what was refused, too: a page that asks for it shows what is past
            self.changed()

    def _write(self, choice: Choice) -> None:
        append_choice(self.folder.choices_file, choice)
        self.choices.append(choice)

    def _keep(self, **changes: Any) -> None:
        self.place = replace(self.place, **changes)
        self.place.save(self.folder.path / SESSION_FILE)

    def _set_aside(self, ids: Iterable[str]) -> None:
        """Never play these again."""
        judged = self._judged()
        self._never_again(id for id in ids if id not in judged)

    def _never_again(self, ids: Iterable[str]) -> None:
        heard = list(dict.fromkeys((*self.place.heard, *ids)))
        for id in heard:
            self.unheard.pop(id, None)
        self._keep(heard=tuple(heard[-MOST_HEARD:]))

    def _judged(self) -> set[str]:
        return {id for c in self.choices for id in (c.left, c.right) if id}

    def _saved_taste(self) -> Taste | None:
        path = self.folder.taste_file(self.listener)
        return Taste.load(path) if path.is_file() else None

    def _learn(self, before: Taste | None) -> None:
        """Fit the taste to what stands of the choices.

        before : the taste without the newest of them, which says what was expected; None, or where it lacks more of
                 them than that, for the disk was full: learn them one by one
        """
        if self.standard is None:
            return
        if before is None or abs(before.choices - len(self.judgements())) > 1:
            self.taste = self.folder.learn(self.choices, self.listener)
        else:
            told = of_listener(self.choices, self.listener)
            self.taste = self.folder.next_taste(told, self.standard, before)
        self.folder.save(self.taste, self.listener)

    def _known_standard(self) -> Standard:
        """The standard of the folder; raises UserError where its embedding is not the one that is asked for."""
        standard, asked = self.folder.standard(), self.settings.embedding
        there = len(standard.names) - standard.named
        if asked not in (None, there):
            raise UserError(f"--embedding is {asked}, and {self.folder.path} was begun with {there}; leave it out")
        return standard

    def _measure(self) -> None:
        """Measure the first policy's clips, once there are enough of them."""
        first = [clip for clip in self._free().values() if clip.version == 0 and np.isfinite(clip.vector).any()]
        if len(first) < STANDARD_CLIPS:
            return
        embedding = None
        if self.settings.embedding:
            notes = NoteBatch.concat([clip.notes for clip in first])
            embedding = ClipEmbedding.fit(self.settings.policy, notes, self.settings.embedding)
            for id in self.folder.clips.ids():  # heard already or not
                with suppress(UserError):  # a damaged one, as above
                    clip = self.folder.clips.load(id).embedded(embedding)
                    self.folder.clips.save(clip)
                    if id in self.unheard:
                        self.unheard[id] = clip
            first = [self.unheard[clip.id] for clip in first]
        self.standard = Standard.of(np.stack([clip.vector for clip in first]), embedding=embedding)
        self.folder.write_standard(self.standard)
        self._learn(None)

    def _free(self) -> dict[str, Clip]:
        """Clips that were never played and answer no phrase."""
        return {id: clip for id, clip in self.unheard.items() if not id.startswith(ANSWER)}

    def _deal(self) -> None:
        """Go on to the pair that an answer is expected to tell most about; to none where there are too few clips."""
        if self.place.later:
            self._keep(pair=self.place.later[0], later=self.place.later[1:])
            return
        seen = {*self._judged(), *self.place.heard}
        if self.place.phrase:
            pool = {id: self.unheard[id] for id in self.place.phrase if id in self.unheard}
        else:
            pool = self._newest(seen)
        pair: Pair | None = None
        if self.taste is not None:
            pair = next_pair(self.taste, {id: clip.vector for id, clip in pool.items()}, seen)
        elif len(fresh := [id for id in pool if id not in seen]) >= 2:
            pair = fresh[0], fresh[1]
        for id in self._judged():
            self.unheard.pop(id, None)
        self._keep(pair=pair)

    def _newest(self, seen: set[str]) -> dict[str, Clip]:
        """Free clips that were not played: those of the newest policy, or all where these make no pair."""
        free = {id: clip for id, clip in self._free().items() if id not in seen}
        newest = max((clip.version for clip in free.values()), default=0)
        found = {id: clip for id, clip in free.items() if clip.version == newest}
        return found if len(found) >= 2 else free

    def _prune(self) -> None:
        """Remove the files of clips beyond the most that are kept, the oldest first, but none that a choice is about,
        that is heard now, or that waits to be heard."""
        kept = {*self._judged(), *(self.place.pair or ()), *self.place.phrase, *sum(self.place.later, ())}
        others = [id for id in self.folder.clips.ids() if id not in kept]
        over = len(others) - self.settings.most_clips
        if over > 0:
            age = {id: self.folder.clips.path(id).stat().st_mtime_ns for id in others}
            for id in sorted(others, key=lambda id: age[id])[:over]:
                self.unheard.pop(id, None)
                self.folder.clips.path(id).unlink(missing_ok=True)
