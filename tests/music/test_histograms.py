"""What notes are counted by, against NumPy's and SciPy's own counts and distances, and against transposition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_notes import made, melody
from scipy.spatial.distance import cdist

from fastsmart.music.histograms import BINS, aligned_to_tonic, histograms, note_bins, spread
from fastsmart.notes import NoteBatch


def batch(clips: int = 9) -> NoteBatch:
    """Clips of 0 to 30 notes over the whole piano, at every velocity."""
    random = np.random.default_rng(0)
    notes = made([melody(k, int(random.integers(0, 31))) for k in range(clips)])
    size = len(notes.pitch)
    return replace(
        notes,
        pitch=random.integers(21, 109, size).astype(np.uint8),
        velocity=random.integers(1, 128, size).astype(np.uint8),
    )


def test_register_and_dynamics_are_numpys_histograms():
    notes = batch()
    played = histograms(notes)
    for i in range(len(notes)):
        rows = notes.rows(i)
        if notes.counts[i] == 0:
            assert all(table[i, -1] == 1 for table in played.values())
            continue
        register = np.histogram(notes.pitch[rows], np.arange(21, 112, 6))[0]  # 88 keys, six at a time: 15 bins
        dynamics = np.histogram(notes.velocity[rows], np.arange(0, 129, 16))[0]
        assert len(register) == BINS["register"]
        assert len(dynamics) == BINS["dynamics"]
        np.testing.assert_allclose(played["register"][i, :-1], register / register.sum())
        np.testing.assert_allclose(played["dynamics"][i, :-1], dynamics / dynamics.sum())


def test_the_spread_of_held_out_clips_is_scipys_mean_distance():
    played = histograms(batch())
    found = spread(played)
    assert list(found) == [f"{name}_distance" for name in ("pitch_class", "onset", "move", "register", "dynamics")]
    for name, rows in played.items():
        distances = cdist(rows, rows, "cityblock") / 2
        assert found[f"{name}_distance"] == pytest.approx(distances[np.triu_indices(len(rows), 1)].mean())
    assert set(spread(histograms(batch(1))).values()) == {0.0}


def test_the_last_note_of_a_clip_moves_nowhere():
    notes = batch()
    last = notes.offsets[1:][notes.counts > 0] - 1
    assert np.flatnonzero(note_bins(notes)["move"] < 0).tolist() == last.tolist()


@pytest.mark.parametrize("shape", ["any", "whole tones", "diminished", "chromatic", "two keys", "one note"])
def test_a_row_and_its_transpositions_are_aligned_to_one_row(shape: str):
    random = np.random.default_rng(1)
    rows = {
        "any": random.multinomial(32, np.full(12, 1 / 12), 200),
        "whole tones": np.tile([2, 0], 6)[None],
        "diminished": np.tile([3, 0, 0], 4)[None],
        "chromatic": np.full((1, 12), 2),
        "two keys": np.array([[5, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0]]),  # C and F sharp fit equally well
        "one note": np.eye(12, dtype=int)[:1],
    }[shape]
    aligned = aligned_to_tonic(rows)
    for semitones in range(12):
        assert (aligned_to_tonic(np.roll(rows, semitones, axis=-1)) == aligned).all()
    assert (np.sort(aligned, axis=-1) == np.sort(rows, axis=-1)).all()  # turned, not changed
    assert aligned_to_tonic(np.zeros((3, 12))).tolist() == np.zeros((3, 12)).tolist()
