"""The tonic that pitch classes are counted from, against music21's key finder."""

from __future__ import annotations

import numpy as np
import pytest

from fastsmart.music.histograms import aligned_to_tonic


def test_the_tonic_is_that_of_music21s_krumhansl_schmuckler_key():
    discrete = pytest.importorskip("music21.analysis.discrete")
    from music21 import note, stream

    finder = discrete.KrumhanslSchmuckler()
    random = np.random.default_rng(0)
    rows = np.stack([random.multinomial(32, random.dirichlet(np.full(12, 0.5))) for _ in range(25)])
    tonics = set()
    for row, aligned in zip(rows, aligned_to_tonic(rows), strict=True):
        sounding = [note.Note(pitch, quarterLength=int(count)) for pitch, count in enumerate(row) if count]
        tonic = finder.getSolution(stream.Stream(sounding)).tonic.pitchClass
        assert aligned.tolist() == np.roll(row, -tonic).tolist()
        tonics.add(tonic)
    assert len(tonics) > 6
