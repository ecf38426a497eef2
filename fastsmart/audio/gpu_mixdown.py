"""The note bank in a GPU's memory: a batch of pieces becomes clips there, where a reward on that GPU reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastsmart.audio.bank import NoteBank
from fastsmart.audio.batch import DeviceAudio
from fastsmart.audio.events import note_samples, playable
from fastsmart.audio.mixdown import slice_clips
from fastsmart.audio.pool import RenderPool
from fastsmart.audio.settings import RenderSettings
from fastsmart.errors import UserError
from fastsmart.kernels.mixdown import Slices, mixdown
from fastsmart.notes import NoteBatch, Pedals

ALIGNED = 16  # bytes; where each column of a copy begins


class DeviceRenderer:
    """A pool's clips on `device`: mixed there from stored notes, and by the pool where only FluidSynth can play them.

    A clip with a note that the bank does not have yet goes through the pool, whose processes store it. What becomes of
    a clip depends on its notes and the soundfont, not on what was stored before or on its neighbours.

    mixed : clips made on the device so far

    Owns a bank, not the pool: call `close`. Not for several threads at once.
    """

    def __init__(self, pool: RenderPool, device: str | torch.device, kernel: str = "auto") -> None:
        self.pool = pool
        self.mixer = DeviceMixer(pool.settings, device, kernel)
        self.mixed = 0
        self._notes: dict[int, NoteBatch] = {}  # of every clip submitted
        self._waiting: list[int] = []  # clips with stored notes since the last poll
        self._pooled: set[int] = set()

    def submit(self, index: int, notes: NoteBatch) -> None:
        """Take in a batch of one piece as clip `index`."""
        self._notes[index] = notes
        if self.mixer.bank.stored(*_audible(notes)):
            self._waiting.append(index)
        else:
            self.pool.submit(index, notes)
            self._pooled.add(index)

    def poll(self, timeout_s: float = 0.0) -> list[int]:
        """The clips that can be gathered, of those submitted since the last call; see `RenderPool.poll`."""
        waiting, self._waiting = self._waiting, []
        return waiting + self.pool.poll(0.0 if waiting else timeout_s)

    def gather(self, indices: Sequence[int]) -> DeviceAudio:
        """The clips, in this order."""
        kept = [row for row, index in enumerate(indices) if index in self._pooled]
        pooled = self.pool.gather([indices[row] for row in kept])
        mine = np.ones(len(indices), bool)
        mine[kept] = [
            not np.isnan(clip[0]) and not self.mixer.bank.ensure(*_audible(self._notes[indices[row]])).any()
            for row, clip in zip(kept, pooled.samples, strict=True)
        ]
        if mine.all():
            self.mixed += len(indices)
            clips, lengths = self.mixer.render(NoteBatch.concat([self._notes[index] for index in indices]))
            return DeviceAudio(clips[:, : lengths.max(initial=0)], lengths, self.mixer.settings.sample_rate)
        lengths = np.zeros(len(indices), np.int64)
        clips = torch.zeros(len(indices), self.mixer.settings.max_samples, device=self.mixer.device)
        if mine.any():
            rows = np.flatnonzero(mine)
            mixed, lengths[rows] = self.mixer.render(
                NoteBatch.concat([self._notes[indices[row]] for row in rows.tolist()])
            )
            clips[torch.from_numpy(rows).to(clips.device)] = mixed
            self.mixed += len(rows)
        for row, clip, length in zip(kept, pooled.samples, pooled.lengths, strict=True):
            if not mine[row]:
                clips[row, :length] = torch.from_numpy(clip[:length]).to(clips.device)
                lengths[row] = length
        return DeviceAudio(clips[:, : lengths.max(initial=0)], lengths, self.mixer.settings.sample_rate)

    def clear(self) -> None:
        """Forget the clips."""
        self.pool.clear()
        self._notes.clear()
        self._pooled.clear()

    def close(self) -> None:
        """Let go of the bank."""
        self.mixer.close()


def _audible(notes: NoteBatch) -> tuple[np.ndarray, np.ndarray]:
    """Keys and velocities of the notes that a synth can play."""
    audible = playable(notes.pitch, notes.velocity)
    return notes.pitch[audible], notes.velocity[audible]


class DeviceMixer:
    """Renders batches from a note bank on `device`; notes go there, audio is made there and stays.

    Equal to the bank's renderer on a CPU to rounding. Owns a bank: a context manager, or call `close`.

    Raises UserError when the settings ask for what only the CPU does (a release tail, exact notes, loudness).
    """

    def __init__(self, settings: RenderSettings, device: str | torch.device = "cuda", kernel: str = "auto") -> None:
        self.settings = replace(settings, mixdown="gpu")  # refuses what it cannot do
        self.device = torch.device(device)
        self.kernel = kernel
        self.bank = NoteBank(settings)
        self._waves = torch.zeros(0, dtype=torch.int16, device=self.device)

    def render(self, notes: NoteBatch) -> tuple[Tensor, np.ndarray]:
        """All N pieces as float32 [N, max_samples] on the device, zeros after their ends, and their lengths int64 [N].

        Raises UserError for a soundfont with a note that the bank has to render on demand.
        """
        slices, lengths, empty = self._slices(notes)
        clips = mixdown(slices, self._waves, self.settings.max_samples, self.settings.normalize == "peak", self.kernel)
        if self.settings.empty == "nan" and empty.any():
            clips[torch.from_numpy(empty).to(self.device)] = float("nan")
        return clips, np.where(empty, self.settings.empty_samples, lengths)

    def close(self) -> None:
        """Let go of the bank and its copy."""
        self.bank.close()
        self._waves = self._waves[:0]

    def __enter__(self) -> DeviceMixer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _slices(self, notes: NoteBatch) -> tuple[Slices, np.ndarray, np.ndarray]:
        """The plan of a batch on the device, lengths int64 [N], and which pieces are empty, bool [N]."""
        settings, rate = self.settings, self.settings.synth_rate
        # as `events.timing`, for all pieces at once
        window_s = np.minimum(notes.end_s, settings.max_seconds)
        last = np.repeat(np.rint(window_s * rate).astype(np.int64), notes.counts)
        start, stop = note_samples(notes.onset_s, notes.duration_s, rate, last)
        heard = (start < last) & playable(notes.pitch, notes.velocity)
        offsets = np.concatenate([[0], np.cumsum(heard)])[notes.offsets]
        pitch, velocity = notes.pitch[heard], notes.velocity[heard]
        if self.bank.ensure(pitch, velocity).any():
            raise UserError(f"the bank of {self.bank.soundfont} renders notes on demand; that needs the CPU's renderer")
        if len(self._waves) < self.bank.samples:  # a bank grows at its end
            new = self.bank.tables.waves[len(self._waves) : self.bank.samples].copy()
            self._waves = torch.cat([self._waves, torch.from_numpy(new).to(self.device)])
        pedals = notes.pedals or Pedals.none(len(notes))
        pedal_at = np.rint(pedals.second * rate).astype(np.int64)
        slices = slice_clips(
            start[heard], stop[heard], pitch, velocity, offsets, pedal_at, pedals.down, pedals.offsets, self.bank.tables
        )
        lengths = np.where(np.diff(offsets) == 0, 0, np.rint(window_s * settings.sample_rate)).astype(np.int64)
        empty = lengths == 0
        whole = np.floor(slices.hold)
        columns = (
            slices.start.astype(np.int32),
            slices.wave,
            slices.length.astype(np.int32),
            np.minimum(whole, 2**30).astype(np.int32),
            (slices.hold - whole).astype(np.float32),
            slices.gain,
            slices.rate,
            offsets.astype(np.int32),
            lengths.astype(np.int32),
        )
        return Slices(*copied(columns, self.device)), lengths, empty


def copied(columns: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The columns on the device, by one copy, which on a GPU nothing waits for."""
    starts = np.cumsum([0] + [-(-column.nbytes // ALIGNED) * ALIGNED for column in columns])
    packed = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, column in zip(starts, columns, strict=False):
        packed.numpy()[start : start + column.nbytes] = column.view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + column.nbytes].view(torch.from_numpy(column[:0]).dtype)
        for start, column in zip(starts.tolist(), columns, strict=False)
    ]
