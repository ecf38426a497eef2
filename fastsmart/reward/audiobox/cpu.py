"""The encoder on a CPU: window by window, nothing computed that is masked, every product a matrix product.

A window is 499 rows, enough for the full rate of a matrix product, and its activations stay in the cache. So windows
are not batched, and what a clip gets does not depend on its neighbours, to the last bit. Frames of padding are not
computed: upstream masks them as keys, zeroes them before the positional convolution and leaves them out of the mean, so
the result is the same and a clip of 3 s costs 3 s.

Shape letters: S samples, F frames, R rows, C channels, D width, H heads, E size of a head, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.kernels.attention import gates
from fastsmart.machine.files import mkl_knows_processor
from fastsmart.machine.hardware import onednn_8_bit
from fastsmart.machine.packed_linear import PackedLinear
from fastsmart.reward.audiobox.architecture import FIELD, FRAMES, HOP, KERNELS, NORM_EPS, STRIDES, frames_of
from fastsmart.reward.audiobox.encoder import EncoderWeights, Norm, normalised_first

Linear = Callable[[Tensor, int], Tensor]  # [R, in] and how many of the rows count -> [R, out]
Convolution = Callable[[Tensor], Tensor]

# Frames whose way through the convolutions is made at once: few enough to stay near the cores and to need little room,
# many enough for a good matrix product. Measured on two Xeon cores with 2 MiB of cache each; the optima are flat.
_CHUNKS = {"float32": 64, "bfloat16": 128, "int8": 32}
# The second to the fourth convolution: nine tenths of their work. The last three, which cost little, were the source of
# most of the error of the scores (random weights).
_INT8_CONVOLUTIONS = 3
# Shorter windows have their frames filled up to a multiple: oneDNN compiles a product for every number of rows it meets
# and keeps it, 9 MB for each length of a window.
_FRAMES_FILLED = 16
_GROUP = 16  # windows that go through a layer before the next is touched
_LEAST_GELU = -0.17  # no value of GELU lies below
# Of a weight as an integer. Inputs are at most 255, and where oneDNN saturates, two products fit into 16 bits with 64.
_MOST_INT8 = {"exact": 127, "saturating": 64}


class CpuEncoder:
    """The encoder, in float32 or with 8-bit or 16-bit matrix products.

    dtype : "float32"; "bfloat16", products of the convolutions (but the first), layers and attention, with norms and
            sums in float32, which pays with AMX or AVX-512 BF16; "int8", the first convolutions and the layers on
            8-bit integers: weights with a scale for each output, activations with one for each product, taken from
            their range. Needs AVX2; without VNNI, weights have 7 bits

    Raises UserError when the machine has no fast 8-bit products.
    """

    def __init__(self, weights: EncoderWeights, dtype: str = "float32") -> None:
        if dtype == "int8" and not int8_is_fast():
            raise UserError("audiobox in int8 needs a CPU with AVX2 and PyTorch with oneDNN; use float32")
        linear: Callable[..., Linear] = _LINEAR[dtype]
        self.size, self.chunk, self.half = weights.size, _CHUNKS[dtype], dtype == "bfloat16"
        self.first, self.first_norm = weights.first, weights.first_norm
        self.convolutions: list[Convolution] = [
            _Int8Convolution(w) if dtype == "int8" and i < _INT8_CONVOLUTIONS else _FloatConvolution(w, self.half)
            for i, w in enumerate(weights.convolutions)
        ]
        self.feature_norm, self.project = weights.feature_norm, linear(*weights.project)
        self.pos, self.norm = _PositionalConvolution(*weights.pos), weights.norm
        self.bias = weights.bias.contiguous().to(torch.bfloat16 if self.half else torch.float32)
        self.layers = [
            _Layer(
                qkvg=linear(*w.qkvg),
                gate=w.gate,
                out=linear(*w.out),
                attention_norm=w.attention_norm,
                fc1=linear(*w.fc1, gelu=True),
                fc2=linear(*w.fc2, from_gelu=True),
                final_norm=w.final_norm,
            )
            for w in weights.layers
        ]

    def __call__(self, windows: Sequence[np.ndarray]) -> Tensor:
        """Mean over the frames of the input of every layer and the output of the last, float32 [B, L + 1, D].

        windows : the real samples of each window, float32 [S], 0 < S <= 160,000
        """
        means = [self._group(windows[first : first + _GROUP]) for first in range(0, len(windows), _GROUP)]
        return torch.cat(means)

    def _group(self, windows: Sequence[np.ndarray]) -> Tensor:
        frames = [frames_of(len(samples)) for samples in windows]
        x = [self._embedded(torch.tensor(samples), count) for samples, count in zip(windows, frames, strict=True)]

        def mean() -> Tensor:
            return torch.stack([rows[:count].mean(0) for rows, count in zip(x, frames, strict=True)])

        means = [mean()]
        for layer in self.layers:  # one layer for all windows: its 28 MB of weights are then still in a cache
            x = [self._transformed(rows, count, layer) for rows, count in zip(x, frames, strict=True)]
            means.append(mean())
        return torch.stack(means, dim=1)

    def _embedded(self, samples: Tensor, frames: int) -> Tensor:
        """Input of the first layer, [filled F, D]; what the rows beyond F hold is finite and of no account."""
        x = self.project(_normalised(self._features(samples, frames), self.feature_norm), frames).float()
        x[:frames] += self.pos(x[:frames])
        return _normalised(x, self.norm)

    def _transformed(self, x: Tensor, frames: int, layer: _Layer) -> Tensor:
        """Output of a layer, [filled F, D]."""
        width = x.shape[1]
        qkvg = layer.qkvg(x, frames)[:frames]
        q, k, v = qkvg[:, : 3 * width].view(1, frames, 3, self.size.heads, -1).permute(2, 0, 3, 1, 4)
        gate = gates(qkvg[:, 3 * width :].float(), layer.gate).t()[:, :, None]
        bias = gate.to(q.dtype) * self.bias[:, :frames, :frames]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        mixed = torch.zeros_like(x, dtype=q.dtype)
        mixed[:frames].view(frames, self.size.heads, -1).copy_(y[0].transpose(0, 1))
        x = _normalised(x + layer.out(mixed, frames), layer.attention_norm)
        return _normalised(x + layer.fc2(layer.fc1(x, frames), frames), layer.final_norm)

    def _features(self, samples: Tensor, frames: int) -> Tensor:
        """Output of the last convolution, [filled F, C], made in chunks small enough to stay in the cache."""
        filled = _filled(frames)
        weight, bias = (folded[0] for folded in normalised_first(samples[None], self.first, self.first_norm))
        samples = F.pad(samples, (0, max(0, (filled - 1) * HOP + FIELD - len(samples))))
        features = torch.empty(filled, self.size.channels)
        for first in range(0, filled, self.chunk):
            last = min(first + self.chunk, filled)
            heard = samples[first * HOP : (last - 1) * HOP + FIELD]
            x = torch.ops.aten.gelu_(torch.addmm(bias, heard.unfold(0, KERNELS[0], STRIDES[0]), weight))
            x = x.bfloat16() if self.half else x
            for convolution in self.convolutions:
                x = convolution(x)
            features[first:last] = x
        return features


def _filled(frames: int) -> int:
    """The number of rows in which these frames are computed."""
    return min(FRAMES, -(-frames // _FRAMES_FILLED) * _FRAMES_FILLED)


@dataclass(frozen=True)
class _Layer:
    qkvg: Linear
    gate: Tensor
    out: Linear
    attention_norm: Norm
    fc1: Linear
    fc2: Linear
    final_norm: Norm


def int8_is_fast() -> bool:
    """Whether oneDNN multiplies 8-bit integers faster than floats here: it may be held back by ONEDNN_MAX_CPU_ISA."""
    return torch.backends.mkldnn.is_available() and onednn_8_bit() != "none"


class _FloatConvolution:
    """A convolution of stride 2 and GELU, [R, C] -> [(R - kernel) // 2 + 1, C], without copying its input.

    Two neighbouring rows lie one after the other and are a row of a matrix of width 2 C; the third tap is the first
    half of the next such row.

    half : in bfloat16, which oneDNN packs
    """

    def __init__(self, weight: Tensor, half: bool = False) -> None:
        channels = len(weight)
        self.kernel = weight.shape[1] // channels
        weight = weight.bfloat16() if half else weight
        self.packed = torch.backends.mkldnn.is_available() and (half or not mkl_knows_processor())
        self.pair = self._laid_out(weight[:, : 2 * channels])
        self.third = self._laid_out(weight[:, 2 * channels :]) if self.kernel == 3 else None

    def _laid_out(self, weight: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return weight.t().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        rows, channels = (len(x) - self.kernel) // 2 + 1, x.shape[1]
        pairs = x.as_strided((rows, 2 * channels), (2 * channels, 1))
        if self.packed:
            y = torch.ops.mkldnn._linear_pointwise(pairs, self.pair, None, "none", [], "")
        else:
            y = pairs @ self.pair
        if self.third is not None:
            thirds = x.as_strided((rows, channels), (2 * channels, 1), 2 * channels)
            if self.packed:
                y = torch.ops.mkldnn._linear_pointwise.binary(thirds, y, self.third, None, "add")
            else:
                y.addmm_(thirds, self.third)
        return torch.ops.aten.gelu_(y)


class _Int8Linear:
    """x -> x W^T + b on 8-bit integers, then GELU where asked.

    The weight has a scale for each row. The input has one scale and offset, from the range of the rows that count.

    from_gelu : the input comes out of a GELU, so that its range is known on one side
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False, from_gelu: bool = False) -> None:
        scale = weight.abs().amax(1).clamp_min(1e-12) / _MOST_INT8[onednn_8_bit()]
        integers = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(integers, None)
        self.scale, self.zero = scale, torch.zeros(len(scale), dtype=torch.int32)
        self.bias, self.from_gelu = bias, from_gelu
        self.after: tuple[str, list, str] = ("gelu", [], "none") if gelu else ("none", [], "")

    def __call__(self, x: Tensor, counted: int) -> Tensor:
        return self.product(*quantised(x, self.from_gelu, counted))

    def product(self, x: Tensor, scale: float, offset: int) -> Tensor:
        """The same of an input that is 8-bit already."""
        weight = (self.weight, self.scale, self.zero, self.bias)
        return torch.ops.onednn.qlinear_pointwise(x, scale, offset, *weight, 1.0, 0, torch.float32, *self.after)


