"""Rests put back into bars: NotaGen's texts leave a voice out of the bars in which it only rests."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from fastsmart.notagen.patches import BARLINES, split_piece

_COUNTDOWN = re.compile(r"^\[r:[^\]]*\]")
_VOICE = re.compile(r"\[V:\s*(\d{1,3})\]")
_HEADER_VOICE = re.compile(r"^V:\s*(\d{1,3})\b")
_GROUP = re.compile(r"\(([\d\s]*)\)")
_LAST_BARLINE = re.compile(f"(?:{'|'.join(map(re.escape, BARLINES))})\\s*$")
_SILENT = re.compile(r'"[^"]*"|![^!]*!|\{[^}]*\}|\[[A-Za-z]:[^\]]*\]')  # chord names, signs, grace notes, inline fields
_LENGTH = r"(\d*)(/*)(\d*)"
_EVENT = re.compile(
    rf"\((?P<p>\d)(?::(?P<q>\d?))?(?::(?P<r>\d?))?|\[(?P<chord>[^\]|]*)\]{_LENGTH}"
    rf"|(?P<note>[_^=]*[A-Ga-g][,']*|[zx]){_LENGTH}|(?P<bars>[ZX])"
)
_FIRST_OF_CHORD = re.compile(rf"[_^=]*[A-Ga-g][,']*{_LENGTH}")
_TUPLET_TIME = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}  # of so many notes in ABC's default; of 5, 7 and 9 two, in simple metres


def restore_rests(text: str) -> str:
    """The piece with every voice in every bar, and without countdowns.

    A voice that a line leaves out rests for the commonest duration of the line's bars, or of those before: visibly (z)
    where it is the first of its group `( ... )` of `%%score` or in none, invisibly (x) otherwise. Raises UserError for
    a text without a body.
    """
    header, body = split_piece(text)
    voices, hidden = _voices(header, body)
    restored, duration, barline = [], Fraction(0), "|"
    for line in body:
        before, bars = _split_voices(_COUNTDOWN.sub("", line.rstrip("\n")))
        durations = Counter(found for found in map(bar_duration, bars.values()) if found)
        duration = durations.most_common(1)[0][0] if durations else duration
        found = [match[0] for bar in bars.values() if (match := _LAST_BARLINE.search(bar))]
        barline = found[-1] if found else barline
        for voice in voices:
            rest = f"{'x' if voice in hidden else 'z'}{_written(duration)}" if duration else ""
            restored.append(f"[V:{voice}]{before}{bars.get(voice, rest + barline)}")
        restored.append("\n")
    return "".join(header + restored)


def bar_duration(bar: str) -> Fraction | None:
    """Length of a voice's bar in units of `L:`; None where it has a rest of whole bars, which does not say its own."""
    total, ratio, left = Fraction(0), Fraction(1), 0
    for event in _EVENT.finditer(_SILENT.sub("", bar)):
        if event["bars"]:
            return None
        if event["p"]:
            count = int(event["p"])
            time = int(event["q"] or _TUPLET_TIME.get(count, 2))
            ratio, left = Fraction(time, count or 1), int(event["r"] or count)
            continue
        length = _length(*event.groups()[4:7]) if event["chord"] is not None else _length(*event.groups()[8:11])
        if event["chord"] is not None:
            first = _FIRST_OF_CHORD.search(event["chord"])
            length *= _length(*first.groups()) if first else 0
        total += length * (ratio if left > 0 else 1)
        left -= 1
    return total


def _length(whole: str, slashes: str, divisor: str) -> Fraction:
    """A length such as 3/2, //, /4 or nothing, which is 1."""
    below = int(divisor) if divisor and slashes else 2 ** len(slashes)
    return Fraction(int(whole or 1), below or 1)


def _written(length: Fraction) -> str:
    return str(length) if length != 1 else ""


def _split_voices(line: str) -> tuple[str, dict[int, str]]:
    """Split a line into what stands before its first voice, and the text of each voice by its number."""
    before, *rest = _VOICE.split(line)
    bars: dict[int, str] = {}
    for number, bar in zip(rest[::2], rest[1::2], strict=True):
        bars[int(number)] = bars.get(int(number), "") + bar
    return before, bars


def _voices(header: list[str], body: list[str]) -> tuple[list[int], set[int]]:
    """All voices in order, of the header and the body, and those whose rests are invisible."""
    found = {int(match[1]) for line in header if (match := _HEADER_VOICE.match(line))}
    found |= {int(number) for line in body for number in _VOICE.findall(line)}
    hidden = {
        int(number)
        for line in header
        if line.startswith("%%score")
        for group in _GROUP.findall(line)
        for number in group.split()[1:]
    }
    return sorted(found), hidden
