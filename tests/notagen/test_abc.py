"""ABC to notes: what a musician reads in a score is what is heard."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fastsmart.errors import UserError
from fastsmart.notagen.notation import read_abc, sheet
from fastsmart.notagen.rests import bar_duration, restore_rests

HEADER = "L:1/8\nQ:1/4=120\nM:4/4\nK:C\nV:1 treble\nV:2 bass\n"


def heard(text: str) -> list[tuple[float, float, int]]:
    """(beat of the onset, beats, pitch) of every note, by onset and pitch."""
    notes, (reason,) = read_abc([text])
    assert reason == ""
    beats = notes.ticks_per_beat
    rows = zip(notes.onset_tick / beats, notes.duration_tick / beats, notes.pitch.tolist(), strict=True)
    return [(float(on), float(length), pitch) for on, length, pitch in rows]


PIANO = """%Romantic
%Chopin, Frederic
%Keyboard
%%score { ( 1 4 ) | 2 }
L:1/8
Q:1/4=90
M:3/4
K:Bb
V:1 treble nm="Piano" snm="Pno."
V:4 treble
V:2 bass
[r:0/2][V:1]B2 [Bdf]2 z2|[V:2]B,,6-|
[r:1/1][V:1](3efg =e2 e2|[V:4]z2 (G2 F2)|[V:2]B,,6|
[r:2/0][V:1]!p!"^dolce"d>c B4|]
"""

TUNES = {
    "key, chord, rest, tie, tuplet, accidental, broken rhythm, two voices on a staff": (
        PIANO,
        [
            (0, 1, 70), (0, 6, 46),  # B flat; its bass is tied over the barline
            (1, 1, 70), (1, 1, 74), (1, 1, 77),  # B flat major, then a rest
            (3, 1 / 3, 75), (3 + 1 / 3, 1 / 3, 77), (3 + 2 / 3, 1 / 3, 79),  # E flat F G in the time of two
            (4, 1, 67), (4, 1, 76), (5, 1, 65), (5, 1, 76),  # E natural holds to the end of the bar
            (6, 0.75, 74), (6.75, 0.25, 72), (7, 2, 70),
        ],
    ),
    "two voices, the lower one silent at first": (
        HEADER + "[V:1]CDEF GABc|\n[V:1]c8|[V:2]C,8|]\n",
        [(i / 2, 0.5, p) for i, p in enumerate((60, 62, 64, 65, 67, 69, 71, 72))] + [(4, 4, 48), (4, 4, 72)],
    ),
    "a repeat is played twice": (
        HEADER + "[V:1]|:C4 D4:|[V:2]|:C,8:|\n[V:1]E8|][V:2]D,8|]\n",
        [(0, 4, 48), (0, 2, 60), (2, 2, 62), (4, 4, 48), (4, 2, 60), (6, 2, 62), (8, 4, 50), (8, 4, 64)],
    ),
    "four sharps, a quintuplet and a key that changes": (
        "L:1/4\nM:4/4\nK:E\nV:1 treble\n[V:1](5:4:5F/G/A/B/c/ F2|\n[V:1][K:C]F G z2|]\n",
        [(i * 0.4, 0.4, p) for i, p in enumerate((66, 68, 69, 71, 73))] + [(2, 2, 66), (4, 1, 65), (5, 1, 67)],
    ),
    "a fermata holds no voice back": (
        HEADER + "[V:1]!fermata!C8|[V:2]C,8|\n[V:1]D8|[V:2]D,8|]\n",
        [(0, 4, 48), (0, 4, 60), (4, 4, 50), (4, 4, 62)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TUNES)
def test_notes_are_those_a_musician_reads(name: str):
    text, expected = TUNES[name]
    found = heard(text)
    wanted = sorted(expected, key=lambda note: (note[0], note[2]))
    assert [pitch for _, _, pitch in found] == [pitch for _, _, pitch in wanted]
    np.testing.assert_allclose([n[:2] for n in found], [n[:2] for n in wanted], rtol=0, atol=1.01 / 480)


def test_tempo_metre_and_dynamics_are_read_and_beats_have_no_accent():
    notes, _ = read_abc([PIANO])
    assert notes.tempo_bpm[0] == pytest.approx(90, abs=0.01)
    assert notes.meter[0].tolist() == [3, 4]
    assert set(notes.velocity[:12].tolist()) == {95}  # what the reader plays where nothing is written
    assert notes.velocity[-3:].tolist() == [50] * 3  # piano
    assert notes.end_s[0] == pytest.approx(9 * 60 / 90, abs=0.01)


def test_pieces_are_read_side_by_side_and_cut():
    notes, reasons = read_abc([PIANO, "not a tune", HEADER + "[V:1]C8|[V:2]E,8|]\n"], max_seconds=1.0)
    assert notes.counts.tolist() == [5, 0, 2]
    assert [bool(reason) for reason in reasons] == [False, True, False]
    assert (notes.onset_s + notes.duration_s).max() <= 1.0


def test_what_a_model_writes_at_random_ends_nothing():
    random = np.random.default_rng(0)
    texts = []
    for i in range(12):
        noise = "".join(map(chr, random.integers(3, 128, 300)))
        texts.append(HEADER + "[V:1]" + noise if i % 2 else noise)
    notes, reasons = read_abc([*texts, PIANO])
    assert len(notes) == len(reasons) == 13
    assert notes.counts[-1] == 15


def test_a_tune_that_ends_the_reader_is_one_without_notes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastsmart.notagen.notation.LONGEST_S", 0.0)  # each takes too long
    notes, reasons = read_abc([PIANO, PIANO])
    assert notes.counts.tolist() == [0, 0]
    assert all(reasons)


def test_rests_are_put_back():
    restored = restore_rests(PIANO).splitlines()
    assert restored[-3:] == [
        "[V:1]B2 [Bdf]2 z2|[V:2]B,,6-|[V:4]x6|",
        "[V:1](3efg =e2 e2|[V:2]B,,6|[V:4]z2 (G2 F2)|",
        '[V:1]!p!"^dolce"d>c B4|][V:2]z6|][V:4]x6|]',
    ]


def test_a_bar_of_unknown_length_rests_as_long_as_the_one_before():
    text = "L:1/4\nK:C\nV:1\nV:2\n[V:1]C3/2D/2|\n[V:1]Z|\n"
    assert restore_rests(text).splitlines()[-2:] == ["[V:1]C3/2D/2|[V:2]z2|", "[V:1]Z|[V:2]z2|"]


@pytest.mark.parametrize(
    ("bar", "length"),
    [
        ("CDEF", 4),
        ("C2 D/ E// F3/2 G/4", "9/2"),
        ("[CEG]2 [C2E2]3 z x4", 13),
        ("(3CDE (3:2:2C2D F", 5),
        ("(5CDEFG", 2),
        ("\"Am\"!p!{/ag}_C,,2-^^c''(=D E)", 5),
        ("[K:Bb]C4 y", 4),
        ("Z2", None),
        ("", 0),
    ],
)
def test_length_of_a_bar(bar: str, length: object):
    assert bar_duration(bar) == (None if length is None else Fraction(str(length)))


def test_the_sheet_is_plain_abc():
    lines = sheet(PIANO).splitlines()
    assert lines[0] == "X:1"
    assert lines[1] == "%%score { ( 1 4 ) | 2 }"
    assert not any("[r:" in line or line.startswith("%R") for line in lines)
    with pytest.raises(UserError, match="no line of bars"):
        sheet("X:1\nK:C\n")
