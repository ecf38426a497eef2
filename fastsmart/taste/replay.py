"""The folder of a taste on disk, and how the same choices make the same taste again.

choices.jsonl    the answers, oldest first             taste.json       the joint taste of all listeners
clips/           the clips they are about              tastes/ann.json  that of one listener
standard.json    features of the base's clips          lessons/         runs, each tuned to the taste as it was
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastsmart.errors import UserError
from fastsmart.machine.files import make_folder
from fastsmart.reward.taste import Taste
from fastsmart.reward.taste_features import Standard
from fastsmart.taste.choices import Choice, ChoiceLog, of_listener, read_choices, standing
from fastsmart.taste.clips import ClipFolder
from fastsmart.taste.lessons import LessonFolder

CHOICES_FILE = "choices.jsonl"
STANDARD_FILE = "standard.json"
LESSONS = "lessons"


@dataclass
class TasteFolder:
    """Files of a taste, as the module says; nothing is read before it is asked for."""

    path: Path
    clips: ClipFolder = field(init=False)
    lessons: LessonFolder = field(init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self.clips, self.lessons = ClipFolder(self.path / "clips"), LessonFolder(self.path / LESSONS)

    @property
    def choices_file(self) -> Path:
        return self.path / CHOICES_FILE

    def taste_file(self, listener: str | None = None) -> Path:
        """File of a listener's taste, or of the joint one."""
        if listener is None:
            return self.path / "taste.json"
        return self.path / "tastes" / f"{_file_name(listener)}.json"

    def choices(self) -> ChoiceLog:
        """All choices, those taken back too."""
        return read_choices(self.choices_file)

    def standard(self) -> Standard:
        """Features of the base's clips; raises UserError where they are not there."""
        return Standard.load(self.path / STANDARD_FILE)

    def write_standard(self, standard: Standard) -> None:
        """Keep the features of the base's clips; raises UserError when the disk is full."""
        make_folder(self.path)
        standard.save(self.path / STANDARD_FILE)

    def learn(
        self, choices: Sequence[Choice], listener: str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Taste:
        """The taste after these lines of a file, learnt one choice after the other so that `agreement` is known."""
        told = of_listener(choices, listener)
        taste, standard = Taste.unknown(self.standard()), self.standard()
        for count in range(1, len(told) + 1):
            taste = self.next_taste(told[:count], standard, taste)
            if progress:
                progress(count, len(told))
        return taste

    def next_taste(self, choices: Sequence[Choice], standard: Standard, before: Taste) -> Taste:
        """The taste once the last of these lines is known, from the taste `before` it."""
        stand = standing(choices)
        vectors = self.clips.vectors(id for choice in stand for id in (choice.left, choice.right))
        return Taste.fit(stand, vectors, standard, before)

    def save(self, taste: Taste, listener: str | None = None) -> Path:
        """Write a taste to its file, which is given; raises UserError when the disk is full."""
        path = self.taste_file(listener)
        make_folder(path.parent)
        taste.save(path)
        return path


def replay(source: str | Path, out: str | Path, listener: str | None = None) -> Taste:
    """Learn from a file of choices without the page; the taste is that of the page, to the last digit.

    source   : choices.jsonl, with standard.json and clips/ beside it
    out      : folder that gets the taste
    listener : None = of all listeners together

    Raises UserError where a file is missing or holds no choice, and for a listener who has not chosen.
    """
    source = Path(source)
    if not source.is_file():
        raise UserError(f"no file of choices {source}; name the choices.jsonl that fastsmart live wrote")
    folder, target = TasteFolder(source.parent), TasteFolder(Path(out))
    log = read_choices(source)
    if not log.choices:
        why = f"; {log.damaged[0]}" if log.damaged else ""
        raise UserError(f"{source} holds no choice{why}; name the choices.jsonl that fastsmart live wrote")
    if listener is not None and not of_listener(log.choices, listener):
        known = ", ".join(dict.fromkeys(c.listener or '""' for c in log.choices)) or "nobody"
        raise UserError(f"{listener} has not chosen anything in {source}; there are choices of {known}")
    taste = folder.learn(log.choices, listener)
    target.save(taste, listener)
    return taste


def _file_name(listener: str) -> str:
    """A name for the file of a listener that no two share: letters and digits as they are, others by their number."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else f"_{ord(c):x}_" for c in listener) or "_"