class _Int8Convolution:
    """A convolution of stride 2 and GELU on 8-bit integers; its overlapping windows are copied as bytes."""

    def __init__(self, weight: Tensor) -> None:
        self.linear = _Int8Linear(weight, None, gelu=True)
        self.kernel = weight.shape[1] // len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        rows, channels = (len(x) - self.kernel) // 2 + 1, x.shape[1]
        integers, scale, offset = quantised(x, True, len(x))
        windows = integers.as_strided((rows, self.kernel * channels), (2 * channels, 1)).contiguous()
        return self.linear.product(windows, scale, offset)


_LINEAR: dict[str, Callable[..., Linear]] = {
    "float32": partial(PackedLinear, rows=FRAMES),
    "bfloat16": partial(PackedLinear, rows=FRAMES, dtype=torch.bfloat16),
    "int8": _Int8Linear,
}


def quantised(x: Tensor, from_gelu: bool, counted: int) -> tuple[Tensor, float, int]:
    """x as bytes q, scale and offset with x ~ scale (q - offset), over the range of the first rows of x and zero.

    from_gelu : x comes out of a GELU: nothing lies below -0.17, which saves looking
    """
    if from_gelu:
        low, high = _LEAST_GELU, float(x[:counted].amax())
    else:
        low, high = (float(end) for end in x[:counted].aminmax())
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 1e-12) / 254  # and not 255: the offset is rounded
    offset = round(-low / scale)
    return torch.add(torch.tensor(offset + 0.5), x, alpha=1 / scale).to(torch.uint8), scale, offset


