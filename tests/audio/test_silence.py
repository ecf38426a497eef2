"""Nothing sounds that a piece does not ask for: before its first note, of its later notes, or late in a chord."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_soundfont import write_soundfont

from fastsmart.audio import FluidSynthRenderer, RenderSettings, find_soundfont
from fastsmart.audio.bank_renderer import BankRenderer
from fastsmart.audio.bank_tools import snr_db
from fastsmart.audio.events import BLOCK
from fastsmart.audio.settings import SYNTH_HZ
from fastsmart.notes import NoteBatch

Pieces = Callable[..., NoteBatch]
REST_S = 2.0
PIANO = range(21, 109)
FONTS = ("mono", "stereo")
# around what a synth has voices for, in mono and in stereo, and the eight blocks of 32 of the shortest note
COUNTS = (1, 33, 64, 113, 225, 257, 513, 1025, 5000)


@pytest.fixture(scope="module", params=FONTS)
def font(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed piano, whose notes are one voice each, and a small font of two."""
    if request.param == "mono":
        return find_soundfont()
    return write_soundfont(tmp_path_factory.mktemp("font") / "stereo.sf2", stereo=True)


@pytest.fixture(scope="module")
def renderer(font: Path) -> Iterator[FluidSynthRenderer]:
    # at the synth's own rate, where no resampling filter rings before a note
    plain = RenderSettings(str(font), "fluidsynth", sample_rate=SYNTH_HZ, max_seconds=2.3, normalize="none")
    with FluidSynthRenderer(plain) as made:
        yield made


def crowd(pieces_of: Pieces, count: int, seed: int = 0) -> NoteBatch:
    """A rest, then notes in a twentieth of a second."""
    rng = np.random.default_rng([seed, count])
    onsets = REST_S + np.sort(rng.uniform(0.0, 0.05, count))
    keys, velocities = rng.integers(PIANO.start, PIANO.stop, count), rng.integers(1, 128, count)
    return pieces_of([(float(s), 0.01, int(k), int(v)) for s, k, v in zip(onsets, keys, velocities, strict=True)])


def before_and_after(renderer: FluidSynthRenderer, notes: NoteBatch) -> tuple[float, float]:
    """The loudest sample before the first note, and from it on."""
    stereo = np.abs(renderer.render_stereo(notes, 0))
    first = int(notes.onset_s.min() * SYNTH_HZ)
    return float(stereo[:first].max()), float(stereo[first:].max())


@pytest.mark.parametrize("count", COUNTS)
def test_nothing_sounds_before_the_first_note(count: int, renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    before, after = before_and_after(renderer, crowd(pieces_of, count))
    assert before == 0.0
    assert after > 0.0


@pytest.mark.slow
def test_nothing_sounds_before_the_first_note_of_any_number(renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    counts = [*range(1, 1200), *np.random.default_rng(0).integers(1200, 5001, 100).tolist()]
    loud = {n: before for n in counts if (before := before_and_after(renderer, crowd(pieces_of, n, 1))[0]) > 0.0}
    assert not loud


@pytest.mark.parametrize("count", [1, 40, 300])
def test_the_first_notes_do_not_fade_in(count: int, renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    """A chord, and the same chord after all slots of the synth have played it: alike from its first block."""
    first_s, again_s = 12 * BLOCK / SYNTH_HZ, 1.0 + 12 * BLOCK / SYNTH_HZ
    keys = [PIANO[n % len(PIANO)] for n in range(count)]
    chord = [(at, 0.05, key, 100) for at in (first_s, again_s) for key in keys]
    stereo = renderer.render_stereo(pieces_of([*chord, (again_s + 0.2, 0.01, 60, 1)]), 0)
    rings = stereo[round(again_s * SYNTH_HZ) - 1].any()
    first, again = (stereo[(at := round(s * SYNTH_HZ)) : at + 2 * BLOCK] for s in (first_s, again_s))
    assert first.any()
    assert snr_db(again, first) > (50.0 if rings else 90.0)  # high strings ring on, undamped


@pytest.mark.parametrize("count", [300, 1100])
def test_the_start_does_not_depend_on_what_follows(count: int, renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    """A piece, and its first notes alone, up to the first that is left out."""
    rng = np.random.default_rng(count)
    onsets, keys = np.sort(rng.uniform(0.1, 0.5, count)), rng.integers(PIANO.start, PIANO.stop, count)
    columns = onsets, keys, rng.integers(20, 128, count)
    piece = [(float(onset), 0.1, int(key), int(velocity)) for onset, key, velocity in zip(*columns, strict=True)]
    whole = renderer.render_stereo(pieces_of(piece), 0)
    for kept in (1, 225, count - 1):
        start = renderer.render_stereo(pieces_of(piece[:kept]), 0)
        until = int(onsets[kept] * SYNTH_HZ)
        assert snr_db(whole[:until], start[:until]) > 90.0


@pytest.mark.parametrize("count", [6, 33, 48, 64, 88])
def test_all_notes_of_a_chord_are_on_time(count: int, renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    """The sum of the notes alone, each struck at the same sample; a note one block late gives less than 20 dB."""
    keys = np.random.default_rng(1).permutation(PIANO)[:count]
    chord = [(0.1, 0.2, int(key), 40 + int(key) % 80) for key in keys]
    alone = sum(renderer.render(pieces_of([note]), 0).astype(np.float64) for note in chord)
    assert snr_db(renderer.render(pieces_of(chord), 0), np.asarray(alone)) > 90.0


def test_a_chord_of_all_keys_after_a_long_crowd_is_on_time(renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    """The last of many notes of one key may release all before it, which takes room that a chord needs too."""
    crowded = [(0.002 * n, 0.001, PIANO[n % 12], 60) for n in range(500)]
    chord, end = [(1.5, 0.2, key, 80) for key in PIANO], (1.69, 0.01, 60, 1)
    both, ringing, alone = (
        renderer.render(pieces_of(piece), 0)[round(1.5 * SYNTH_HZ) :]
        for piece in ([*crowded, *chord, end], [*crowded, end], [*chord, end])
    )
    assert snr_db(alone, both.astype(np.float64) - ringing) > 60.0


@pytest.mark.slow  # it stores 88 notes
def test_the_bank_and_the_reference_agree_on_chords(
    font: Path, pieces_of: Pieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSMART_CACHE", str(tmp_path))
    plain = RenderSettings(str(font), max_seconds=1.0, normalize="none")
    chords = pieces_of(*[[(0.2, 0.5, key, 90) for key in PIANO[:count]] for count in (48, 64, 88)])
    with BankRenderer(plain) as bank, FluidSynthRenderer(replace(plain, backend="fluidsynth")) as reference:
        for i in range(len(chords)):
            assert snr_db(reference.render(chords, i), bank.render(chords, i)) > 45.0


@pytest.mark.parametrize("count", [1, 300])
def test_effects_do_not_sound_before_the_first_note(
    count: int, renderer: FluidSynthRenderer, pieces_of: Pieces
) -> None:
    """FluidSynth's reverb adds a constant of 1e-8, which no 16-bit file holds."""
    with FluidSynthRenderer(replace(renderer.settings, reverb=True, chorus=True)) as wet:
        before, after = before_and_after(wet, crowd(pieces_of, count))
    assert before < 1e-7
    assert after > 1e-4
