"""The encoder on a GPU (and, as its twin, in 16 bit on a CPU): whole batches, padding masked, one CUDA graph a size.

Shape letters: B windows, S samples, F frames, C channels, D width, H heads, E size of a head, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.attention import KEYS, gated_attention
from fastsmart.kernels.convolution import convolution_gelu
from fastsmart.kernels.norm import norm_of_sum
from fastsmart.kernels.positional import PositionalConvolution
from fastsmart.machine.cuda_graph import GraphCapture
from fastsmart.reward.audiobox.architecture import FRAMES, NORM_EPS, STRIDES, WINDOW, frames_of
from fastsmart.reward.audiobox.encoder import EncoderWeights, LayerWeights, Norm, normalised_first


class BatchEncoder:
    """The encoder in 16-bit or float32 products, its residual stream and norms in float32.

    dtype      : of the products
    batch_size : windows of one forward pass
    heads      : what makes ratings of the means, recorded with them; None = only means are asked for
    """

    def __init__(
        self,
        weights: EncoderWeights,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        heads: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.device, self.dtype, self.batch_size, self.heads = device, dtype, batch_size, heads
        self.size = weights.size

        def here(pair: tuple[Tensor, Tensor], to: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            return pair[0].to(device, to), pair[1].to(device, to)

        single = torch.float32
        self.first, self.first_norm = weights.first.to(device), here(weights.first_norm, single)
        channels = weights.size.channels
        self.convolutions = [  # as pictures of height 1, channels last: no copy between them
            w.view(channels, 1, -1, channels).permute(0, 3, 1, 2).to(device, dtype) for w in weights.convolutions
        ]
        self.feature_norm, self.project = here(weights.feature_norm, single), here(weights.project)
        self.position, self.norm = PositionalConvolution(*here(weights.pos)), here(weights.norm, single)
        # a GPU reads a row of it as vectors; float16 also beside bfloat16 products, of which it holds more digits
        self.bias = key_blocks(weights.bias).to(device, single if dtype == single else torch.float16)
        self.layers = [
            LayerWeights(
                qkvg=here(whole_blocks(w.qkvg)),
                gate=w.gate.to(device),
                out=here(w.out),
                attention_norm=here(w.attention_norm, single),
                fc1=here(w.fc1),
                fc2=here(w.fc2),
                final_norm=here(w.final_norm, single),
            )
            for w in weights.layers
        ]
        self.capture, self.replays = GraphCapture(), device.type == "cuda"
        self.graphs: dict[int, _Graph] = {}

    def __call__(self, windows: Sequence[np.ndarray | Tensor]) -> Tensor:
        """Mean over the frames of the input of every layer and the output of the last, float32 [B, L + 1, D].

        windows : the real samples of each window, float32 [S], 0 < S <= 160,000, all arrays or all on this device
        """
        if self.replays:
            return torch.cat([self._recorded(batch)[0] for batch in self._batches(windows)])
        return torch.cat([self.forward(*_padded(batch, 0)) for batch in self._batches(windows)])

    def rate(self, windows: Sequence[np.ndarray | Tensor]) -> Tensor:
        """Rate the means of the same windows by the heads."""
        assert self.heads is not None
        if self.replays:
            return torch.cat([self._recorded(batch)[1] for batch in self._batches(windows)])
        return self.heads(self(windows))

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the graph of every batch size, on a GPU, in the thread that calls this.

        Call it in a thread that lives as long as the encoder: cuDNN's plans, whose kernels the graphs replay, belong to
        the thread that made them.
        """
        if self.replays:
            for rows in graph_sizes(self.batch_size):
                self._graph(rows)

    def _batches(self, windows: Sequence[np.ndarray | Tensor]) -> Iterator[Sequence[np.ndarray | Tensor]]:
        for first in range(0, len(windows), self.batch_size):
            yield windows[first : first + self.batch_size]

    def _recorded(self, windows: Sequence[np.ndarray | Tensor]) -> tuple[Tensor, Tensor]:
        """A batch through the graph of the next larger size; copies overlap what the GPU still computes."""
        rows = min(size for size in graph_sizes(self.batch_size) if size >= len(windows))
        samples, frames = (t.to(self.device, non_blocking=True) for t in _padded(windows, rows))
        means, rated = self._graph(rows)(samples, frames)
        return means[: len(windows)], rated[: len(windows)]

    def _graph(self, rows: int) -> _Graph:
        if rows not in self.graphs:
            self.graphs[rows] = _Graph(self, rows)
        return self.graphs[rows]

    def forward(self, samples: Tensor, frames: Tensor) -> Tensor:
        """The same of samples [B, 160000] float32, zero after their real part, with `frames` [B] int32 that count."""
        batch, width, heads = len(samples), self.size.width, self.size.heads
        features = norm_of_sum(self._features(samples), None, *self.feature_norm, NORM_EPS, frames, self.dtype)[1]
        y = F.linear(features, *self.project)
        x, rounded, mean = self._sum_normalised(y, self.position(y, frames), self.norm, frames)
        means = [mean.sum(1)]
        for layer in self.layers:
            qkvg = F.linear(rounded, *layer.qkvg)
            q, k, v = qkvg[..., : 3 * width].view(batch, FRAMES, 3, heads, -1).permute(2, 0, 3, 1, 4)
            raw = qkvg[..., 3 * width : 3 * width + 2 * heads]
            y = gated_attention(q, k, v, raw, layer.gate, self.bias, frames).transpose(1, 2).flatten(2)
            x, rounded, _ = self._sum_normalised(x, F.linear(y, *layer.out), layer.attention_norm, frames)
            y = F.linear(self._linear_gelu(rounded, *layer.fc1), *layer.fc2)
            x, rounded, mean = self._sum_normalised(x, y, layer.final_norm, frames)
            means.append(mean.sum(1))
        return torch.stack(means, dim=1)

    def _sum_normalised(self, x: Tensor, y: Tensor, norm: Norm, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return norm_of_sum(x, y, *norm, NORM_EPS, frames, self.dtype)

    def _linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """GELU(x weight^T + bias); on a GPU in 16 bit as one product, GELU by its approximation with tanh."""
        if x.device.type == "cuda" and x.dtype != torch.float32:
            return torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).view(*x.shape[:2], -1)
        return F.gelu(F.linear(x, weight, bias))

    def _features(self, samples: Tensor) -> Tensor:
        """Output of the last convolution, [B, F, C]."""
        weight, bias = normalised_first(samples, self.first, self.first_norm)
        x = convolution_gelu(samples, weight, bias, STRIDES[0], self.dtype)
        x = x[:, None].permute(0, 3, 1, 2)  # [B, C, 1, F], channels last in memory
        for kernel in self.convolutions:
            x = F.gelu(F.conv2d(x, kernel, stride=(1, 2)))
        return x[:, :, 0].transpose(1, 2)


