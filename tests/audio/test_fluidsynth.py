"""What the reference renderer promises: the right notes at the right time, and the same bits after any history."""

import ctypes
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fluidsynth
import numpy as np
import pytest
import soundfile

from fastsmart.audio import FluidSynthRenderer, RenderSettings, find_soundfont, listening_settings, render_file
from fastsmart.audio.fluidsynth import GAIN, load_library
from fastsmart.audio.settings import SYNTH_HZ
from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch

RATE_HZ = 16000
PLAIN = RenderSettings(backend="fluidsynth", max_seconds=4.0, normalize="none")
Pieces = Callable[..., NoteBatch]


@pytest.fixture(scope="module")
def renderer() -> Iterator[FluidSynthRenderer]:
    with FluidSynthRenderer(PLAIN) as made:
        yield made


def snr_db(reference: np.ndarray, other: np.ndarray) -> float:
    noise = ((reference.astype(np.float64) - other) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(noise, 1e-300)))


def energy(clip: np.ndarray, start_s: float, end_s: float) -> float:
    return float((clip[round(start_s * RATE_HZ) : round(end_s * RATE_HZ)].astype(np.float64) ** 2).mean())


def play_with_pyfluidsynth(notes: NoteBatch, gain: float) -> np.ndarray:
    """The piece through pyfluidsynth's own 16-bit output, event by event at exact samples, as float64 [T, 2].

    Played twice and heard the second time, when no voice slot is new any more.
    """
    synth = fluidsynth.Synth(gain=gain, samplerate=SYNTH_HZ)
    for option, value in (("reverb.active", 0), ("chorus.active", 0), ("dynamic-sample-loading", 1)):
        synth.setting(f"synth.{option}", value)
    synth.program_select(0, synth.sfload(str(find_soundfont())), 0, 0)
    events = []
    for onset, duration, pitch, velocity in zip(
        notes.onset_s, notes.duration_s, notes.pitch, notes.velocity, strict=True
    ):
        events.append((round((onset + duration) * SYNTH_HZ), 0, int(pitch), 0))
        events.append((round(onset * SYNTH_HZ), 1, int(pitch), int(velocity)))
    events.sort(key=lambda event: event[:2])
    for _ in range(2):
        heard, now = [], 0
        for at, starts, pitch, velocity in events:
            if at > now:
                heard.append(synth.get_samples(at - now))
                now = at
            if starts:
                synth.noteon(0, pitch, velocity)
            else:
                synth.noteoff(0, pitch)
        synth.all_sounds_off(0)
        synth.get_samples(64 * 200 - now % 64)  # the next pass starts on a block
    synth.delete()
    return np.concatenate(heard).reshape(-1, 2) / 32768.0


def test_it_plays_what_pyfluidsynth_plays(random_pieces: Pieces) -> None:
    """Only the 16 bits of the other path lie between them; a higher gain there keeps their noise low."""
    louder = 4.0
    for seed in range(3):
        notes = random_pieces(1, seed)
        theirs = play_with_pyfluidsynth(notes, GAIN * louder) / louder
        with FluidSynthRenderer(replace(PLAIN, sample_rate=SYNTH_HZ)) as renderer:
            ours, mono = renderer.render_stereo(notes, 0), renderer.render(notes, 0)
        assert np.abs(theirs).max() * louder < 0.99  # not clipped
        assert len(theirs) == len(ours)
        assert snr_db(theirs, ours) > 45.0
        assert snr_db(theirs.mean(axis=1), mono) > 45.0


