"""The paper's synth, TinySoundFont, behind the renderers' interface: for sound as the authors' scripts made it.

It plays soundfonts without their modulators, so a font that opens a filter with velocity sounds much darker than in
FluidSynth (MuseScore General), and it lets notes of one key overlap, the first note-off ending the first of them.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from fastsmart.audio.events import PEDAL_DOWN, Piece, empty_value, finish, merge_events, timing
from fastsmart.audio.resample import resample
from fastsmart.audio.settings import RenderSettings
from fastsmart.audio.soundfont import find_soundfont
from fastsmart.errors import UserError

FLUSH_S = 4.0  # the paper's scripts play on so long after a clip; then the synth sounds like a new one, to the last bit
VOICES = 256
SUSTAIN = 64


def tinysoundfont_module() -> ModuleType:
    """The optional package; raises UserError with the command that installs it."""
    try:
        import tinysoundfont
    except ImportError as error:
        raise UserError(
            "audio.backend = 'tinysoundfont' needs the package of that name: run `pip install --no-deps tinysoundfont`"
        ) from error
    return tinysoundfont


class TinySoundFontRenderer:
    """Renders one piece at a time with TinySoundFont, events on its own blocks of 64 samples.

    Raises UserError when the package is missing, or the soundfont cannot be read or lacks the program.
    """

    def __init__(self, settings: RenderSettings) -> None:
        module = tinysoundfont_module()
        self.settings = settings
        soundfont = find_soundfont(settings.soundfont)
        self._synth = module.Synth(samplerate=settings.synth_rate)
        try:
            font = self._synth.sfload(str(soundfont), max_voices=VOICES)
            self._synth.program_select(0, font, 0, settings.program)
        except RuntimeError as error:
            raise UserError(
                f"tinysoundfont cannot use program {settings.program} of the soundfont {soundfont}: {error}"
            ) from error

    def render_into(self, out: np.ndarray, piece: Piece) -> int:
        """Fill `out`, float32 [max_samples], with a piece, mono, zeros after its end; returns its length."""
        settings = self.settings
        score, length, heard, start, stop = timing(piece, settings)
        if score == 0:
            out[:] = empty_value(settings)
            return settings.empty_samples
        pedal = np.rint(piece.pedal_s * settings.synth_rate).astype(np.int64), piece.pedal_down
        events = merge_events(start, stop, piece.pitch[heard], piece.velocity[heard], pedal)
        last = -(-length * settings.synth_rate // settings.sample_rate)
        parts, now = [], 0
        for at, level, key in zip(*events, strict=True):
            if at >= last:
                break
            if at > now:
                parts.append(self._mono(at - now))
                now = at
            if level < 0:
                self._synth.control_change(0, SUSTAIN, 127 if level == PEDAL_DOWN else 0)
            elif level == 0:
                self._synth.noteoff(0, key)
            else:
                self._synth.noteon(0, key, level)
        parts.append(self._mono(last - now))
        self._synth.control_change(0, SUSTAIN, 0)
        self._synth.notes_off()
        self._synth.sounds_off()
        self._synth.generate(round(FLUSH_S * settings.synth_rate))
        out[:length] = resample(np.concatenate(parts), settings.synth_rate, settings.sample_rate)[:length]
        length = finish(out[:length], score, settings)
        out[length:] = 0.0
        return length

    def close(self) -> None:
        """Nothing is held beyond the object itself."""

    def _mono(self, samples: int) -> np.ndarray:
        stereo = np.frombuffer(self._synth.generate(samples), np.float32).reshape(-1, 2)
        return stereo.mean(axis=1, dtype=np.float32)
