"""TinySoundFont behind the renderers' interface: the package's own sound, the same after any history."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tinysoundfont
from tiny_soundfont import write_soundfont

from fastsmart.audio import RenderSettings, render
from fastsmart.audio.events import piece_arrays
from fastsmart.audio.tinysoundfont import TinySoundFontRenderer
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch

Pieces = Callable[..., NoteBatch]


@pytest.fixture
def settings(tmp_path: Path) -> RenderSettings:
    font = write_soundfont(tmp_path / "tiny.sf2")
    return RenderSettings(str(font), "tinysoundfont", sample_rate=48000, max_seconds=2.0, normalize="none")


def test_one_note_is_the_packages_own(settings: RenderSettings, pieces_of: Pieces) -> None:
    synth = tinysoundfont.Synth(samplerate=48000)
    synth.program_select(0, synth.sfload(settings.soundfont), 0, 0)
    synth.noteon(0, 60, 90)
    parts = [bytes(synth.generate(48000))]
    synth.noteoff(0, 60)
    parts.append(bytes(synth.generate(24000)))
    theirs = np.frombuffer(b"".join(parts), np.float32).reshape(-1, 2).mean(axis=1)
    notes = pieces_of([(0.0, 1.0, 60, 90), (1.5, 0.1, 60, 1)])  # the second keeps the score open for the tail
    np.testing.assert_allclose(clip(settings, notes)[:72000], theirs, atol=1e-7)


def clip(settings: RenderSettings, notes: NoteBatch, i: int = 0) -> np.ndarray:
    out = np.empty(settings.max_samples, np.float32)
    return out[: TinySoundFontRenderer(settings).render_into(out, piece_arrays(notes, i))]


def test_the_same_bits_after_any_history(settings: RenderSettings, random_pieces: Pieces) -> None:
    notes = random_pieces(3, seed=1, seconds=2.0)
    first = clip(settings, notes, 2)
    renderer, out = TinySoundFontRenderer(settings), np.empty(settings.max_samples, np.float32)
    for i in (0, 1, 2):
        length = renderer.render_into(out, piece_arrays(notes, i))
    np.testing.assert_array_equal(out[:length], first)


def test_the_pool_takes_it_as_a_backend(settings: RenderSettings, pieces_of: Pieces) -> None:
    notes = pieces_of([(0.0, 1.0, 60, 90)], [])
    batch = render(notes, settings.soundfont, "tinysoundfont", max_seconds=2.0)
    assert np.abs(batch.clip(0)).max() == pytest.approx(1.0, abs=1e-4)
    assert not batch.clip(1).any()
    with pytest.raises(UserError, match=r"audio\.reverb needs"):
        render(notes, settings.soundfont, "tinysoundfont", reverb=True)


def test_what_it_cannot_use_is_said_in_one_sentence(
    settings: RenderSettings, tmp_path: Path, pieces_of: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.sf2"
    raw = Path(settings.soundfont).read_bytes()
    damaged.write_bytes(raw[:12] + bytes(len(raw) - 12))
    with pytest.raises(UserError, match=r"damaged\.sf2"):
        TinySoundFontRenderer(RenderSettings(str(damaged), "tinysoundfont"))
    with pytest.raises(UserError, match="program 5"):
        TinySoundFontRenderer(replace(settings, program=5))
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(UserError, match="pip install --no-deps tinysoundfont"):
        render(pieces_of([(0.0, 1.0, 60, 90)]), settings.soundfont, "tinysoundfont")