def test_a_chord_is_the_sum_of_its_notes(renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    """Every note sounds the same whatever slot it gets, the first ones of a new synth too: a note bank needs this."""
    chord = [(0.0, 1.0, key, 40 + key) for key in (36, 48, 55, 64, 72, 79)]
    alone = [renderer.render(pieces_of([note]), 0) for note in chord]
    assert snr_db(renderer.render(pieces_of(chord), 0), np.sum(alone, axis=0)) > 120.0


def test_the_same_bits_after_any_history(random_pieces: Pieces, pieces_of: Pieces) -> None:
    notes = random_pieces(4, seed=7)
    rng = np.random.default_rng(1)
    crowd = pieces_of([(0.0, 4.0, int(key), 127) for key in rng.integers(0, 128, 2000)])
    with FluidSynthRenderer(PLAIN) as fresh:
        first = fresh.render(notes, 2)
    for settings in (PLAIN, replace(PLAIN, reverb=True, chorus=True)):
        with FluidSynthRenderer(settings) as renderer:
            alone = renderer.render(notes, 2)
            for history in ([(notes, 0)], [(notes, 3), (notes, 1)], [(crowd, 0)], [(crowd, 0), (notes, 0)]):
                for batch, i in history:
                    renderer.render(batch, i)
                np.testing.assert_array_equal(renderer.render(notes, 2), alone)
        if settings is PLAIN:
            np.testing.assert_array_equal(alone, first)


def test_the_same_bits_in_another_process(random_pieces: Pieces) -> None:
    """Each process renders the same seeded piece at the end of a different history."""
    script = """
import sys, hashlib, numpy as np
from fastsmart.audio.events import Piece
from fastsmart.audio.fluidsynth import FluidSynthRenderer
from fastsmart.audio.settings import RenderSettings
def arrays(seed):
    rng = np.random.default_rng(seed)
    onset = np.sort(rng.uniform(0, 3, 40))
    return onset, rng.uniform(0.05, 1, 40), rng.integers(30, 90, 40), rng.integers(1, 128, 40), 4.0
settings = RenderSettings(max_seconds=4.0)
out = np.empty(settings.max_samples, np.float32)
with FluidSynthRenderer(settings) as renderer:
    for seed in map(int, sys.argv[1:]):
        renderer.render_into(out, Piece(*arrays(seed)))
print(hashlib.sha256(out).hexdigest(), float(np.abs(out).max()), 'torch' in sys.modules, 'numba' in sys.modules)
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", script, *history, "5"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for history in ((), ("1",), ("2", "3", "4"))
    }
    assert len(said) == 1
    digest, peak, torch_loaded, numba_loaded = said.pop().split()
    assert digest != hashlib.sha256(np.zeros(64000, np.float32)).hexdigest()
    assert float(peak) == pytest.approx(1.0, abs=1e-4)
    assert (torch_loaded, numba_loaded) == ("False", "False")


def test_notes_start_and_end_where_they_should(renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    clip = renderer.render(pieces_of([(0.5, 0.4, 60, 100), (2.0, 1.0, 72, 100)]), 0)
    assert len(clip) == 3.0 * RATE_HZ
    assert not clip[:7990].any()  # the resampling filter rings a little before a note
    loud = energy(clip, 0.5, 0.9)
    assert energy(clip, 0.5, 0.55) > 0.1 * loud
    assert energy(clip, 1.7, 2.0) < 1e-4 * loud  # released 0.8 s before
    assert energy(clip, 2.0, 2.05) > 0.1 * loud


def test_pitches_are_in_tune(renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    for key in (45, 57, 69, 81):
        clip = renderer.render(pieces_of([(0.0, 2.0, key, 100)]), 0)[1600:30272]
        spectrum = np.abs(np.fft.rfft(clip * np.hanning(len(clip)), 8 * len(clip)))
        hz = 440.0 * 2 ** ((key - 69) / 12)
        near = np.arange(len(spectrum)) * RATE_HZ / (8 * len(clip))
        band = (near > hz * 0.97) & (near < hz * 1.03)
        assert near[band][spectrum[band].argmax()] == pytest.approx(hz, rel=0.003)  # 5 cents


def test_notes_of_no_length_end_too(renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    clip = renderer.render(pieces_of([(0.0, 0.0, 60, 100), (3.5, 0.1, 72, 1)]), 0)
    assert energy(clip, 0.0, 0.1) > 0.0
    assert energy(clip, 2.0, 3.0) < 1e-6 * energy(clip, 0.0, 0.1)


def test_a_repeated_key_sounds_twice_and_stops(renderer: FluidSynthRenderer, pieces_of: Pieces) -> None:
    """FluidSynth's rule: striking a sounding key releases it, and the next note-off ends the new one."""
    long_then_short = renderer.render(pieces_of([(0.0, 3.0, 60, 100), (1.0, 0.5, 60, 100)]), 0)
    assert energy(long_then_short, 1.0, 1.1) > 2 * energy(long_then_short, 0.9, 1.0)
    assert energy(long_then_short, 2.5, 3.0) < 1e-4 * energy(long_then_short, 1.0, 1.1)
    touching = renderer.render(pieces_of([(0.0, 1.0, 60, 100), (1.0, 1.0, 60, 100)]), 0)
    assert energy(touching, 1.8, 2.0) > 0.05 * energy(touching, 1.0, 1.1)  # the first note's end did not end it


def test_the_score_is_cut_at_max_seconds(pieces_of: Pieces) -> None:
    notes = pieces_of([(0.0, 60.0, 60, 100), (30.0, 1.0, 64, 100)], [(5.0, 1.0, 60, 100)])
    with FluidSynthRenderer(replace(PLAIN, max_seconds=2.0)) as renderer:
        clip = renderer.render(notes, 0)
        late = renderer.render(notes, 1)
    assert len(clip) == 2 * RATE_HZ
    assert energy(clip, 1.9, 2.0) > 0.0
    assert len(late) == RATE_HZ  # nothing starts in the window: an empty score
    assert not late.any()


def test_the_release_tail_fades_and_is_trimmed(pieces_of: Pieces) -> None:
    notes = pieces_of([(0.0, 1.0, 60, 100)])
    with FluidSynthRenderer(PLAIN) as cut, FluidSynthRenderer(replace(PLAIN, tail="release")) as release:
        short, long = cut.render(notes, 0), release.render(notes, 0)
    assert len(short) == RATE_HZ
    np.testing.assert_array_equal(long[: len(short)], short)
    assert 0.02 * RATE_HZ < len(long) - len(short) < 2.0 * RATE_HZ  # FluidR3's release, not all of release_s
    assert np.abs(long[-160:]).max() < 1e-3


@pytest.mark.parametrize("velocity", [8, 30, 127])
def test_a_file_for_listening_ends_where_it_is_silent_however_softly_it_was_played(
    velocity: int, pieces_of: Pieces
) -> None:
    """Its peak is 1 whatever the synth's level is, so what is trimmed has to be silent beside that."""
    notes = pieces_of([(0.0, 0.5, 60, velocity)])
    with FluidSynthRenderer(listening_settings(RenderSettings(), 1.0)) as renderer:
        stereo = renderer.render_stereo(notes, 0)
    assert np.abs(stereo).max() == pytest.approx(1.0, abs=1e-2)  # of the softest the normalisation's floor takes some
    assert len(stereo) < 2.0 * SYNTH_HZ
    assert 20 * np.log10(np.abs(stereo[-SYNTH_HZ // 100 :]).max()) < -85.0


def test_peak_normalisation_is_the_papers(renderer: FluidSynthRenderer, random_pieces: Pieces) -> None:
    notes = random_pieces(1, seed=3)
    plain = renderer.render(notes, 0)
    with FluidSynthRenderer(replace(PLAIN, normalize="peak")) as peak:
        np.testing.assert_array_equal(peak.render(notes, 0), plain / np.float32(np.abs(plain).max() + 1e-6))
        stereo = peak.render_stereo(notes, 0)
    assert stereo.shape == (len(plain), 2)
    assert np.abs(stereo).max() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("empty", ["silence", "nan"])
def test_an_empty_score_is_a_second_of_silence_or_unscorable(empty: str, pieces_of: Pieces) -> None:
    notes = pieces_of([], [(0.0, 1.0, 60, 100)])
    with FluidSynthRenderer(replace(PLAIN, empty=empty)) as renderer:
        clip = renderer.render(notes, 0)
        assert renderer.render(notes, 1).any()
    assert len(clip) == RATE_HZ
    assert np.isnan(clip).all() if empty == "nan" else not clip.any()


def test_a_crowd_of_notes_is_rendered_and_leaves_nothing_sounding(
    pieces_of: Pieces, request: pytest.FixtureRequest
) -> None:
    """2,000 notes struck at once, and 2,000 of one key: more than the synth has voices, or room for events."""
    rng = np.random.default_rng(0)
    crowds = pieces_of(
        [(0.0, 1.0, int(key), 100) for key in rng.integers(0, 128, 2000)] + [(3.9, 0.1, 60, 1)],
        [(0.0, 1.0, 60, 100)] * 2000 + [(3.9, 0.1, 60, 1)],
    )
    complaints: list[bytes] = []
    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, message, data: complaints.append(message)
    )
    warning_level = 2
    load_library().fluid_set_log_function(warning_level, ctypes.cast(log, ctypes.c_void_p), None)
    request.addfinalizer(lambda: load_library().fluid_set_log_function(warning_level, None, None))
    with FluidSynthRenderer(PLAIN) as renderer:
        for i in range(2):
            clip = renderer.render(crowds, i)
            assert np.isfinite(clip).all()
            assert energy(clip, 0.0, 1.0) > 0.0
            # high strings ring on, undamped; a voice whose note-off was lost would sound as if it were held
            assert energy(clip, 3.0, 3.9) < 1e-3 * energy(clip, 0.3, 1.0)
    assert any(b"No preset" in complaint for complaint in complaints)  # the log is heard
    assert not [complaint for complaint in complaints if b"Ringbuffer" in complaint]


def test_a_file_for_listening_is_48_khz_stereo_with_its_tail(pieces_of: Pieces, tmp_path: Path) -> None:
    notes = pieces_of([(0.0, 0.5, 60, 100), (0.5, 0.5, 64, 90)], [])
    render_file(notes, 0, tmp_path / "a.wav")
    with FluidSynthRenderer(listening_settings(RenderSettings(), 10.0)) as renderer:
        render_file(notes, 0, tmp_path / "a.flac", renderer=renderer)
    render_file(notes, 1, tmp_path / "empty.wav", RenderSettings(empty="nan"))
    wav, rate = soundfile.read(tmp_path / "a.wav")
    info = soundfile.info(tmp_path / "a.wav")
    assert (rate, info.channels, info.subtype) == (48000, 2, "PCM_16")
    assert 1.05 < info.duration < 3.0
    assert np.abs(wav).max() > 0.99
    np.testing.assert_allclose(soundfile.read(tmp_path / "a.flac")[0], wav, rtol=0.0, atol=2.0**-15)  # rounding
    assert not soundfile.read(tmp_path / "empty.wav")[0].any()


def test_a_file_for_listening_has_all_of_a_long_piece(pieces_of: Pieces, tmp_path: Path) -> None:
    """Longer than the window of a reward, and than the notes of a bank."""
    render_file(pieces_of([(0.0, 0.5, 60, 100), (70.0, 0.5, 64, 90)]), 0, tmp_path / "long.wav")
    assert soundfile.info(tmp_path / "long.wav").duration > 70.5


def test_a_file_that_cannot_be_written_is_named(pieces_of: Pieces, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*a\.wav"):
        render_file(pieces_of([(0.0, 0.5, 60, 100)]), 0, tmp_path / "nowhere" / "a.wav")


def test_a_closed_renderer_says_so(pieces_of: Pieces) -> None:
    with FluidSynthRenderer(PLAIN) as renderer:
        pass
    renderer.close()
    with pytest.raises(RuntimeError, match="closed"):
        renderer.render(pieces_of([(0.0, 0.5, 60, 100)]), 0)
