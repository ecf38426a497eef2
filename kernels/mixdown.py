"""The mixdown of many clips on a GPU, from a note bank in its memory: notes go over the bus, audio stays.

Every program owns a tile of one clip, goes through the clip's slices in the order of the notes, and adds up what those
that reach into the tile leave there; nothing is added to by two programs, so the same notes give the same bits.
`fastsmart.audio.mixdown` is the same on a CPU. Shape letters: N clips, M slices of all clips together, T samples of a
clip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, tl, triton

# 4 warps with 8 samples a lane; a 10 s clip at 16 kHz has 157 tiles, 64 clips 10,048 programs
TILE = 1024


class Slices(NamedTuple):
    """M slices of stored notes, clip by clip.

    start, wave, length : int32, int64, int32 [M]: its first sample in the clip (or before), place in the bank, samples
    hold, part          : int32, float32 [M]: samples until the release, its whole and its fraction
    gain, rate          : float32 [M]: level, and nepers a sample at which it falls once released
    offsets             : int32 [N + 1]: the slices of clip i are offsets[i] … offsets[i + 1] − 1
    clips               : int32 [N]: samples of each clip
    """

    start: Tensor
    wave: Tensor
    length: Tensor
    hold: Tensor
    part: Tensor
    gain: Tensor
    rate: Tensor
    offsets: Tensor
    clips: Tensor


def mixdown(slices: Slices, waves: Tensor, samples: int, peak: bool, kernel: str = "auto") -> Tensor:
    """Clips as float32 [N, samples], zeros after their ends, on the device of `waves`, the bank's int16 samples.

    peak   : each clip is divided by max|x| + 1e-6
    kernel : "auto" (Triton on a GPU that has it, else torch), "torch" or "triton"

    Raises UserError when the kernel asked for cannot run here.
    """
    n = len(slices.clips)
    out = torch.empty(n, samples, dtype=torch.float32, device=waves.device)
    tiles = -(-samples // TILE)
    top = torch.zeros(n, tiles, dtype=torch.float32, device=waves.device)
    if choose_kernel(kernel, waves.device) == "triton":
        if n:
            _mix[(tiles, n)](out, top, waves, *slices, samples, tiles, TILE=TILE)
    else:
        _mix_torch(out, top, waves, slices)
    if peak and n:
        out /= (top.amax(dim=1) + 1e-6)[:, None]
    return out


def _mix_torch(out: Tensor, top: Tensor, waves: Tensor, slices: Slices) -> None:
    """Tile by tile and slice by slice, as the kernel does it."""
    tiles = top.shape[1]
    for clip in range(len(out)):
        for tile in range(tiles):
            n = torch.arange(tile * TILE, min((tile + 1) * TILE, out.shape[1]), device=out.device)
            total = torch.zeros(len(n), dtype=torch.float32, device=out.device)
            for m in range(int(slices.offsets[clip]), int(slices.offsets[clip + 1])):
                at = n - slices.start[m]
                if not len(at) or at[-1] < 0 or at[0] >= slices.length[m]:
                    continue
                inside = (at >= 0) & (at < slices.length[m])
                x = waves[(slices.wave[m] + at).clamp(0, len(waves) - 1)].float()
                since = ((at - slices.hold[m]).float() - slices.part[m]).clamp(min=0.0)
                level = slices.gain[m] * torch.exp(-slices.rate[m] * since)
                total += torch.where(inside, level * x, 0.0)
            total = torch.where(n < slices.clips[clip], total, 0.0)
            out[clip, tile * TILE : (tile + 1) * TILE] = total
            top[clip, tile] = total.abs().max()


@jit
def _mix(
    out,
    top,
    waves,
    start,
    wave,
    length,
    hold,
    part,
    gain,
    rate,
    offsets,
    clips,
    samples,
    tiles,
    TILE: tl.constexpr,
):
    tile, clip = tl.program_id(0), tl.program_id(1)
    n = tile * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for m in range(tl.load(offsets + clip), tl.load(offsets + clip + 1)):
        begin, size = tl.load(start + m), tl.load(length + m)
        if (begin < (tile + 1) * TILE) & (begin + size > tile * TILE):
            at = n - begin
            x = tl.load(waves + tl.load(wave + m) + at, mask=(at >= 0) & (at < size), other=0).to(tl.float32)
            since = tl.maximum((at - tl.load(hold + m)).to(tl.float32) - tl.load(part + m), 0.0)
            total += tl.load(gain + m) * tl.exp(-tl.load(rate + m) * since) * x
    total = tl.where(n < tl.load(clips + clip), total, 0.0)
    tl.store(out + clip.to(tl.int64) * samples + n, total, mask=n < samples)
    tl.store(top + clip * tiles + tile, tl.max(tl.abs(total), axis=0))


def _shipped() -> list[Shipped]:
    if triton is None:
        return []
    whole = dict.fromkeys(("start", "length", "hold", "offsets", "clips"), "*i32")
    real = dict.fromkeys(("out", "top", "part", "gain", "rate"), "*fp32")
    types = whole | real | {"waves": "*i16", "wave": "*i64", "samples": "i32", "tiles": "i32"}
    return [Shipped("mixdown", _mix, types, {"TILE": TILE}, aligned=("samples",))]  # 160,000


SHIPPED = _shipped()
