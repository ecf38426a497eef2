"""`fastsmart live --replay`: the taste and the policy of a file of choices, without the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastsmart.errors import UserError
from fastsmart.reward.taste import Taste
from fastsmart.run.folder import RunFolder
from fastsmart.taste import read_choices
from fastsmart.taste.lessons import teach
from fastsmart.taste.replay import TasteFolder, replay
from fastsmart.words import counted


def replay_all(
    source: str | Path, out: str | Path, listener: str | None, say: Callable[[str], None]
) -> tuple[Taste, Path | None]:
    """Learn the taste, then train the last lesson of the page again, on the taste as it was then.

    Returns the taste and the policy that came of it; None where the page had taught none. Raises UserError where a
    file is missing or damaged, and where `out` is the folder of the choices, or has been trained already.
    """
    source, out = Path(source), Path(out)
    if source.parent.resolve() == out.resolve():
        raise UserError(f"{out} holds the choices themselves; choose another --out")
    told, target = TasteFolder(source.parent), TasteFolder(out)
    if target.lessons.path.exists():
        raise UserError(f"{out} holds lessons already; choose another --out")
    taste, lessons = replay(source, out, listener), told.lessons.finished()
    if not lessons:
        return taste, None
    last, log = lessons[-1], read_choices(source)
    ids = [choice.id for choice in log.choices]
    if last.after not in ids:
        raise UserError(f"{source} has no choice {last.after}, after which was trained; put back the whole file")
    known = told.learn(log.choices[: ids.index(last.after) + 1], last.listener)
    file = target.path / "training.json"
    known.save(file)
    say(f"the last of {counted(len(lessons), 'lesson')}: after {counted(known.choices, 'choice')}")
    lesson = target.lessons.begin(last.after, last.choices, last.goal, last.listener)
    return taste, teach(lesson.path, RunFolder.read(last.path).config, file, last.goal)
