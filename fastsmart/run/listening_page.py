"""A page to hear a run by: the clips of listen/ side by side, before and after, beneath what became of reward and
diversity."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from fastsmart.machine.files import write_atomic
from fastsmart.words import counted

PAGE_FILE = "index.html"
SIDES = ("before", "after")
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; media-src 'self'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; margin: 1.5rem 0 }}
figure {{ margin: 0 }}
audio {{ width: 100% }}
</style>
<h1>{heading}</h1>
<p>{about}</p>
<main>
{pairs}
</main>
</html>
"""


@dataclass(frozen=True)
class Outcome:
    """What a run did to the held-out outputs.

    better   : change of the mean reward, in standard deviations of the outputs before; None where it is not known
    interval : of that, low and high; None where it is not known
    varied   : mean distance of two outputs of equal size, over that before; None where outputs were too short
    """

    better: float | None
    interval: tuple[float, float] | None
    varied: float | None

    def sentence(self) -> str:
        """Both numbers in words."""
        if self.better is None:
            return "Nothing could be scored, so nothing is known of the reward"
        word, sign = ("Better", 1) if self.better >= 0 else ("Worse", -1)
        span = ""
        if self.interval:
            low, high = sorted(sign * bound for bound in self.interval)
            span = f" [{low:.2f}, {high:.2f}]"
        varied = "" if self.varied is None else f", {self.varied:.0%} as varied as before"
        return f"{word} by {sign * self.better:.2f} standard deviations{span}{varied}"


def write_page(folder: Path, title: str, outcome: Outcome, basis: str) -> Path | None:
    """Write the page for the clips that a folder has both before and after; None, and no page, where it has none.

    title : what the window is called
    basis : what the numbers rest on, a sentence

    Raises UserError when the disk is full.
    """
    numbers = [path.name.split("-")[0] for path in sorted(folder.glob("*-before.mid"))]
    numbers = [number for number in numbers if (folder / f"{number}-after.mid").is_file()]
    if not numbers:
        return None
    about = (
        f"{counted(len(numbers), 'opening')}, each as the policy went on from it before training and after. {basis} "
        "Better: the mean reward, in standard deviations of the outputs before. Varied: how far two outputs are apart, "
        "in excerpts of equal length."
    )
    pairs = "\n".join(
        f'<div class="pair">{"".join(_clip(folder, number, side) for side in SIDES)}</div>' for number in numbers
    )
    page = _PAGE.format(title=escape(title), heading=escape(outcome.sentence()), about=escape(about), pairs=pairs)
    write_atomic(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _clip(folder: Path, number: str, side: str) -> str:
    """A clip to hear, or where nothing was rendered its notes alone."""
    name = f"{number}-{side}"
    label = f"{number}, {side}"
    player = ""
    if (folder / f"{name}.wav").is_file():
        player = f'<audio controls preload="none" src="{name}.wav" aria-label="{label}"></audio>'
    return f'<figure><figcaption>{label} (<a href="{name}.mid">MIDI</a>)</figcaption>{player}</figure>'
