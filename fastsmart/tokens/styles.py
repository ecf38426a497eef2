"""Names of styles and composers on tokens that a vocabulary has and never uses: `INF1` to `INF16` of the published one.

A policy that knows styles has a `styles.json` beside its tokenizer.json:

    {"styles": {"baroque": "INF1_None", "ragtime": "INF2_None"},
     "composers": {"Joplin, Scott": {"token": "INF3_None", "style": "ragtime"}},
     "metres": {"ragtime": {"2/4": 0.85, "4/4": 0.1, "3/4": 0.05}}}

`metres` may be left out; it says how often pieces of a style are in which metre. A piece of a style begins with BOS,
the token of the style and, where a composer is asked for, the composer's. No id is new, so transformers, vLLM and
MidiTok read the checkpoint as any other.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file

STYLES_FILE = "styles.json"  # beside tokenizer.json
LARGEST_BYTES = 2**16
NAMED_TOKENS = tuple(f"INF{i}_None" for i in range(1, 17))
FORM = '{"styles": {"NAME": "INF1_None", ...}, "composers": {"NAME": {"token": "INF9_None", "style": "NAME"}, ...}}'


@dataclass(frozen=True)
class Styles:
    """The styles that a policy can be asked for.

    styles    : (style, text of its token, such as `INF1_None`)
    composers : (composer, text of the composer's token, the style of the composer's pieces)
    metres    : (style, ((metre such as `3/4`, share of the style's pieces), ...)) of the styles whose metres are known
    """

    styles: tuple[tuple[str, str], ...]
    composers: tuple[tuple[str, str, str], ...] = ()
    metres: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Styles in the order of their file."""
        return tuple(style for style, _ in self.styles)

    def prefix(self, asked: str, where: str = "--style") -> tuple[str, ...]:
        """Texts of the tokens between BOS and the music for `STYLE` or `STYLE/COMPOSER`.

        A composer may be given by the family name alone. Raises UserError, beginning with `where`, naming what the
        policy knows.
        """
        style, _, composer = asked.partition("/")
        if style not in self.names:
            near = get_close_matches(style, self.names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the policy knows {', '.join(self.names)}"
            raise UserError(f"{where} {asked!r} is no style of this policy; {hint}")
        token = dict(self.styles)[style]
        if not composer:
            return (token,)
        known = {name: text for name, text, of in self.composers if of == style}
        found = [name for name in known if composer.lower() in (name.lower(), name.partition(",")[0].lower())]
        if not found:
            shown = "; ".join(known) or "none"
            raise UserError(f"{where} {asked!r}: this policy knows no {composer} of {style}; its composers: {shown}")
        return token, known[found[0]]

    def name_of(self, token: str) -> str:
        """The style or composer whose token has this text; "" for any other token."""
        named = {text: style for style, text in self.styles} | {text: name for name, text, _ in self.composers}
        return named.get(token, "")

    def save(self, folder: Path) -> None:
        """Write styles.json into a checkpoint's folder."""
        composers = {name: {"token": token, "style": style} for name, token, style in self.composers}
        record: dict[str, dict] = {"styles": dict(self.styles), "composers": composers}
        if self.metres:
            record["metres"] = {style: dict(shares) for style, shares in self.metres}
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / STYLES_FILE).write_text(text + "\n", encoding="utf-8")


def read_styles(path: Path, tokens: tuple[str, ...]) -> Styles:
    """The styles of a styles.json, whose tokens must be among the vocabulary's texts.

    Raises UserError naming the file and what is wrong with it.
    """
    try:
        record = json.loads(read_file(path, LARGEST_BYTES).decode("utf-8"))
        styles = tuple(dict(record["styles"]).items())
        entries = dict(record.get("composers", {})).items()
        composers = tuple((name, entry["token"], entry["style"]) for name, entry in entries)
        metres = tuple((style, tuple(dict(shares).items())) for style, shares in dict(record.get("metres", {})).items())
        used = [text for _, text in styles] + [text for _, text, _ in composers]
        whole = all(isinstance(text, str) for text in used)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a list of styles ({type(error).__name__}: {error}); write it as {FORM}"
        ) from error
    if not whole:
        raise UserError(f"{path} is not a list of styles; write it as {FORM}")
    allowed = set(NAMED_TOKENS) & set(tokens)
    for text in used:
        if text not in allowed:
            known = ", ".join(t for t in NAMED_TOKENS if t in allowed) or "none"
            raise UserError(f"{path} uses the token {text}; styles and composers may have {known}")
        if used.count(text) > 1:
            raise UserError(f"{path} uses the token {text} twice; give every style and composer one of its own")
    for name, _, style in composers:
        if style not in dict(styles):
            raise UserError(f"{path} says that {name} is of the style {style!r}, which it does not list")
    for style, shares in metres:
        _check_metres(path, style, shares, dict(styles), tokens)
    return Styles(styles, composers, metres)


def _check_metres(
    path: Path, style: str, shares: tuple[tuple[str, float], ...], known: dict[str, str], tokens: tuple[str, ...]
) -> None:
    """Raise UserError for metres of a style that is not listed, or that no opening can be drawn from."""
    if style not in known:
        raise UserError(f"{path} gives metres of {style!r}, which it does not list as a style")
    for metre, share in shares:
        if f"TimeSig_{metre}" not in tokens:
            raise UserError(f"{path} says that {style} is in {metre!r}, for which the vocabulary has no token")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
            raise UserError(f"{path} gives {metre} of {style} the share {share!r}; it must be a number above 0")
    if not shares:
        raise UserError(f"{path} gives no metre of {style}; name one, or leave {style} out of its metres")
