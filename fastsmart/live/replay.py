"""`fastsmart live --replay`: the taste and the policy of a file of choices, without the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastsmart.errors import UserError
from fastsmart.reward.taste import Taste
from fastsmart.run.folder import RunFolder
from fastsmart.taste.replay import TasteFolder, replay
from fastsmart.taste.training import train_round
from fastsmart.words import counted


def replay_all(
    source: str | Path, out: str | Path, listener: str | None, say: Callable[[str], None]
) -> tuple[Taste, Path | None]:
    """Learn the taste, then train the rounds that the page had trained, each on the taste as it was then.

    Returns the taste and the policy that came of it; None where the page had trained none. Raises UserError where a
    file is missing or damaged, and where `out` is the folder of the choices, or has been trained already.
    """
    source, out = Path(source), Path(out)
    if source.parent.resolve() == out.resolve():
        raise UserError(f"{out} holds the choices themselves; choose another --out")
    told, target = TasteFolder(source.parent), TasteFolder(out)
    if target.run.exists():
        raise UserError(f"{out} holds a run already; choose another --out")
    taste = replay(source, out, listener)
    rounds = told.rounds()
    if not rounds:
        return taste, None
    config, log = RunFolder.read(told.run).config, told.choices()
    ids, policy = [choice.id for choice in log.choices], None
    for number, one in enumerate(rounds, 1):
        if one.after not in ids:
            raise UserError(f"{source} has no choice {one.after}, after which was trained; put back the whole file")
        known = told.learn(log.choices[: ids.index(one.after) + 1], one.listener)
        file = target.path / "training.json"
        known.save(file)
        say(f"round {number} of {len(rounds)}: after {counted(known.choices, 'choice')}")
        policy = train_round(target.run, config, file, one.steps, one.beta)
    return taste, policy