class _PositionalConvolution:
    """x + ... of the encoder: GELU of a grouped convolution of many taps, [F, D] -> [F, D], by the Fourier transform.

    Blocks of `taps` outputs from twice as many inputs (overlap-save): a product of [D / groups, D / groups] for each
    frequency and group instead of one for each tap.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        width, inner, self.taps = weight.shape
        self.groups = width // inner
        spectrum = torch.fft.rfft(weight, n=2 * self.taps).conj()  # conjugate: it correlates
        spectrum = spectrum.view(self.groups, inner, inner, -1).permute(3, 0, 2, 1)  # [frequency, group, in, out]
        self.spectrum = spectrum.flatten(0, 1).resolve_conj().contiguous()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        frames, width = x.shape
        taps, groups, blocks = self.taps, self.groups, ceil(frames / self.taps)
        before = taps // 2
        padded = F.pad(x.t(), (before, (blocks + 1) * taps - before - frames))
        spectrum = torch.fft.rfft(padded.unfold(1, 2 * taps, taps))  # [D, blocks, frequencies]
        spectrum = spectrum.view(groups, -1, blocks, taps + 1).permute(3, 0, 2, 1).reshape(-1, blocks, width // groups)
        spectrum = torch.bmm(spectrum, self.spectrum).view(taps + 1, groups, blocks, -1).permute(1, 3, 2, 0)
        y = torch.fft.irfft(spectrum, n=2 * taps)[..., :taps].reshape(width, -1)[:, :frames]
        return torch.ops.aten.gelu_(y.t() + self.bias)


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, norm[0].shape, *norm, NORM_EPS)
