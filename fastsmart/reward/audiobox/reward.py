"""Audiobox Aesthetics as a reward: how much a listener would enjoy what was rendered.

Shape letters: N clips, W windows of ten seconds, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmart.audio.batch import DeviceAudio
from fastsmart.errors import UserError
from fastsmart.machine.packed_linear import bfloat16_is_fast
from fastsmart.reward.audiobox.architecture import SAMPLE_RATE, WINDOW
from fastsmart.reward.audiobox.cpu import CpuEncoder
from fastsmart.reward.audiobox.encoder import encoder_weights
from fastsmart.reward.audiobox.gpu import BatchEncoder
from fastsmart.reward.audiobox.heads import Heads
from fastsmart.reward.audiobox.weights import read_weights
from fastsmart.reward.base import Clips, Surroundings, heard
from fastsmart.reward.settings import AUDIOBOX_AXES, AUDIOBOX_DTYPES, RewardSettings

LOWEST = 1.0  # of the scale from 1 to 10 on which people rated every axis


def fastest_dtype(device: torch.device) -> str:
    """The arithmetic that is fastest on a device among those whose ratings rank real clips as float32 does.

    Measured with random weights on 200 clips of POP909, by `bench/score.py --real`: docs/results.md. int8 does not, and
    is never chosen.
    """
    if device.type != "cpu":
        return "float16"
    return "bfloat16" if bfloat16_is_fast() else "float32"


class AudioboxReward:
    """Predicted ratings of enjoyment (CE), usefulness (CU), complexity (PC) and quality (PQ), each 1..10.

    A clip is scored as the package `audiobox_aesthetics` scores it: windows of 10 s, zero-padded and masked,
    predictions brought back to the scale of the raters, and averaged by the real length of the windows. The reward is
    the weighted sum of the axes times `scale`: with CE alone, 0.1..1.0 as in SMART. A clip of no length has the lowest
    rating; silence that was rendered is rated like any sound; a clip with a sample that is not finite is NaN.

    Hacked by whatever its raters' data did not hold: scores of tuned policies exceed those of recordings people like
    better, the notes get denser and ever more alike, and the soundfont alone moves CE by more than one point. Compare
    scores only under one soundfont and one level: how far the published weights hear loudness was not measured here
    (random weights hardly do).

    checkpoint : `checkpoint.pt`, a safetensors file with `config.json` beside it, the folder of either, or
                 "" or "facebook/audiobox-aesthetics" for the published weights from the hub or its cache, or
                 "random" for weights that mean nothing but cost as much
    axes       : weight of every axis that counts
    scale      : what a point on the raters' scale is worth
    batch_size : windows in one forward pass on a GPU; on a CPU they go one by one, unless it does 16 bit slowly
    device, dtype : where and in what arithmetic; "float32", "bfloat16", "float16", on a CPU "int8", or "auto"
                 (see `fastest_dtype`)

    random : whether the weights were drawn by `make_random_weights`, so that no score means anything

    Raises UserError when the weights are missing, broken or of another model, or the device cannot do int8.
    """

    name = "audiobox"
    needs_audio = True

    def __init__(
        self,
        checkpoint: str | Path = "",
        axes: Mapping[str, float] | None = None,
        *,
        scale: float = 0.1,
        batch_size: int = 8,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.axes = dict(axes or {"CE": 1.0})
        unknown = sorted(set(self.axes) - set(AUDIOBOX_AXES))
        if unknown:
            raise UserError(f"Audiobox has no axis {unknown[0]!r}; it has {', '.join(AUDIOBOX_AXES)}")
        if dtype not in AUDIOBOX_DTYPES:
            raise UserError(f"Audiobox computes in {', '.join(AUDIOBOX_DTYPES)}, not in {dtype!r}")
        self.scale, self.batch_size, self.device = scale, batch_size, torch.device(device)
        dtype = fastest_dtype(self.device) if dtype == "auto" else dtype
        if dtype == "int8" and self.device.type != "cpu":
            raise UserError(f"Audiobox in int8 runs on a CPU, not on {device}; choose float16")
        with torch.inference_mode():
            read = read_weights(checkpoint)
            self.random = read.random
            self.heads = Heads(read.state, read.target, read.head.normalize_embed, self.device)
            weights = encoder_weights(read.state)
            self.encoder: CpuEncoder | BatchEncoder
            by_window = dtype in ("float32", "int8") or (dtype == "bfloat16" and bfloat16_is_fast())
            if self.device.type == "cpu" and by_window:
                self.encoder = CpuEncoder(weights, dtype)
            else:
                self.encoder = BatchEncoder(weights, self.device, getattr(torch, dtype), batch_size, self.heads)

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> AudioboxReward:
        return cls(
            settings.audiobox_checkpoint,
            settings.audiobox_axes,
            batch_size=settings.audiobox_batch,
            dtype=settings.audiobox_dtype,
            device=surroundings.device,
        )

    def prepare(self) -> None:
        """Do beforehand what the first calls would have to, in the thread that will make them."""
        if isinstance(self.encoder, BatchEncoder):
            self.encoder.prepare()

    def __call__(self, clips: Clips) -> np.ndarray:
        return self.weighted(self.rate(clips))

    def weighted(self, ratings: Mapping[str, np.ndarray]) -> np.ndarray:
        """The reward of clips with these ratings, float32 [N]."""
        weighted = np.stack([weight * ratings[axis] for axis, weight in self.axes.items()])
        return (self.scale * weighted.sum(axis=0)).astype(np.float32)

    @torch.inference_mode()
    def rate(self, clips: Clips) -> dict[str, np.ndarray]:
        """All four axes of every clip on the raters' scale, float32 [N] each; NaN where there is no audio.

        Raises UserError when the audio is not at 16 kHz.
        """
        audio = heard(clips, self.name)
        if audio.sample_rate != SAMPLE_RATE:
            raise UserError(f"Audiobox listens at 16000 Hz, these clips are at {audio.sample_rate} Hz; render at 16000")
        samples: np.ndarray | torch.Tensor
        if isinstance(audio, DeviceAudio) and isinstance(self.encoder, BatchEncoder):
            samples = audio.on_device.to(self.device)
            lost = ~samples.isfinite().all(dim=1).cpu().numpy()
        else:
            samples = audio.samples
            lost = np.array([not np.isfinite(audio.clip(i)).all() for i in range(len(audio))], bool)
        windows = [(i, at) for i in np.flatnonzero(~lost) for at in range(0, int(audio.lengths[i]), WINDOW)]
        heard_samples: list[Any] = [samples[i, at : min(at + WINDOW, int(audio.lengths[i]))] for i, at in windows]
        rated = np.zeros((0, len(AUDIOBOX_AXES)))
        if windows:
            rated = self._rate(heard_samples).cpu().numpy().astype(np.float64)
        clip = np.array([i for i, _ in windows], np.int64)
        length = np.array([len(samples) for samples in heard_samples], np.int64)
        total = np.bincount(clip, length, len(audio))
        ratings = {}
        for axis, values in zip(AUDIOBOX_AXES, rated.T, strict=True):
            mean = np.bincount(clip, length * values, len(audio)) / np.maximum(total, 1)
            ratings[axis] = np.select([lost, total > 0], [np.nan, mean], LOWEST).astype(np.float32)
        return ratings

    def _rate(self, windows: list[Any]) -> torch.Tensor:
        """All four axes of windows, float32 [W, 4]."""
        if isinstance(self.encoder, BatchEncoder):
            return self.encoder.rate(windows)
        return self.heads(self.encoder(windows))
