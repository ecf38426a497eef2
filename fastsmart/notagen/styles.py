"""Style prompts: the triples of period, composer and instrumentation that NotaGen was fine-tuned with.

They are facts of the authors' own list, in styles.txt; each had enough pieces in their data. Other combinations, even
of known names, derail the model.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import resources
from typing import NamedTuple

from fastsmart.errors import UserError

NEAREST = 3  # legal triples that a refusal names


class Style(NamedTuple):
    """A style prompt, such as Romantic, "Chopin, Frederic", Keyboard."""

    period: str
    composer: str
    instrumentation: str

    def __str__(self) -> str:
        return "/".join(self)

    @property
    def lines(self) -> list[str]:
        """The three comment lines that a piece begins with."""
        return [f"%{word}" for word in self]


@cache
def styles() -> tuple[Style, ...]:
    """All legal styles, by period, composer and instrumentation."""
    text = (resources.files("fastsmart.notagen") / "styles.txt").read_text(encoding="ascii")
    return tuple(Style(*line.split("/")) for line in text.splitlines())


def read_style(text: str) -> Style:
    """The legal style that a person writes as Period/Composer/Instrumentation, in whatever case.

    Raises UserError naming the nearest ones where it is none.
    """
    known = {str(style).lower(): style for style in styles()}
    wanted = "/".join(part.strip().lower() for part in text.split("/"))
    if wanted in known:
        return known[wanted]
    raise UserError(
        f"the style {text[:80]!r} is none of the {len(known)} that NotaGen knows; the nearest are "
        f"{'; '.join(map(str, _nearest(wanted[:200])))}"
    )


def _nearest(wanted: str) -> list[Style]:
    """Legal styles by how many of the words fit, then by how alike the texts are."""
    words = [word for part in wanted.split("/") for word in part.replace(",", " ").split()]

    def likeness(style: Style) -> tuple[float, float]:
        text = str(style).lower()
        own = text.replace("/", " ").replace(",", " ").split()
        fit = sum(max((difflib.SequenceMatcher(None, w, o).ratio() for o in own), default=0.0) for w in words)
        return fit, difflib.SequenceMatcher(None, wanted, text).ratio()

    return sorted(styles(), key=likeness, reverse=True)[:NEAREST]
