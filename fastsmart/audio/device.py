"""The note bank in a GPU's memory: a batch of pieces becomes clips there, where a reward on that GPU reads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsmart.audio.bank import NoteBank
from fastsmart.audio.mix import bin_slices, plan_clips
from fastsmart.audio.settings import RenderSettings
from fastsmart.errors import UserError
from fastsmart.kernels.mix import TILE, Slices, mixdown
from fastsmart.notes import NoteBatch, Pedals


class DeviceMixer:
    """Renders batches from a note bank on `device`; notes go there, audio is made there and stays.

    Equal to the bank's renderer on a CPU to rounding. Owns a bank: a context manager, or call `close`.

    Raises UserError when the settings ask for what only the CPU does (a release tail, exact notes, loudness).
    """

    def __init__(self, settings: RenderSettings, device: str | torch.device = "cuda", kernel: str = "auto") -> None:
        if settings.tail != "cut" or settings.bank != "stored" or settings.normalize == "loudness":
            raise UserError(
                "a mixdown on the GPU needs audio.tail = 'cut', audio.bank = 'stored' and audio.normalize = 'peak' or "
                "'none'"
            )
        self.settings = settings
        self.device = torch.device(device)
        self.kernel = kernel
        self.bank = NoteBank(settings)
        self._waves = torch.zeros(1, dtype=torch.int16, device=self.device)

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
        start = np.maximum(np.rint(notes.onset_s * rate).astype(np.int64), 0)
        stop = np.rint((notes.onset_s + notes.duration_s) * rate).astype(np.int64)
        stop = np.maximum(np.minimum(stop, last), start + 1)
        heard = (start < last) & (notes.pitch < 128) & (notes.velocity > 0) & (notes.velocity < 128)
        offsets = np.concatenate([[0], np.cumsum(heard)])[notes.offsets]
        pitch, velocity = notes.pitch[heard], notes.velocity[heard]
        if self.bank.ensure(pitch, velocity).any():
            raise UserError(f"the bank of {self.bank.soundfont} renders notes on demand; that needs the CPU's renderer")
        if len(self._waves) < self.bank.samples:
            self._waves = torch.from_numpy(self.bank.tables.waves[: self.bank.samples].copy()).to(self.device)
        pedals = notes.pedals or Pedals.none(len(notes))
        pedal_at = np.rint(pedals.second * rate).astype(np.int64)
        plan = plan_clips(
            start[heard], stop[heard], pitch, velocity, offsets, pedal_at, pedals.down, pedals.offsets, self.bank.tables
        )
        empty = np.diff(offsets) == 0
        lengths = np.where(empty, 0, np.rint(window_s * settings.sample_rate)).astype(np.int64)
        bins, members = bin_slices(plan, offsets, lengths, TILE, -(-settings.max_samples // TILE))
        whole = np.floor(plan.hold)
        columns = (
            plan.start.astype(np.int32),
            plan.wave,
            plan.length.astype(np.int32),
            np.minimum(whole, 2**30).astype(np.int32),
            (plan.hold - whole).astype(np.float32),
            plan.gain,
            plan.rate,
            bins,
            members,
            lengths.astype(np.int32),
        )
        return Slices(*(torch.from_numpy(c).to(self.device) for c in columns)), lengths, empty
