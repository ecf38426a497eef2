"""A phrase in the policy's own metres."""

from __future__ import annotations

from pathlib import Path

import mido
import numpy as np
import pytest

from fastsmart.errors import UserError
from fastsmart.tokens.phrase import phrase
from fastsmart.tokens.vocabulary import Vocabulary


def written(path: Path, signatures: list[tuple[int, int, int]], notes: list[int]) -> Path:
    """A file of quarter notes at these beats, with (beat, numerator, denominator) signatures."""
    events = [
        (480 * beat, 0, mido.MetaMessage("time_signature", numerator=n, denominator=d)) for beat, n, d in signatures
    ]
    for beat in notes:
        events.append((480 * beat, 2, mido.Message("note_on", note=60 + beat % 12, velocity=80)))
        events.append((480 * beat + 460, 1, mido.Message("note_off", note=60 + beat % 12)))
    track, now = mido.MidiTrack(), 0
    for tick, _, message in sorted(events, key=lambda event: event[:2]):
        track.append(message.copy(time=tick - now))
        now = tick
    file = mido.MidiFile(ticks_per_beat=480)
    file.tracks.append(track)
    file.save(path)
    return path


def tokens(path: Path, vocab: Vocabulary, bars: int = 0) -> list[str]:
    return [vocab.tokens[i] for i in phrase(path, vocab, 1, 500, bars).row(0)]


@pytest.mark.parametrize(("metre", "bars"), [((7, 4), 0), ((4, 2), 1), ((2, 8), 2)])
def test_a_metre_that_the_policy_does_not_know_is_refused(
    metre: tuple[int, int], bars: int, vocab: Vocabulary, tmp_path: Path
) -> None:
    path = written(tmp_path / "odd.mid", [(0, *metre)], [*range(8)])
    with pytest.raises(
        UserError, match=rf"odd.mid: .* bars of {metre[0]}/{metre[1]} in .*, which the policy does not know.*4/4"
    ):
        phrase(path, vocab, 1, 500, bars)


def test_bars_before_such_a_metre_can_be_had(vocab: Vocabulary, tmp_path: Path) -> None:
    path = written(tmp_path / "later.mid", [(0, 4, 4), (8, 7, 4)], [*range(16)])
    assert sum(token.startswith("Pitch") for token in tokens(path, vocab, 2)) == 8
    with pytest.raises(UserError, match="7/4"):
        tokens(path, vocab, 3)


def test_an_upbeat_ends_a_whole_bar(vocab: Vocabulary, tmp_path: Path) -> None:
    path = written(tmp_path / "upbeat.mid", [(0, 1, 4), (1, 4, 4)], [*range(5)])
    found = tokens(path, vocab)
    bars = np.flatnonzero([token == "Bar_None" for token in found])
    assert sum(token.startswith("Pitch") for token in found[bars[0] : bars[1]]) == 1
    assert sum(token.startswith("Pitch") for token in found[bars[1] :]) == 4
    assert not [token for token in found if token.startswith("TimeSig") and token != "TimeSig_4/4"]
    assert sum(token.startswith("Pitch") for token in tokens(path, vocab, 1)) == 1


def test_a_signature_of_one_beat_throughout_is_taken_for_four(vocab: Vocabulary, tmp_path: Path) -> None:
    path = written(tmp_path / "one.mid", [(0, 1, 4)], [*range(8)])
    assert "TimeSig_4/4" in tokens(path, vocab)
