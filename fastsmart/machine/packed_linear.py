"""A linear layer on a CPU, with its weight packed once by oneDNN. Shape letters: R rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.machine.hardware import onednn_may_use_bfloat16


def bfloat16_is_fast() -> bool:
    """Whether oneDNN multiplies 16-bit floats faster than float32 here, by AVX-512 BF16 or AMX: it may be held back by
    ONEDNN_MAX_CPU_ISA."""
    if not torch.backends.mkldnn.is_available() or not onednn_may_use_bfloat16():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class PackedLinear:
    """x -> x W^T + b, then GELU where asked; the weight packed once by oneDNN where there is one.

    oneDNN compiles a product for every number of rows it meets and keeps it, so fill rows up to multiples.

    rows      : that a product usually has, for which the weight is packed
    dtype     : of the product and of what it gives, whatever x has
    from_gelu : of no account here; an 8-bit product makes use of it
    tanh      : GELU by its approximation with tanh
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        gelu: bool = False,
        from_gelu: bool = False,
        *,
        rows: int,
        dtype: torch.dtype = torch.float32,
        tanh: bool = False,
    ) -> None:
        weight, bias = weight.to(dtype), bias.to(dtype)
        self.packed = torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight
        self.bias, self.gelu, self.approximate = bias, gelu, "tanh" if tanh else "none"

    def __call__(self, x: Tensor, counted: int = 0) -> Tensor:
        """Apply to x [R, in]; `counted`, the rows that count, is of no account here either."""
        x = x.to(self.bias.dtype)
        if self.packed:
            after: tuple[str, list, str] = ("gelu", [], self.approximate) if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *after)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate=self.approximate) if self.gelu else y
