"""From the encoder's layers to ratings: for each axis a weighted sum of layers and a small perceptron.

Shape letters: B windows, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.reward.audiobox.architecture import NORM_EPS
from fastsmart.reward.settings import AUDIOBOX_AXES


class Heads:
    """The four axes, float32.

    state     : tensors as published
    target    : mean and standard deviation of the raters, by axis
    normalize : whether an embedding is divided by its length
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        target: Mapping[str, Mapping[str, float]],
        normalize: bool,
        device: torch.device,
    ) -> None:
        self.normalize = normalize
        layer_weights = [state[f"layer_weights.{axis}"].float().softmax(0) for axis in AUDIOBOX_AXES]
        self.layer_weights = torch.stack(layer_weights).to(device)
        self.perceptrons = [_perceptron(state, f"proj_layer.{axis}.", device) for axis in AUDIOBOX_AXES]
        self.together = stacked(self.perceptrons) if device.type == "cuda" else []
        self.mean, self.std = (
            torch.tensor([target[axis][moment] for axis in AUDIOBOX_AXES], device=device) for moment in ("mean", "std")
        )

    def __call__(self, means: Tensor) -> Tensor:
        """Ratings [B, 4] from the mean over time of every layer, float32 [B, L + 1, D].

        The mean over time of a weighted sum of layers is the weighted sum of their means, so no sum of layers is made.
        """
        embeddings = torch.einsum("bld,al->abd", means, self.layer_weights)
        if self.normalize:
            embeddings = F.normalize(embeddings, dim=-1)
        if self.together:
            rated = _rate_together(embeddings, self.together)
        else:
            each = [self._rate(x, modules)[:, 0] for x, modules in zip(embeddings, self.perceptrons, strict=True)]
            rated = torch.stack(each, dim=1)
        return rated * self.std + self.mean

    @staticmethod
    def _rate(x: Tensor, modules: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Linear layers, each but the last followed by GELU, with a layer norm between where there is one."""
        for i, (weight, bias) in enumerate(modules):
            if weight.dim() == 1:
                x = F.gelu(F.layer_norm(x, weight.shape, weight, bias, NORM_EPS))
                continue
            x = F.linear(x, weight, bias)
            if i + 1 < len(modules) and modules[i + 1][0].dim() == 2:
                x = F.gelu(x)
        return x


def _perceptron(state: Mapping[str, Tensor], prefix: str, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of the modules of one axis in their order."""
    numbers = sorted(int(key.split(".")[2]) for key in state if key.startswith(prefix) and key.endswith("weight"))
    names, single = [f"{prefix}{number}" for number in numbers], torch.float32
    return [(state[f"{n}.weight"].to(device, single), state[f"{n}.bias"].to(device, single)) for n in names]


def stacked(perceptrons: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Each module of all axes as one: weights [4, out, in] of linears and [4, D] of norms, biases [4, 1, D].

    A GPU then has a quarter of the kernels to launch. All axes have the same modules, see `head_shapes`.
    """
    stacked = []
    for axes in zip(*perceptrons, strict=True):
        weight, bias = (torch.stack(tensors) for tensors in zip(*axes, strict=True))
        stacked.append((weight, bias[:, None]))
    return stacked


def _rate_together(x: Tensor, modules: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Ratings of all axes at once, each as `Heads._rate` gives it: [B, 4] from [4, B, D]."""
    for i, (weight, bias) in enumerate(modules):
        if weight.dim() == 2:
            x = F.gelu(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * weight[:, None] + bias)
            continue
        x = torch.baddbmm(bias, x, weight.mT)
        if i + 1 < len(modules) and modules[i + 1][0].dim() == 3:
            x = F.gelu(x)
    return x[:, :, 0].t()
