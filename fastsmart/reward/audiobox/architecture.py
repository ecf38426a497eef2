"""The network of Audiobox Aesthetics: its sizes, the names and shapes of its tensors, and what follows from them.

A WavLM encoder (Chen et al. 2021, arXiv 2110.13900) of 7 convolutions and 12 layers; on top, for each of four axes, one
weight for every layer and a small perceptron (Tjandra et al. 2025, arXiv 2502.05139).

Shape letters: C channels of a convolution, D width, H heads, E size of a head, L layers, F frames, S samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsmart.reward.settings import AUDIOBOX_AXES

SAMPLE_RATE = 16_000
WINDOW = 10 * SAMPLE_RATE  # samples
KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
HOP = math.prod(STRIDES)  # samples from one frame to the next
FIELD = 400  # samples that a frame sees
FRAMES = (WINDOW - FIELD) // HOP + 1  # of a window: 499
MAX_DISTANCE = 800  # frames from which on all distances share a bucket
NORM_EPS = 1e-5


@dataclass(frozen=True)
class Size:
    """Sizes that the shapes of the tensors leave open; the defaults are the published encoder.

    head_layers : linear layers of each axis' perceptron; the package leaves it to the checkpoint
    """

    channels: int = 512
    width: int = 768
    ffn: int = 3072
    heads: int = 12
    layers: int = 12
    pos_taps: int = 128
    pos_groups: int = 16
    buckets: int = 320
    head_layers: int = 5


def encoder_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the encoder by its name in a checkpoint."""
    c, d = size.channels, size.width
    shapes: dict[str, tuple[int, ...]] = {}
    for i, kernel in enumerate(KERNELS):
        shapes[f"feature_extractor.conv_layers.{i}.0.weight"] = (c, c if i else 1, kernel)
    shapes |= _pair("feature_extractor.conv_layers.0.2", c) | _pair("layer_norm", c)
    shapes |= _pair("post_extract_proj", d, c) | {"mask_emb": (d,)}
    shapes |= {
        "encoder.pos_conv.0.bias": (d,),
        "encoder.pos_conv.0.weight_g": (1, 1, size.pos_taps),
        "encoder.pos_conv.0.weight_v": (d, d // size.pos_groups, size.pos_taps),
    }
    shapes |= _pair("encoder.layer_norm", d)
    shapes["encoder.layers.0.self_attn.relative_attention_bias.weight"] = (size.buckets, size.heads)
    for i in range(size.layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _pair(f"{layer}.self_attn.{name}", d, d)
        shapes |= _pair(f"{layer}.self_attn.grep_linear", 8, d // size.heads)
        shapes[f"{layer}.self_attn.grep_a"] = (1, size.heads, 1, 1)
        shapes |= _pair(f"{layer}.self_attn_layer_norm", d) | _pair(f"{layer}.final_layer_norm", d)
        shapes |= _pair(f"{layer}.fc1", size.ffn, d) | _pair(f"{layer}.fc2", d, size.ffn)
    return {f"wavlm_model.{name}": shape for name, shape in shapes.items()}


def head_shapes(size: Size, layer_norm: bool, dropout: bool) -> dict[str, tuple[int, ...]]:
    """The same of the four perceptrons and the weights of the layers.

    The modules are numbered as in upstream's Sequential: linear, then layer norm, GELU and dropout where it has them.
    """
    stride = 2 + layer_norm + dropout
    shapes: dict[str, tuple[int, ...]] = {}
    for axis in AUDIOBOX_AXES:
        for i in range(size.head_layers):
            last = i == size.head_layers - 1
            shapes |= _pair(f"proj_layer.{axis}.{i * stride}", 1 if last else size.width, size.width)
            if layer_norm and not last:
                shapes |= _pair(f"proj_layer.{axis}.{i * stride + 1}", size.width)
        shapes[f"layer_weights.{axis}"] = (size.layers + 1,)
    return shapes


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def size_of(state: Mapping[str, Tensor], head_layers: int) -> Size:
    """The sizes that a state dict has; raises KeyError or IndexError where a tensor that tells them is missing."""
    encoder = "wavlm_model.encoder"
    width, channels = state["wavlm_model.post_extract_proj.weight"].shape
    taps = state[f"{encoder}.pos_conv.0.weight_v"]
    buckets, heads = state[f"{encoder}.layers.0.self_attn.relative_attention_bias.weight"].shape
    numbers = [int(m[1]) for key in state if (m := re.match(rf"{re.escape(encoder)}\.layers\.(\d+)\.", key))]
    return Size(
        channels=channels,
        width=width,
        ffn=state[f"{encoder}.layers.0.fc1.weight"].shape[0],
        heads=heads,
        layers=max(numbers) + 1,
        pos_taps=taps.shape[2],
        pos_groups=width // taps.shape[1],
        buckets=buckets,
        head_layers=head_layers,
    )


def frames_of(samples: int) -> int:
    """Frames of a window that hold anything of its first `samples` samples; upstream masks the others.

    Its mask of S samples is cut into F runs of S // F and a frame counts when any sample of its run is real.
    """
    return min(-(-samples // (WINDOW // FRAMES)), FRAMES)


def relative_bias(table: Tensor, frames: int) -> Tensor:
    """Bias [H, F, F] of key j for query i, from a table [buckets, H] over T5's buckets of j - i (arXiv 1910.10683).

    Half of the buckets are for keys after the query; in each half the near distances have one bucket each and the
    far ones share logarithmically wider ones up to `MAX_DISTANCE`.
    """
    distance = torch.arange(1 - frames, frames)
    half = table.shape[0] // 2
    exact = half // 2
    reach, away = half - exact, distance.abs()
    far = exact + (torch.log(away.float() / exact) / math.log(MAX_DISTANCE / exact) * reach).long()
    bucket = torch.where(away < exact, away, far.clamp(max=half - 1)) + (distance > 0) * half
    by_distance = table.t()[:, bucket.to(table.device)]  # [H, 2 F - 1]
    return by_distance.unfold(1, frames, 1).flip(1)
