"""Pieces as patches, and back; and the styles they may be asked for."""

from __future__ import annotations

import numpy as np
import pytest

from fastsmart.errors import UserError
from fastsmart.notagen.patches import (
    BEGIN_PATCH,
    END_PATCH,
    decode,
    encode,
    encode_open,
    encode_prompt,
    is_end,
    split_piece,
)
from fastsmart.notagen.styles import Style, read_style, styles

PIECE = """%Classical
%%score 1 2
L:1/8
K:Bb
V:1 treble nm="Piano" snm="Pno."
[r:0/1][V:1]|:B2 d2 f2 b2|[V:2]B,,8|
[r:1/0][V:1]B8:|[V:2][B,,D,F,]8:|
"""


def texts(patches: np.ndarray) -> list[str]:
    return ["".join(map(chr, patch)) for patch in patches]


def test_a_piece_comes_back():
    patches = encode(PIECE)
    assert patches.dtype == np.uint8
    assert patches.shape[1] == 16
    assert (patches[0] == BEGIN_PATCH).all()
    assert (patches[-1] == END_PATCH).all()
    assert decode(patches) == PIECE
    assert is_end(patches[-1])
    assert not any(map(is_end, patches[:-1]))


def test_header_lines_and_bars_begin_patches_of_their_own():
    assert texts(encode(PIECE))[1:-1] == [
        "%Classical\n\2\0\0\0\0",
        "%%score 1 2\n\2\0\0\0",
        "L:1/8\n\2" + "\0" * 9,
        "K:Bb\n\2" + "\0" * 10,
        'V:1 treble nm="P',
        'iano" snm="Pno."',
        "\n\2" + "\0" * 14,
        "[r:0/1][V:1]\2\0\0\0",
        "|:B2 d2 f2 b2\2\0\0",
        "|[V:2]B,,8|\n\2\0\0\0",
        "[r:1/0][V:1]B8\2\0",
        ":|[V:2][B,,D,F,]",
        "8:|\n\2" + "\0" * 11,
    ]


def test_a_patch_of_sixteen_characters_has_no_end():
    (_, patch) = encode_prompt(["%" + "a" * 14])
    assert texts(patch[None]) == ["%" + "a" * 14 + "\n"]


def test_countdowns_are_written_where_there_are_none():
    bare = PIECE.replace("[r:0/1]", "").replace("[r:1/0]", "")
    assert decode(encode(bare)) == PIECE


@pytest.mark.parametrize("cut", range(len(PIECE) - 60, len(PIECE) + 1))
def test_a_piece_that_breaks_off_is_all_there(cut: int):
    text = PIECE[:cut]
    patches, begun = encode_open(text)
    assert decode(patches) + begun.tobytes().decode() == text
    assert len(begun) < 16


def test_random_text_comes_back():
    random = np.random.default_rng(0)
    for _ in range(50):
        body = "".join(random.choice(list("ABcd|:[]V12 \n"), 120))
        text = "K:C\n[V:1]" + body + "\n"
        wanted = "".join(line for part in split_piece(text) for line in part)
        assert decode(encode_open(text)[0]) + encode_open(text)[1].tobytes().decode() == wanted


def test_what_cannot_be_encoded_is_said():
    with pytest.raises(UserError, match="'ü'"):
        encode("K:C\n[V:1]ü|\n")
    with pytest.raises(UserError, match="no line of bars"):
        encode("K:C\n")


# Styles


def test_there_are_112_styles():
    assert len(styles()) == len(set(styles())) == 112
    assert {style.period for style in styles()} == {"Baroque", "Classical", "Romantic"}
    keyboard = [style for style in styles() if style.instrumentation == "Keyboard"]
    assert len(keyboard) == 29


def test_a_style_is_read_in_any_case_and_makes_three_lines():
    style = read_style(" romantic / Chopin, frederic/KEYBOARD")
    assert style == Style("Romantic", "Chopin, Frederic", "Keyboard")
    assert str(style) == "Romantic/Chopin, Frederic/Keyboard"
    assert style.lines == ["%Romantic", "%Chopin, Frederic", "%Keyboard"]
    assert decode(encode_prompt(style.lines)) == "%Romantic\n%Chopin, Frederic\n%Keyboard\n"


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("Romantic/Chopin, Frederic/Orchestral", "Romantic/Chopin, Frederic/Keyboard"),
        ("chopin", "Romantic/Chopin, Frederic/"),
        ("Romantic/Chopin, Fryderyk/Keyboard", "Romantic/Chopin, Frederic/Keyboard"),
        ("Baroque/Mozart, Wolfgang Amadeus/Keyboard", "Classical/Mozart, Wolfgang Amadeus/Keyboard"),
        ("", "Baroque/"),
        ("x" * 10_000, "; "),
    ],
)
def test_another_style_is_refused_with_the_nearest(wanted: str, near: str):
    with pytest.raises(UserError, match="none of the 112") as refused:
        read_style(wanted)
    assert near in str(refused.value)
    assert len(str(refused.value)) < 400
