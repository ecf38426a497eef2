"""Values, bytes and JSON that nobody means, all from one seeded generator."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

NUMBERS = (
    *("0", "-0", "-1", "1", "2", "7", "0.5", "1e-320", "-1e-9", "1e400", "-1e400", "nan", "-nan", "inf", "-inf"),
    *("2147483648", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1000000000", "9" * 21),
    *("9" * 400, "9" * 5000, "0x10", "0o7", "1_000", "١٢", "1e5", "1.5", "999999", "1024", "1e", "--1", "+3", "1,5"),
)
TEXTS = (
    *(
        "",
        " ",
        "''",
        '""',
        "'",
        '"',
        "'''",
        "x",
        "none",
        "null",
        "true",
        "false",
        "True",
        "auto",
        "cpu",
        "ü",
        "日本",
        "𝄞",
    ),
    *(
        "\x1b[31m",
        "\u202etxt",
        "\n",
        "\r",
        "\t",
        "a\0b",
        "\ufeff",
        "\udcff",
        "\u2028",
        "%s%n%x",
        "$HOME",
        "`id`",
        "; rm",
    ),
    *(
        "[/x]",
        "[bold]",
        "[red",
        "<script>alert(1)</script>",
        "{{ 7*7 }}",
        "{0}",
        "..",
        "../..",
        "/",
        ".",
        "~",
        "-",
        "--",
    ),
    *("a=b", "a/b", "/dev/null", "/dev/full", "/proc/self/mem", "con", "x" * 300, "x" * 5000, "x" * 20_000, "-h", "#"),
)
STRUCTURES = (
    *("[]", "[[]]", "[1, 2", "[1, 'a']", "{}", "{a=1}", "{a=nan}", "{consonance=1}", "{ = }", "[" * 3000, "{a=" * 900),
    *(
        "[0.9, 0.95]",
        "['4/4']",
        "[nan]",
        "1979-05-27",
        "07:32:00",
        "1979-05-27T07:32:00Z",
        "[1.0, 2.0, 3.0]",
        "[[1],[2]]",
    ),
    *('"\\u0000"', '"\\uD800"', '"\\q"', '"' + "x" * 9000 + '"', "['train']", "[''  ]", "[true]", "{variety=inf}"),
)
VALUES = (*NUMBERS, *TEXTS, *STRUCTURES)
JSON_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        0.5,
        2**31,
        2**63,
        10**21,
        -(10**9),
        1e308,
        "",
        "x",
        "ü",
        "\x1b[31m",
        "\0",
        "\ud800",
    ),
    *([], {}, [[]], [None], {"a": 1}, "nan", "[/x]", "<b>", "../../x", "x" * 5000, [1] * 1000, {"": []}, float("nan")),
    *(float("inf"), float("-inf"), "/etc/passwd", 10**400),
)


def value(chance: random.Random) -> str:
    """A value of a key or an option; now and then two joined, or one with a character changed."""
    text = chance.choice(VALUES)
    draw = chance.random()
    if draw < 0.1:
        text += chance.choice(VALUES)
    elif draw < 0.2 and text:
        at = chance.randrange(len(text))
        text = text[:at] + chr(chance.choice((0, 10, 27, 34, 39, 44, 91, 92, 255, 8238, 128512))) + text[at + 1 :]
    elif draw < 0.3:
        text = str(
            chance.choice(
                (chance.randint(-(10**6), 10**12), chance.uniform(-10, 10), 10.0 ** chance.randint(-300, 300))
            )
        )
    return text


def changed_bytes(content: bytes, chance: random.Random, most: int = 8) -> bytes:
    """The content with some bytes changed, lost, doubled, cut off or blown up."""
    data = bytearray(content)
    for _ in range(chance.randint(1, most)):
        if not data:
            return bytes(chance.randbytes(chance.randrange(64)))
        at, length = chance.randrange(len(data)), min(chance.choice((1, 1, 2, 4, 16, 64)), len(data))
        draw = chance.random()
        if draw < 0.35:
            data[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        elif draw < 0.5:
            data[at] ^= 1 << chance.randrange(8)
        elif draw < 0.65:
            del data[at : at + length]
        elif draw < 0.75:
            data[at:at] = data[at : at + length] * chance.choice((1, 2, 9))
        elif draw < 0.85:
            data[at:at] = chance.randbytes(length)
        elif draw < 0.93:
            data[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
        else:
            del data[at:]
    return bytes(data)


def changed_json(content: bytes, chance: random.Random) -> bytes:
    """The JSON with one to three of its parts replaced, dropped or added; sometimes its bytes are changed instead."""
    if chance.random() < 0.25:
        return changed_bytes(content, chance, 3)
    tree = json.loads(content)
    for _ in range(chance.randint(1, 3)):
        holder, key = _place(tree, chance)
        if holder is None:
            tree = deepcopy(chance.choice(JSON_VALUES))  # or the next change would change what later cases begin with
        elif chance.random() < 0.2:
            del holder[key]
        elif isinstance(holder, dict) and chance.random() < 0.15:
            holder[chance.choice(TEXTS)] = deepcopy(chance.choice(JSON_VALUES))
        else:
            holder[key] = deepcopy(chance.choice(JSON_VALUES))
    text = json.dumps(tree)
    return ("[" * 100_000 if chance.random() < 0.01 else text).encode("utf-8", "surrogatepass")


def _place(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """A container within the tree and one of its keys, any depth; (None, None) for the tree itself."""
    holder, key, node = None, None, tree
    while isinstance(node, dict | list) and node and (holder is None or chance.random() < 0.75):
        if holder is None and chance.random() < 0.03:
            break
        holder = node
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        node = node[key]
    return holder, key


def changed_words(words: Sequence[str], chance: random.Random) -> list[str]:
    """The words of a command with some replaced, dropped, doubled, swapped or added."""
    words = list(words)
    for _ in range(chance.randint(1, 3)):
        at, draw = chance.randrange(len(words) + 1), chance.random()
        if draw < 0.5 and at < len(words) - 1:
            words[at + 1] = value(chance)
        elif draw < 0.65 and at < len(words):
            del words[at]
        elif draw < 0.75 and at < len(words):
            words.insert(at, words[at])
        else:
            words.insert(at, value(chance))
    return words
