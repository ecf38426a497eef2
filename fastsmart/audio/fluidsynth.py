"""The reference renderer: FluidSynth, driven through ctypes for float output and few calls.

Five traps of the library shape this file, each seen with version 2.3.1:

* A synth remembers. `system_reset` leaves old voices ringing, and every voice slot keeps the panning gain of the last
  note it played and glides from there to the next note's over 64 samples. So every clip gets a synth of its own,
  made in about a millisecond around the soundfont that stays loaded: what was rendered before cannot be heard.
* In a new synth that gain is 0, so the first note of each slot would fade in. Hence the slots are warmed: they
  play unheard notes first. A sum of single notes then equals the chord, which is what a note bank relies on.
* A note lasts 10 ms at least: an earlier note-off waits, and where it falls due in the block in which the voice was
  switched off, the voice goes on and sounds its release. Slots are warmed with keys that are struck again and again,
  which releases them; so voices are switched off until the synth says that none is active.
* Events wait in a queue of 64 for each voice of the polyphony until the next block of 64 samples; when it is full they
  are lost. The polyphony is chosen so that a chord of all notes of a piece fits; crowds are spread over blocks.
* The samples of an SF3 file are decoded by libsndfile. A process that imported `soundfile` first decodes them with the
  copy in its wheel, 1e-5 away from the system's. So what must be equal to the last bit is rendered by the pool.

Shape letters: T samples, M notes.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from ctypes import c_char_p, c_double, c_int, c_void_p
from functools import cache
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmart.audio.events import (
    BLOCK,
    PEDAL_DOWN,
    Piece,
    empty_value,
    fade_out,
    finish,
    merge_events,
    piece_arrays,
    timing,
)
from fastsmart.audio.resample import resample
from fastsmart.audio.settings import RenderSettings
from fastsmart.audio.soundfont import find_soundfont
from fastsmart.errors import UserError

if TYPE_CHECKING:  # the pool's workers start faster without it
    from fastsmart.notes import NoteBatch

Take = Callable[[np.ndarray], object]  # what is given the parts of a piece
GAIN = 0.2  # FluidSynth's own default; far from clipping, and float output does not clip
SUSTAIN = 64  # the controller
MIN_VOICES, MAX_VOICES = 64, 1024
PROBE_VOICES = 256
STRIKE_CHUNK = 64 * BLOCK  # samples between looks whether a single note has died away
PART = 1024 * BLOCK  # samples at a time of what is not played into one array
EVENTS_PER_VOICE = 64  # of the queue, for each voice of the polyphony
SILENCE_BLOCKS = 100  # a note-off revives a voice once, so two or three are enough
STRIKE_EVENTS = 60  # a struck voice costs 54 (measured), and a few more where it takes the place of another
VOICE_EVENTS = 4  # what the end of a note or a pedal costs for each voice it concerns, at most

PIN = "fluid_synth_pin_preset"  # since FluidSynth 2.2; the rest is older
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "new_fluid_settings": (c_void_p, []),
    "delete_fluid_settings": (None, [c_void_p]),
    "fluid_settings_setint": (c_int, [c_void_p, c_char_p, c_int]),
    "fluid_settings_setnum": (c_int, [c_void_p, c_char_p, c_double]),
    "fluid_version_str": (c_char_p, []),
    "fluid_set_log_function": (c_void_p, [c_int, c_void_p, c_void_p]),
    "new_fluid_synth": (c_void_p, [c_void_p]),
    "delete_fluid_synth": (None, [c_void_p]),
    "fluid_synth_sfload": (c_int, [c_void_p, c_char_p, c_int]),
    "fluid_synth_get_sfont_by_id": (c_void_p, [c_void_p, c_int]),
    "fluid_synth_add_sfont": (c_int, [c_void_p, c_void_p]),
    "fluid_synth_remove_sfont": (c_int, [c_void_p, c_void_p]),
    "fluid_synth_unset_program": (c_int, [c_void_p, c_int]),
    PIN: (c_int, [c_void_p, c_int, c_int, c_int]),
    "fluid_synth_program_select": (c_int, [c_void_p, c_int, c_int, c_int, c_int]),
    "fluid_synth_noteon": (c_int, [c_void_p, c_int, c_int, c_int]),
    "fluid_synth_noteoff": (c_int, [c_void_p, c_int, c_int]),
    "fluid_synth_cc": (c_int, [c_void_p, c_int, c_int, c_int]),
    "fluid_synth_set_reverb_on": (c_int, [c_void_p, c_int]),
    "fluid_synth_set_chorus_on": (c_int, [c_void_p, c_int]),
    "fluid_synth_all_sounds_off": (c_int, [c_void_p, c_int]),
    "fluid_synth_get_active_voice_count": (c_int, [c_void_p]),
    "fluid_synth_write_float": (c_int, [c_void_p, c_int, c_void_p, c_int, c_int, c_void_p, c_int, c_int]),
}
_MIDI_CHANNELS = 16
_LOG_LEVELS = 5


@cache
def load_library() -> ctypes.CDLL:
    """libfluidsynth as pyfluidsynth finds it, with prototypes set and its log silenced (we raise instead).

    Raises UserError with the command that installs it when it is missing.
    """
    try:
        with redirect_stdout(StringIO()):  # where CI is set it prints what it found
            import fluidsynth  # looks for the shared library when imported
    except ImportError as error:
        raise UserError(
            f"FluidSynth cannot be loaded ({error}): run `apt-get install libfluidsynth3` "
            "(macOS: `brew install fluid-synth`) and `pip install pyfluidsynth`"
        ) from error
    library = ctypes.CDLL(fluidsynth.lib)
    for name, (result, arguments) in _PROTOTYPES.items():
        if name != PIN or hasattr(library, PIN):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    for level in range(_LOG_LEVELS):
        library.fluid_set_log_function(level, None, None)
    return library


class FluidSynthRenderer:
    """Renders one piece at a time; the same notes give the same bits after any history, and in any pool's worker.

    Owns the loaded soundfont: a context manager, or call `close`. Not for several threads at once.

    Raises UserError when FluidSynth is missing, or the soundfont cannot be read or lacks the program.
    """

    def __init__(self, settings: RenderSettings) -> None:
        self.settings = settings
        self.soundfont = find_soundfont(settings.soundfont)
        self._library = library = load_library()
        self._options = library.new_fluid_settings()
        can_pin = hasattr(library, PIN)
        for key, value in (
            ("synth.polyphony", PROBE_VOICES),
            ("synth.reverb.active", settings.reverb),
            ("synth.chorus.active", settings.chorus),
            ("synth.lock-memory", False),
            # only the program that is used is decoded, which is what makes a worker start in a fraction of a second
            ("synth.dynamic-sample-loading", can_pin),
        ):
            library.fluid_settings_setint(self._options, key.encode(), int(value))
        library.fluid_settings_setnum(self._options, b"synth.sample-rate", float(settings.synth_rate))
        library.fluid_settings_setnum(self._options, b"synth.gain", GAIN)
        # This synth plays nothing after its set-up. It is kept because the soundfont reads its file through it.
        self._loader = library.new_fluid_synth(self._options)
        self._finalizer = weakref.finalize(self, _free, library, self._options, self._loader)
        font_id = library.fluid_synth_sfload(self._loader, os.fsencode(self.soundfont), 0)
        if font_id < 0:
            raise UserError(f"FluidSynth cannot load the soundfont {self.soundfont}: it may be damaged, choose another")
        if library.fluid_synth_program_select(self._loader, 0, font_id, 0, settings.program) < 0:
            raise UserError(
                f"the soundfont {self.soundfont} has no program {settings.program} in bank 0: set audio.program"
            )
        if can_pin:
            library.fluid_synth_pin_preset(self._loader, font_id, 0, settings.program)
        self._buffer = np.zeros((2, 0), np.float32)
        self._make_room(PART)
        self._played = 0  # samples of the buffer the last piece filled
        self._voices_per_note, self._warm_keys = self._probe()
        if not self._warm_keys:
            raise UserError(
                f"program {settings.program} of the soundfont {self.soundfont} is silent: set audio.program"
            )
        self._font = library.fluid_synth_get_sfont_by_id(self._loader, font_id)
        library.fluid_synth_remove_sfont(self._loader, self._font)
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _free, library, self._options, self._loader, self._font)

    def render(self, notes: NoteBatch, i: int) -> np.ndarray:
        """Piece i as mono float32 [T], the mean of both channels."""
        out = np.empty(self.settings.max_samples, np.float32)
        return out[: self.render_into(out, piece_arrays(notes, i))]

    def render_stereo(self, notes: NoteBatch, i: int) -> np.ndarray:
        """Piece i as float32 [T, 2]; what still sounds at the end of a release tail fades out."""
        score, length = self._play(piece_arrays(notes, i))
        if length == 0:
            return np.full((self.settings.empty_samples, 2), empty_value(self.settings), np.float32)
        stereo = np.stack([self._resampled(channel, length) for channel in self._buffer], axis=1)
        kept = finish(stereo, score, self.settings)
        if self.settings.tail == "release" and kept == length:
            fade_out(stereo[score:], self.settings)
        return stereo[:kept]

    def play(self, notes: NoteBatch, i: int, take: Take) -> tuple[int, int]:
        """Give `take` all of piece i as it is played, at the synth's rate and level: float32 [2, some], to be copied.

        Returns the samples of the clip until its score ends, and with the release; a little more than that is played.
        Both are 0, and nothing is played, when no note starts in the window.
        """
        return self._play(piece_arrays(notes, i), take)

    def render_into(self, out: np.ndarray, piece: Piece) -> int:
        """Fill `out`, float32 [max_samples], with one piece, mono, zeros after its end; returns its length T.

        A score without notes fills all of `out` with zeros or NaN.
        """
        score, length = self._play(piece)
        if length == 0:
            out[:] = empty_value(self.settings)
            return self.settings.empty_samples
        mono = self._buffer[0] + self._buffer[1]
        mono *= 0.5
        out[:length] = self._resampled(mono, length)
        length = finish(out[:length], score, self.settings)
        out[length:] = 0.0
        return length

    def strike(self, key: int, velocities: Sequence[int], off_block: int, blocks: int) -> np.ndarray:
        """One note alone at each velocity, released at the start of block `off_block`: float32 [V, blocks * 64], mono.

        At the synth's own rate and level.
        """
        self._make_room(blocks * BLOCK)
        out = np.zeros((len(velocities), blocks * BLOCK), np.float32)
        synth, queue = self._new_synth(self._voices_per_note)
        try:
            self._warm(synth, self._voices_per_note)
            for row, velocity in zip(out, velocities, strict=True):
                done = min(off_block + 1, blocks) * BLOCK
                self._perform(synth, ([0, off_block * BLOCK], [velocity, 0], [key, key]), done, queue)
                while done < row.size and self._library.fluid_synth_get_active_voice_count(synth):
                    chunk = min(STRIKE_CHUNK, row.size - done)
                    self._write(synth, done, chunk)
                    done += chunk
                np.add(self._buffer[0, :done], self._buffer[1, :done], out=row[:done])
                row *= 0.5
                self._silence(synth)
        finally:
            self._delete_synth(synth)
        return out

    def close(self) -> None:
        """Free the synth and the soundfont; rendering is over."""
        self._finalizer()

    def __enter__(self) -> FluidSynthRenderer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _resampled(self, channel: np.ndarray, length: int) -> np.ndarray:
        """A played channel at the clip's rate, float32 [length], exact up to its end: `_play` goes on a little."""
        return resample(channel[: self._played], self.settings.synth_rate, self.settings.sample_rate)[:length]

    def _play(self, piece: Piece, take: Take | None = None) -> tuple[int, int]:
        """Play one piece into `_buffer`, both channels, or part after part to `take`; its samples until the score ends,
        and with the release.

        Both 0 when no note starts in the window.
        """
        settings = self.settings
        score, length, heard, start, stop = timing(piece, settings)
        if score == 0:
            return 0, 0
        pedal = np.rint(piece.pedal_s * settings.synth_rate).astype(np.int64), piece.pedal_down
        events = merge_events(start, stop, piece.pitch[heard], piece.velocity[heard], pedal)
        self._played = self._synth_samples(length)
        if take is None:
            self._make_room(self._synth_samples(settings.max_samples))  # once for all pieces
        voices = len(start) * self._voices_per_note
        synth, queue = self._new_synth(voices)
        try:
            self._warm(synth, min(voices, MAX_VOICES))
            self._perform(synth, events, self._played, queue, take)
        finally:
            self._delete_synth(synth)
        return score, length

    def _make_room(self, samples: int) -> None:
        """See to it that `_buffer` holds so many samples of each channel."""
        if self._buffer.shape[1] < samples:
            self._buffer = np.zeros((2, samples), np.float32)
            self._left, self._right = self._buffer[0].ctypes.data, self._buffer[1].ctypes.data

    def _synth_samples(self, length: int) -> int:
        """Samples the synth plays for a clip: whole blocks, and one more for the resampling filter to look ahead."""
        return (-(-length * self.settings.synth_rate // (self.settings.sample_rate * BLOCK)) + 1) * BLOCK

    def _perform(
        self, synth: int, events: tuple[list[int], ...], length: int, queue: int, take: Take | None = None
    ) -> None:
        """Play events into `length` samples, see `_write`; where a block has more than `queue`, into the next.

        Counts what events may cost at most: struck voices are taken to sound on until the end.
        """
        library, each = self._library, self._voices_per_note
        position, room = 0, queue
        struck, voices = [0] * 128, 0
        for at, velocity, key in zip(*events, strict=True):
            if at > position:
                if at >= length:
                    break
                self._write(synth, position, at - position, take)
                position, room = at, queue
            if velocity > 0:
                cost = STRIKE_EVENTS * each + min(struck[key], queue // EVENTS_PER_VOICE)
                struck[key] += each
                voices += each
            else:
                cost = VOICE_EVENTS * (each if velocity == 0 else min(voices, queue // EVENTS_PER_VOICE))
            if cost > room:
                if position + BLOCK >= length:
                    break
                self._write(synth, position, BLOCK, take)
                position, room = position + BLOCK, queue
            room -= cost
            if velocity > 0:
                library.fluid_synth_noteon(synth, 0, key, velocity)
            elif velocity == 0:
                library.fluid_synth_noteoff(synth, 0, key)
            else:
                library.fluid_synth_cc(synth, 0, SUSTAIN, 127 if velocity == PEDAL_DOWN else 0)
        self._write(synth, position, length - position, take)

    def _write(self, synth: int, position: int, samples: int, take: Take | None = None) -> None:
        """Let the synth play on, into `_buffer` at `position`, or into its beginning, part after part, for `take`."""
        write = self._library.fluid_synth_write_float
        if take is None:
            write(synth, samples, self._left, position, 1, self._right, position, 1)
            return
        for start in range(0, samples, PART):
            some = min(PART, samples - start)
            write(synth, some, self._left, 0, 1, self._right, 0, 1)
            take(self._buffer[:, :some])

    def _new_synth(self, voices: int) -> tuple[int, int]:
        """A synth with room for twice as many voices, with the soundfont and its program; events its queue holds."""
        library = self._library
        if not self._finalizer.alive:
            raise RuntimeError("this renderer is closed")
        polyphony = min(max(2 * voices, MIN_VOICES), MAX_VOICES) + self._voices_per_note
        library.fluid_settings_setint(self._options, b"synth.polyphony", polyphony)
        synth = library.new_fluid_synth(self._options)
        # Adding a font gives every channel its program: without this the drum kit would be decoded for each clip.
        for channel in range(_MIDI_CHANNELS):
            library.fluid_synth_unset_program(synth, channel)
        font_id = library.fluid_synth_add_sfont(synth, self._font)
        library.fluid_synth_program_select(synth, 0, font_id, 0, self.settings.program)
        return synth, EVENTS_PER_VOICE * polyphony

    def _delete_synth(self, synth: int) -> None:
        self._library.fluid_synth_remove_sfont(synth, self._font)
        self._library.delete_fluid_synth(synth)

    def _warm(self, synth: int, voices: int) -> None:
        """Let the first `voices` slots play a note each that neither listeners nor effects hear, then silence them."""
        library, keys, settings = self._library, self._warm_keys, self.settings
        library.fluid_synth_set_reverb_on(synth, 0)  # it would ring on into the music
        library.fluid_synth_set_chorus_on(synth, 0)
        for n in range(voices):
            library.fluid_synth_noteon(synth, 0, keys[n % len(keys)], 127)
            if library.fluid_synth_get_active_voice_count(synth) >= voices:
                break
            if n % len(keys) == len(keys) - 1:
                self._write(synth, 0, BLOCK)
        self._write(synth, 0, BLOCK)
        self._silence(synth)
        library.fluid_synth_set_reverb_on(synth, int(settings.reverb))
        library.fluid_synth_set_chorus_on(synth, int(settings.chorus))

    def _silence(self, synth: int) -> None:
        """Switch off all voices, until none is active."""
        library = self._library
        for _ in range(SILENCE_BLOCKS):
            library.fluid_synth_all_sounds_off(synth, 0)
            self._write(synth, 0, BLOCK)  # voices that were switched off leave with the next block
            if not library.fluid_synth_get_active_voice_count(synth):
                return
        raise RuntimeError("FluidSynth has voices that cannot be switched off")

    def _probe(self) -> tuple[int, list[int]]:
        """The most voices one note of the program uses, and up to 64 keys that sound, middle of the keyboard first."""
        library, synth = self._library, self._loader
        voices = np.zeros(128, int)
        for velocity in (1, 24, 48, 64, 80, 96, 112, 127):
            for key in range(128):
                before = library.fluid_synth_get_active_voice_count(synth)
                library.fluid_synth_noteon(synth, 0, key, velocity)
                used = library.fluid_synth_get_active_voice_count(synth) - before
                voices[key] = max(voices[key], used)
                if key % 8 == 7:
                    self._silence(synth)
        keys = [key for key in range(128) if voices[key] > 0]
        return int(voices.max()), sorted(keys, key=lambda key: abs(key - 60))[:64]


def _free(library: ctypes.CDLL, options: int, loader: int, font: int | None = None) -> None:
    if font is not None:
        library.fluid_synth_add_sfont(loader, font)  # a synth frees the fonts it holds
    library.delete_fluid_synth(loader)
    library.delete_fluid_settings(options)
