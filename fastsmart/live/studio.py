"""All that a page is about, put together: session, player, sound, training, and the server before them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.live.answers import PHRASE_FILE, Answers
from fastsmart.live.composer import AT_ONCE, Composer
from fastsmart.live.config import config_for
from fastsmart.live.events import Events
from fastsmart.live.first_policy import keep_first_policy
from fastsmart.live.player import Player
from fastsmart.live.session import Session
from fastsmart.live.settings import LiveSettings
from fastsmart.live.sound import Sound
from fastsmart.live.teacher import Teacher
from fastsmart.live.view import view
from fastsmart.machine.files import make_folder, read_file
from fastsmart.machine.folder_lock import FolderLock
from fastsmart.notes import LARGEST_BYTES
from fastsmart.policy.hf_format import load_policy
from fastsmart.tokens.prompts import make_prompts


@dataclass
class Studio:
    """What the page shows and asks for. Close it when the page is closed."""

    session: Session
    composer: Composer
    teacher: Teacher
    answers: Answers
    sound: Sound
    events: Events
    lock: FolderLock

    @staticmethod
    def open(out: str | Path, settings: LiveSettings) -> Studio:
        """Everything but the threads, which `start` starts; goes on where the folder stands.

        Raises UserError when the policy, FluidSynth, the soundfont or the folder cannot be used.
        """
        import torch

        out = make_folder(out)
        lock = FolderLock(out, "playing to a listener")
        try:
            torch.set_num_threads(settings.threads)
            events, sound = Events(), Sound(settings.soundfont)
            policy = load_policy(settings.policy)
            player = Player(policy)
            config = config_for(settings.policy, settings.max_tokens, settings.seconds)
            _check_room(player, config)
            keep_first_policy(out, settings.policy, policy)
            session = Session(out, settings)
            teacher = Teacher(session)
            composer = Composer(session, player, sound, config, teacher.newest)
            answers = Answers(session, player, settings.max_tokens, settings.seconds, events.publish)
        except BaseException:
            lock.release()
            raise
        composer.idle = answers.warm
        studio = Studio(session, composer, teacher, answers, sound, events, lock)
        session.changed = studio.tell
        studio._go_on_with_the_phrase()
        return studio

    def start(self) -> None:
        """Begin to play and, where the settings say so, to train."""
        self.composer.start()
        self.answers.go_on()
        if self.session.settings.train:
            self.teacher.start()
        else:
            self.teacher.doing = "off"

    def view(self) -> dict[str, Any]:
        """State of the page."""
        return view(self.session, self.composer, self.teacher, self.answers)

    def tell(self) -> None:
        """Send every page the present state, and have the threads look for work."""
        self.events.publish("state", self.view())
        self.composer.look()
        self.teacher.look()
        self.answers.go_on()

    def close(self) -> None:
        """End threads and processes; everything is on disk already."""
        self.composer.stop()
        self.teacher.stop()
        for thread in (self.composer, self.teacher):
            if thread.is_alive():
                thread.join(30)
        self.sound.close()
        self.lock.release()

    def take_file(self, path: str, bars: int) -> None:
        """Begin with answers to a MIDI file; raises UserError when it cannot be continued."""
        try:
            content = read_file(path, LARGEST_BYTES)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; name a MIDI file") from error
        self.answers.take(content, Path(path).name, bars)
        self.answers.begin()

    def _go_on_with_the_phrase(self) -> None:
        if not self.session.place.phrase:
            return
        try:
            content = read_file(self.session.folder.path / PHRASE_FILE, LARGEST_BYTES)
            self.answers.take(content, "your phrase", self.session.place.bars)
        except (UserError, OSError):
            self.answers.drop()


def _check_room(player: Player, config: Config) -> None:
    """Raises UserError where pieces may be longer than the policy can play."""
    prompts = make_prompts(config.prompts, player.vocab, "train", 0, AT_ONCE)
    most = player.room - int(prompts.lengths.max())
    if config.sampling.max_tokens > most:
        raise UserError(
            f"--max-tokens is {config.sampling.max_tokens}; with its beginnings the policy has room for {most}"
        )
