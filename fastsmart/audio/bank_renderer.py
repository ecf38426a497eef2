"""The renderers behind one interface, and the one that mixes stored notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastsmart.audio.events import NO_PEDAL, Piece, empty_value, finish, piece_arrays, timing
from fastsmart.audio.settings import RenderSettings

if TYPE_CHECKING:
    from fastsmart.notes import NoteBatch


class Renderer(Protocol):
    """Renders one piece at a time; the same notes give the same samples after any history."""

    def render_into(self, out: np.ndarray, piece: Piece) -> int:
        """Fill `out`, float32 [max_samples], with a piece, mono, zeros after its end; returns its length."""

    def close(self) -> None:
        """Give back what the renderer owns."""


def make_renderer(settings: RenderSettings) -> Renderer:
    """The renderer that `settings.backend` names; raises UserError when something it needs is missing."""
    if settings.backend == "bank":
        return BankRenderer(settings)
    if settings.backend == "tinysoundfont":
        from fastsmart.audio.tinysoundfont import TinySoundFontRenderer

        return TinySoundFontRenderer(settings)
    from fastsmart.audio.fluidsynth import FluidSynthRenderer

    return FluidSynthRenderer(settings)


class BankRenderer:
    """Mixes clips from a note bank; what the bank cannot give from store, FluidSynth renders note by note.

    Differs from FluidSynthRenderer by the bank's fidelity, and in crowds: it drops no voices however many sound, and
    strikes all notes of a block at once. Not for several threads at once.

    Raises UserError when the bank cannot be opened.
    """

    def __init__(self, settings: RenderSettings) -> None:
        from fastsmart.audio.bank import NoteBank  # not above: only this renderer needs the compiler's libraries

        self.settings = settings
        self.bank = NoteBank(settings)
        # compile now, so that the first clip takes no longer than the others
        silent = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.uint8)
        self._mix(np.zeros(1, np.float32), 1, silent, Piece(*NO_PEDAL, *NO_PEDAL, 0.0))

    def render(self, notes: NoteBatch, i: int) -> np.ndarray:
        """Piece i as mono float32 [T]."""
        out = np.empty(self.settings.max_samples, np.float32)
        return out[: self.render_into(out, piece_arrays(notes, i))]

    def render_into(self, out: np.ndarray, piece: Piece) -> int:
        """Fill `out`, float32 [max_samples], with a piece, mono, zeros after its end; returns its length."""
        settings = self.settings
        score, length, heard, start, stop = timing(piece, settings)
        if score == 0:
            out[:] = empty_value(settings)
            return settings.empty_samples
        pitch, velocity = piece.pitch[heard], piece.velocity[heard]
        on_demand = np.ones(len(start), bool) if settings.bank == "exact" else self.bank.ensure(pitch, velocity)
        if settings.tail == "cut" and settings.normalize != "loudness" and not on_demand.any():
            self._mix(out, length, (start, stop, pitch, velocity), piece)
            return length
        self._mix_some(out[:length], (start, stop, pitch, velocity), piece, on_demand)
        length = finish(out[:length], score, settings)
        out[length:] = 0.0
        return length

    def close(self) -> None:
        """Let go of the bank."""
        self.bank.close()

    def __enter__(self) -> BankRenderer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _mix(self, out: np.ndarray, length: int, notes: tuple[np.ndarray, ...], piece: Piece) -> None:
        from fastsmart.audio.mixdown import mix_clip

        peak = self.settings.normalize == "peak"
        mix_clip(out, length, *notes, self._pedal(piece), piece.pedal_down, self.bank.tables, peak)

    def _mix_some(self, clip: np.ndarray, notes: tuple[np.ndarray, ...], piece: Piece, on_demand: np.ndarray) -> None:
        """Mix a clip of which some notes, bool [M], come from FluidSynth."""
        from fastsmart.audio.mixdown import LEAD, mix, pair, slice_notes

        start, stop, pitch, velocity = notes
        tables = self.bank.tables
        on, off = pair(start, stop, pitch, self._pedal(piece), piece.pedal_down)
        clip[:] = 0.0
        kept = ~on_demand
        mix(clip, slice_notes(on[kept], off[kept], pitch[kept], velocity[kept], tables), tables.waves)
        for i in np.flatnonzero(on_demand):
            step, phase = divmod(int(on[i]), tables.phases)
            wave, gain = self.bank.on_demand(int(pitch[i]), int(velocity[i]), phase, int(off[i] - on[i]))
            at = step * tables.step - LEAD
            first, end = max(0, -at), min(len(wave), len(clip) - at)
            clip[at + first : at + end] += np.float32(gain) * wave[first:end]

    def _pedal(self, piece: Piece) -> np.ndarray:
        return np.rint(piece.pedal_s * self.settings.synth_rate).astype(np.int64)
