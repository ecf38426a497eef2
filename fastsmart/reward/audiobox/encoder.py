"""The encoder's weights as the two forwards use them, and what both do in the same way.

Shape letters: B windows, S samples, F frames, C channels, D width, H heads, E size of a head, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsmart.kernels.moments import window_moments
from fastsmart.reward.audiobox.architecture import (
    FRAMES,
    KERNELS,
    NORM_EPS,
    STRIDES,
    WINDOW,
    Size,
    relative_bias,
    size_of,
)

Norm = tuple[Tensor, Tensor]  # weight and bias of a normalisation


@dataclass(frozen=True)
class LayerWeights:
    """One layer of the encoder.

    qkvg : [3 D + 2 H, D] and bias: queries, keys, values, and the two gates of each head, which upstream computes by a
           linear of 8 outputs and two sums of 4 from the same input
    gate : [H], upstream's grep_a
    """

    qkvg: tuple[Tensor, Tensor]
    gate: Tensor
    out: tuple[Tensor, Tensor]
    attention_norm: Norm
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    final_norm: Norm


@dataclass(frozen=True)
class EncoderWeights:
    """The encoder, float32.

    first : [10, C], the first convolution, which has no bias; the others [C, kernel C], tap by tap
    pos   : [D, D / groups, taps] and bias, its weight norm multiplied out
    bias  : [H, F, F], relative position bias of a whole window; its upper left corner is that of a shorter one
    """

    size: Size
    first: Tensor
    first_norm: Norm
    convolutions: list[Tensor]
    feature_norm: Norm
    project: tuple[Tensor, Tensor]
    pos: tuple[Tensor, Tensor]
    norm: Norm
    bias: Tensor
    layers: list[LayerWeights]


def encoder_weights(state: Mapping[str, Tensor]) -> EncoderWeights:
    """Gather the encoder's weights from a state dict as published."""
    size = size_of(state, 0)

    def get(name: str) -> Tensor:
        return state[f"wavlm_model.{name}"].float()

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return get(f"{name}.weight"), get(f"{name}.bias")

    convolutions = [get(f"feature_extractor.conv_layers.{i}.0.weight") for i in range(len(KERNELS))]
    direction = get("encoder.pos_conv.0.weight_v")  # PyTorch's weight_norm over all but the taps
    pos = get("encoder.pos_conv.0.weight_g") * direction / direction.norm(dim=(0, 1), keepdim=True)
    return EncoderWeights(
        size=size,
        first=convolutions[0][:, 0].t().contiguous(),
        first_norm=pair("feature_extractor.conv_layers.0.2"),
        convolutions=[w.transpose(1, 2).flatten(1).contiguous() for w in convolutions[1:]],
        feature_norm=pair("layer_norm"),
        project=pair("post_extract_proj"),
        pos=(pos, get("encoder.pos_conv.0.bias")),
        norm=pair("encoder.layer_norm"),
        bias=relative_bias(get("encoder.layers.0.self_attn.relative_attention_bias.weight"), FRAMES),
        layers=[_layer(size, f"encoder.layers.{i}", get, pair) for i in range(size.layers)],
    )


def _layer(
    size: Size, name: str, get: Callable[[str], Tensor], pair: Callable[[str], tuple[Tensor, Tensor]]
) -> LayerWeights:
    projections = [pair(f"{name}.self_attn.{p}_proj") for p in "qkv"]
    weight, bias = pair(f"{name}.self_attn.grep_linear")
    # the gates of head h see only its own slice of the input: a block-diagonal matrix of summed rows
    weight, bias = weight.view(2, 4, -1).sum(1), bias.view(2, 4).sum(1)
    gates = torch.block_diag(*[weight] * size.heads)
    return LayerWeights(
        qkvg=(
            torch.cat([w for w, _ in projections] + [gates]),
            torch.cat([b for _, b in projections] + [bias] * size.heads),
        ),
        gate=get(f"{name}.self_attn.grep_a").flatten(),
        out=pair(f"{name}.self_attn.out_proj"),
        attention_norm=pair(f"{name}.self_attn_layer_norm"),
        fc1=pair(f"{name}.fc1"),
        fc2=pair(f"{name}.fc2"),
        final_norm=pair(f"{name}.final_layer_norm"),
    )


def normalised_first(samples: Tensor, first: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The first convolution and the group norm after it as one: weight [B, 10, C] and bias [B, C] for these windows.

    With one group a channel the norm needs mean and variance over time of w^T x for each filter w, where x are the
    windows of 10 samples: w^T m and w^T K w with the mean m and covariance K [10, 10] of x. So they cost one pass over
    the samples instead of C. In float64, since the variance is a difference.

    samples : float32 [B, S], S <= 160,000; the silence up to a whole window counts and costs nothing
    first   : [10, C]
    norm    : weight and bias [C]
    """
    kernel, stride = KERNELS[0], STRIDES[0]
    count = (WINDOW - kernel) // stride + 1
    total, products = window_moments(samples, kernel, stride, count)
    mean = total / count  # [B, 10]
    second = products / count - mean[:, :, None] * mean[:, None]
    first = first.double()
    variance = torch.einsum("kc,bkl,lc->bc", first, second, first).clamp_min(0.0)
    scale = norm[0].double() * (variance + NORM_EPS).rsqrt()
    bias = norm[1].double() - (mean @ first) * scale
    return (first * scale[:, None]).float(), bias.float()
