"""NotaGen for sampling on a CPU in 16 bits: products packed once by oneDNN, GELU in their pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsmart.machine.packed_linear import PackedLinear, bfloat16_is_fast
from fastsmart.notagen.model import Block, Conv1D, NotaGen


def sampling_dtype(device: str) -> torch.dtype:
    """Give the dtype in which NotaGen is sampled on this device: bfloat16 on a GPU and where a CPU is fast at it."""
    return torch.bfloat16 if device != "cpu" or bfloat16_is_fast() else torch.float32


def packed(model: NotaGen, rows: int) -> NotaGen:
    """Give the network with the weights of its blocks packed for so many rows, or itself where that is no gain.

    Embeddings, norms and positions are those of `model`; what is packed does not follow when its weights change.
    """
    weight = model.patch_level_decoder.patch_embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not bfloat16_is_fast():
        return model
    with torch.device("meta"):
        lean = NotaGen(model.size)
    lean.patch_level_decoder.patch_embedding = model.patch_level_decoder.patch_embedding
    levels = [(each.patch_level_decoder.base, each.char_level_decoder.network) for each in (lean, model)]
    for ours, theirs in zip(*levels, strict=True):
        ours.wte, ours.wpe, ours.ln_f = theirs.wte, theirs.wpe, theirs.ln_f
        ours.h = nn.ModuleList(PackedBlock(block, rows) for block in theirs.blocks)
    return lean.eval()


class PackedBlock(Block):
    """A block whose products are packed for so many rows."""

    def __init__(self, block: Block, rows: int) -> None:
        nn.Module.__init__(self)
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.into_heads = _product(block.attn["c_attn"], rows)
        self.out_of_heads = _product(block.attn["c_proj"], rows)
        self.into_units = _product(block.mlp["c_fc"], rows, gelu=True)
        self.out_of_units = _product(block.mlp["c_proj"], rows)

    def project(self, x: Tensor) -> Tensor:
        return self.into_heads(self.ln_1(x))

    def rest(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.out_of_heads(y)
        return x + self.out_of_units(self.into_units(self.ln_2(x)))


def _product(affine: nn.Module, rows: int, gelu: bool = False) -> PackedLinear:
    assert isinstance(affine, Conv1D)
    weight, bias = affine.weight.detach(), affine.bias.detach()
    return PackedLinear(weight.t().contiguous(), bias, gelu, rows=rows, dtype=weight.dtype, tanh=True)
