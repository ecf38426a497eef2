"""The encoder of music: segments of at most 512 patches in, one vector each out.

The embedding of a patch, a linear layer over 64 x 128 one-hot numbers, is the sum of 64 rows of its weight. Segments
are as long as their music: upstream fills them up to 512 patches, which changes nothing and is fourteen times the work
for a median clip of 10 s.

Shape letters: S segments, P patches of a segment, R rows computed for them, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.machine.packed_linear import PackedLinear
from fastsmart.reward.clamp3.architecture import CHARACTERS, HEAD, NORM_EPS
from fastsmart.reward.clamp3.mtf import PATCH
from fastsmart.reward.clamp3.weights import Weights

Norm = tuple[Tensor, Tensor]
Linear = Callable[[Tensor], Tensor]
_ROWS_FILLED = 16  # rows of a segment are filled up to a multiple on a CPU: oneDNN compiles a product for each number
_USUAL_ROWS = 64  # of a clip of 10 s
_PADDED = 32  # on a GPU: segments of a batch are filled up to a multiple of it
_BATCH_ROWS = 16_384  # rows of a batch on a GPU


@dataclass(frozen=True)
class Segment:
    """Patches that are read at once, uint8 [P, 64], of whose hidden states the last `counted` are averaged."""

    patches: np.ndarray
    counted: int


class Encoder(Protocol):
    """Vectors of segments, float32 [S, D] on the encoder's device."""

    def __call__(self, segments: Sequence[Segment]) -> Tensor: ...


def make_encoder(weights: Weights, device: str | torch.device) -> Encoder:
    """The encoder for a device: in float32 on a CPU, in float16 on a GPU."""
    device = torch.device(device)
    return CpuEncoder(weights) if device.type == "cpu" else BatchEncoder(weights, device, torch.float16)


