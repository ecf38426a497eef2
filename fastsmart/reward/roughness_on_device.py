"""Roughness of clips that are on a GPU already, all frames at once: `descriptors.clip_roughness` in torch.

Shape letters: N clips, T samples, K frames, B frequency bins, P peaks of a frame.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsmart.audio.batch import DeviceAudio
from fastsmart.reward.spectra import CURVE_MAX, PEAK_FLOOR_DB, PEAKS, SILENCE_RMS, frame_size

AT_ONCE = 32  # clips whose spectra are in memory together, 20 MB each for 10 s


@torch.inference_mode()
def clip_roughness_on_device(audio: DeviceAudio) -> np.ndarray:
    """Sensory roughness of every clip, float64 [N], as `clip_roughness` has it to rounding; NaN for silence."""
    clips, lengths = audio.on_device, torch.from_numpy(audio.lengths).to(audio.on_device.device)
    size = frame_size(audio.sample_rate)
    window = torch.blackman_window(size, periodic=True, device=clips.device)
    found = [
        _roughness(clips[first : first + AT_ONCE], lengths[first : first + AT_ONCE], window, audio.sample_rate)
        for first in range(0, len(clips), AT_ONCE)
    ]
    return torch.cat(found).double().cpu().numpy() if found else np.zeros(0)


def _roughness(clips: Tensor, lengths: Tensor, window: Tensor, sample_rate: int) -> Tensor:
    """Roughness of clips float32 [N, T], zero (or NaN) after their lengths int64 [N]; float32 [N]."""
    size = len(window)
    half = size // 2
    frames = 1 + max(-(-(clips.shape[1] - size) // half), 0)
    padded = torch.nn.functional.pad(clips, (0, (frames + 1) * half - clips.shape[1]))
    frame = padded.unfold(1, size, half)  # [N, K, size]
    begins = torch.arange(frame.shape[1], device=clips.device) * half
    last = (lengths[:, None] - size).clamp_min(0)  # frames that only begin in the padding of others are not this clip's
    heard = (frame.square().sum(-1) > SILENCE_RMS**2 * size) & (begins < last + half)
    magnitude = torch.fft.rfft(frame * window).abs() * (2 / window.sum())
    rough, power = _peaks(magnitude, sample_rate / size)
    rough, power = (torch.where(heard, x, 0.0).sum(1) for x in (rough, power))
    value = torch.where(power > 0, rough / power.clamp_min(torch.finfo(power.dtype).tiny), 0.0)
    return torch.where(heard.any(1), value, torch.nan)


def _peaks(magnitude: Tensor, hz_per_bin: float) -> tuple[Tensor, Tensor]:
    """Roughness and sum of squared amplitudes of the strongest peaks of every frame [N, K]; magnitude [N, K, B]."""
    left, mid, right = magnitude[..., :-2], magnitude[..., 1:-1], magnitude[..., 2:]
    floor = (magnitude.amax(-1, keepdim=True) * 10 ** (-PEAK_FLOOR_DB / 20)).clamp_min(1e-9)
    peak = (mid > floor) & (mid >= left) & (mid > right)
    # the top of the parabola through three log magnitudes, of the neighbours over the middle's: so a plateau has its
    # top within half a bin however logarithms are rounded
    mid = mid.clamp_min(1e-30)
    low, high = ((left + 1e-12) / mid).log(), ((right + 1e-12) / mid).log()
    offset = 0.5 * (low - high) / (low + high)
    height = torch.where(peak, (mid.log() - 0.25 * (low - high) * offset).exp(), 0.0)
    amplitude, bins = height.topk(PEAKS, dim=-1)
    at_hz = (bins + 1 + torch.where(amplitude > 0, offset.gather(-1, bins), 0.0)) * hz_per_bin
    lower = torch.minimum(at_hz[..., :, None], at_hz[..., None, :])
    distance = 0.24 / (0.0207 * lower + 18.96) * (at_hz[..., :, None] - at_hz[..., None, :]).abs()
    curve = ((-3.51 * distance).exp() - (-5.75 * distance).exp()) / CURVE_MAX  # 0 on the diagonal
    rough = 0.5 * torch.einsum("nkp,nkpq,nkq->nk", amplitude, curve, amplitude)
    return rough, amplitude.square().sum(-1)
