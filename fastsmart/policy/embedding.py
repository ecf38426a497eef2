"""An embedding that costs nothing where there is no storage for it yet."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws no numbers on the meta device, where PyTorch would import its compiler to draw none:
    two seconds of every command that loads a policy."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
