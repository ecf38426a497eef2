"""Windows of real pieces are clips like the policy's."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch, ticks_to_seconds


def test_windows_hold_every_note_once_in_order(make_pieces: Callable[..., NoteBatch]) -> None:
    pieces = make_pieces(3, seed=0)
    clips = cut_windows(pieces, 10.0)
    # 28 bars of four beats at 100 a minute, the last tail of a few beats left out
    assert len(clips) == 3 * 6
    assert clips.end_s.max() <= 10.0 + 1e-9
    assert np.all(clips.duration_s > 0)
    kept = np.concatenate([clips.pitch[clips.rows(i)] for i in range(6)])
    np.testing.assert_array_equal(kept, pieces.pitch[pieces.rows(0)][: len(kept)])


def test_ticks_and_seconds_of_a_window_agree_through_its_own_tempo_map(make_pieces: Callable[..., NoteBatch]) -> None:
    piece = make_pieces(1, seed=1)
    tempo_tick, tempo_bpm = np.array([0, 300, 700], np.int32), np.array([90.0, 140.0, 60.0])
    seconds = ticks_to_seconds(piece.onset_tick, 12, tempo_tick, tempo_bpm)
    ends = ticks_to_seconds(piece.onset_tick + piece.duration_tick, 12, tempo_tick, tempo_bpm)
    piece = replace(
        piece,
        onset_s=seconds,
        duration_s=ends - seconds,
        end_s=np.array([ends.max()]),
        tempo_tick=tempo_tick,
        tempo_bpm=tempo_bpm,
        tempo_offsets=np.array([0, 3]),
    )
    clips = cut_windows(piece, 7.0)
    assert len(clips) > 5
    for i in range(len(clips)):
        clip = clips.select([i])
        onset_s = ticks_to_seconds(clip.onset_tick, 12, clip.tempo_tick, clip.tempo_bpm)
        np.testing.assert_allclose(onset_s, clip.onset_s, atol=1e-9)
        end_tick = clip.onset_tick + clip.duration_tick
        end_s = ticks_to_seconds(end_tick, 12, clip.tempo_tick, clip.tempo_bpm)
        uncut = clip.onset_s + clip.duration_s < 7.0 - 1e-9
        np.testing.assert_allclose(end_s[uncut], (clip.onset_s + clip.duration_s)[uncut], atol=1e-9)
        assert end_s.max() <= 7.0 + 60 / 60 / 12  # at most a tick over, for a note that starts on the last one


def test_a_piece_shorter_than_the_window_is_one_clip(make_notes: Callable[..., NoteBatch]) -> None:
    pieces = make_notes([(25, 12, 60, 80), (40, 12, 64, 80)], [], [(0, 12, 60, 80)])
    clips = cut_windows(pieces, 10.0)
    np.testing.assert_array_equal(clips.counts, [2, 1])
    np.testing.assert_array_equal(clips.onset_tick, [1, 16, 0])  # from the beat of the first note on


@pytest.mark.parametrize("bars", [0, 1])
def test_no_notes_give_no_windows(make_notes: Callable[..., NoteBatch], bars: int) -> None:
    assert len(cut_windows(make_notes(*[[] for _ in range(bars + 1)]))) == 0