class CpuEncoder:
    """Encoder in float32, segment by segment: a vector does not depend on its neighbours, to the last bit.

    All segments go through a layer before the next is touched: its 28 MB of weights are then still in a cache.
    """

    def __init__(self, weights: Weights) -> None:
        self.parts = _Parts(weights, torch.device("cpu"), torch.float32, partial(PackedLinear, rows=_USUAL_ROWS))

    @torch.inference_mode()
    def __call__(self, segments: Sequence[Segment]) -> Tensor:
        if not segments:
            return torch.zeros(0, self.parts.out)
        x = [self._embedded(segment.patches) for segment in segments]
        for layer in self.parts.layers:
            x = [self._transformed(rows, len(s.patches), layer) for rows, s in zip(x, segments, strict=True)]
        means = [
            rows[len(s.patches) - s.counted : len(s.patches)].mean(0, keepdim=True)
            for rows, s in zip(x, segments, strict=True)
        ]
        return torch.cat([self.parts.projected(mean) for mean in means])

    def _embedded(self, patches: np.ndarray) -> Tensor:
        """Input of the first layer, [R, D]; the rows beyond the patches are finite and of no account."""
        filled = np.zeros((-(-len(patches) // _ROWS_FILLED) * _ROWS_FILLED, PATCH), np.uint8)
        filled[: len(patches)] = patches
        return self.parts.embedded(torch.from_numpy(filled))

    def _transformed(self, x: Tensor, patches: int, layer: _Layer) -> Tensor:
        """Output of a layer, [R, D]."""
        q, k, v = layer.qkv(x)[:patches].view(1, patches, 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        mixed = torch.zeros_like(x)
        y = F.scaled_dot_product_attention(q, k, v)
        mixed[:patches].view(patches, -1, HEAD).copy_(y[0].transpose(0, 1))
        return layer.after_attention(x, mixed)


class BatchEncoder:
    """Batches of segments of like length, filled up and masked, in the arithmetic asked for; for a GPU."""

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self.parts = _Parts(weights, device, dtype, lambda weight, bias, gelu=False: _Plain(weight, bias, gelu))

    @torch.inference_mode()
    def __call__(self, segments: Sequence[Segment]) -> Tensor:
        device = self.parts.table.device
        vectors = torch.zeros(len(segments), self.parts.out, device=device)
        for chosen in _batches([len(segment.patches) for segment in segments]):
            batch = [segments[i] for i in chosen]
            vectors[torch.tensor(chosen, device=device)] = self.parts.projected(self._means(batch))
        return vectors

    def _means(self, batch: Sequence[Segment]) -> Tensor:
        """Means of hidden states, float32 [S, D]."""
        lengths = torch.tensor([len(segment.patches) for segment in batch])
        counted = torch.tensor([segment.counted for segment in batch])
        rows = -(-int(lengths.max()) // _PADDED) * _PADDED
        filled = np.zeros((len(batch), rows, PATCH), np.uint8)
        for row, segment in zip(filled, batch, strict=True):
            row[: len(segment.patches)] = segment.patches
        device, at = self.parts.table.device, torch.arange(rows)
        is_real = (at < lengths[:, None]).to(device)
        is_counted = ((at < lengths[:, None]) & (at >= (lengths - counted)[:, None])).to(device)
        x = self.parts.embedded(torch.from_numpy(filled).to(device))
        for layer in self.parts.layers:
            q, k, v = layer.qkv(x).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=is_real[:, None, None, :])
            x = layer.after_attention(x, y.transpose(1, 2).flatten(2))
        return (x.float() * is_counted[..., None]).sum(1) / is_counted.sum(1, keepdim=True)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of the segments of each batch: of like length, together of at most `_BATCH_ROWS` rows."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * (lengths[i] + _PADDED) > _BATCH_ROWS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class _Parts:
    """The weights as the encoders use them.

    table : float32 [64 x 128, D], embedding of each character at each place of a patch
    """

    def __init__(
        self, weights: Weights, device: torch.device, dtype: torch.dtype, linear: Callable[..., Linear]
    ) -> None:
        music = f"{weights.kind.music}."
        state = {name.removeprefix(music): t for name, t in weights.state.items() if name.startswith(music)}

        def moved(name: str) -> tuple[Tensor, Tensor]:
            return tuple(state[f"{name}.{part}"].to(device, dtype).contiguous() for part in ("weight", "bias"))  # type: ignore[return-value]

        embeddings = "base.embeddings"
        self.dtype, self.out = dtype, weights.size.out
        self.table = state["patch_embedding.weight"].t().contiguous().to(device)
        self.starts = torch.arange(PATCH, device=device) * CHARACTERS
        added = state["patch_embedding.bias"] + state[f"{embeddings}.token_type_embeddings.weight"][0]
        self.positions = (state[f"{embeddings}.position_embeddings.weight"] + added).to(device)
        self.norm = (
            state[f"{embeddings}.LayerNorm.weight"].to(device),
            state[f"{embeddings}.LayerNorm.bias"].to(device),
        )
        self.layers = [_Layer.of(f"base.encoder.layer.{i}", moved, linear) for i in range(weights.size.layers)]
        self.projection: Norm | None = None
        if weights.kind.music_projection:
            weight, bias = (weights.state[f"{weights.kind.music_projection}.{part}"] for part in ("weight", "bias"))
            self.projection = weight.to(device), bias.to(device)

    def embedded(self, patches: Tensor) -> Tensor:
        """Input of the first layer, [..., R, D], of patches uint8 [..., R, 64]; added up in float32."""
        rows = patches.flatten(0, -2).long() + self.starts
        x = F.embedding_bag(rows, self.table, mode="sum").unflatten(0, patches.shape[:-1])
        x = x + self.positions[: patches.shape[-2]]
        return F.layer_norm(x, self.norm[0].shape, *self.norm, NORM_EPS).to(self.dtype)

    def projected(self, means: Tensor) -> Tensor:
        """Vectors float32 [S, D] of mean hidden states float32 [S, D]."""
        return F.linear(means, *self.projection) if self.projection else means


@dataclass(frozen=True)
class _Layer:
    qkv: Linear
    out: Linear
    attention_norm: Norm
    fc1: Linear
    fc2: Linear
    final_norm: Norm

    @staticmethod
    def of(name: str, moved: Callable[[str], tuple[Tensor, Tensor]], linear: Callable[..., Linear]) -> _Layer:
        qkv = [moved(f"{name}.attention.self.{part}") for part in ("query", "key", "value")]
        return _Layer(
            qkv=linear(torch.cat([weight for weight, _ in qkv]), torch.cat([bias for _, bias in qkv])),
            out=linear(*moved(f"{name}.attention.output.dense")),
            attention_norm=moved(f"{name}.attention.output.LayerNorm"),
            fc1=linear(*moved(f"{name}.intermediate.dense"), gelu=True),
            fc2=linear(*moved(f"{name}.output.dense")),
            final_norm=moved(f"{name}.output.LayerNorm"),
        )

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output of the layer, [..., R, D], of its input and the output of attention."""
        x = _normalised(x + self.out(mixed), self.attention_norm)
        return _normalised(x + self.fc2(self.fc1(x)), self.final_norm)


class _Plain:
    """x -> x W^T + b, then GELU where asked."""

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool) -> None:
        self.weight, self.bias, self.gelu = weight, bias, gelu

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, norm[0].shape, *norm, NORM_EPS)