class _Graph:
    """One forward pass of a fixed batch size, recorded once and replayed."""

    def __init__(self, encoder: BatchEncoder, rows: int) -> None:
        self.samples = torch.zeros(rows, WINDOW, device=encoder.device)
        self.frames = torch.ones(rows, dtype=torch.int32, device=encoder.device)
        self.heads = encoder.heads or (lambda means: means)

        def job() -> tuple[Tensor, Tensor]:
            means = encoder.forward(self.samples, self.frames)
            return means, self.heads(means)

        self.graph, self.results = encoder.capture(job)

    def __call__(self, samples: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        self.samples.copy_(samples)
        self.frames.copy_(frames)
        self.graph.replay()
        means, rated = self.results
        return means.clone(), rated.clone()


def whole_blocks(linear: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A linear with outputs of zero added up to a multiple of 16.

    Every row of its result then begins at a multiple of 16 numbers, so that the attention kernel, which reads slices of
    it, may load eight numbers at once: 2,336 instead of 2,328 for Audiobox.
    """
    weight, bias = linear
    more = -len(weight) % 16
    return F.pad(weight, (0, 0, 0, more)), F.pad(bias, (0, more))


def graph_sizes(batch_size: int) -> list[int]:
    """Windows of the batches that are recorded, largest first: the batch size, and the powers of two below it."""
    return [batch_size, *(1 << power for power in reversed(range((batch_size - 1).bit_length())))]


def _padded(windows: Sequence[np.ndarray | Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Samples [B, 160000], zero-padded, where the windows are, and frames that count [B]; at least `rows` of them.

    What is on the host is page-locked where there is a GPU that it can be copied to.
    """
    rows, pin = max(rows, len(windows)), torch.cuda.is_available()
    if isinstance(windows[0], Tensor):
        samples = torch.zeros(rows, WINDOW, device=windows[0].device)
    else:
        samples = torch.zeros(rows, WINDOW, pin_memory=pin)
    frames = torch.ones(rows, dtype=torch.int32, pin_memory=pin)
    for i, window in enumerate(windows):
        samples[i, : len(window)] = torch.as_tensor(window)
        frames[i] = frames_of(len(window))
    return samples, frames


def key_blocks(bias: Tensor) -> Tensor:
    """The bias [H, F, F] with zeros after each row up to whole blocks of the attention kernel's keys, 512 for 499."""
    return F.pad(bias, (0, -bias.shape[2] % KEYS))
