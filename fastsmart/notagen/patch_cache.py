"""Keys and values of the patches so far, for rows that stand at different patches.

Shape letters: R rows, A heads, S slots, E = 64 numbers of a head, H width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.notagen.model import HEAD_SIZE, Block, NotaGen, column_starts

FIRST_SLOTS = 64  # of a new cache; it doubles when a row needs more


class PatchCache:
    """The patch level of R pieces, each wherever it stands.

    Keys and values are [R, A, S, E].
    """

    def __init__(self, model: NotaGen, rows: int) -> None:
        self.level, self.size = model.patch_level_decoder, model.size
        weight = self.level.patch_embedding.weight
        self.columns = weight.detach().t().contiguous()  # a row for each character at each place
        shape = (rows, self.size.heads, FIRST_SLOTS, HEAD_SIZE)
        layers = range(self.size.patch_layers)
        # zeros, so that slots nobody has written yet weigh nothing
        self.keys = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    @property
    def slots(self) -> int:
        """Patches for which there is room."""
        return self.keys[0].shape[2]

    def embed(self, patches: Tensor) -> Tensor:
        """Patches int64 [..., 16] -> [..., H]."""
        chosen = F.embedding(patches + column_starts(patches.device), self.columns)
        return chosen.sum(-2) + self.level.patch_embedding.bias

    def fill(self, row: int, patches: Tensor) -> None:
        """Read the patches int64 [P, 16] of one row, from its first slot on."""
        count = len(patches)
        if not count:
            return
        self._reserve(count)
        x = self.embed(patches)[None] + self.level.base.wpe.weight[:count]
        for block, keys, values in zip(self.level.base.blocks, self.keys, self.values, strict=True):
            x, k, v = block.forward_with_kv(x)
            keys[row, :, :count] = k[0]
            values[row, :, :count] = v[0]

    def step(self, patches: Tensor, slot: Tensor) -> Tensor:
        """Read one patch of each row, int64 [R, 16], into its slot int64 [R]: what the char level is told, [R, H]."""
        most = int(slot.max()) + 1
        self._reserve(most)
        base = self.level.base
        x = self.embed(patches) + base.wpe(slot)
        seen = torch.arange(most, device=slot.device) <= slot[:, None]  # [R, S]
        for block, keys, values in zip(base.blocks, self.keys, self.values, strict=True):
            x = _step(block, x, keys, values, slot, seen[:, None, None])
        return base.ln_f(x)

    def keep(self, rows: Tensor) -> None:
        """Drop all but these rows, int64."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]

    def _reserve(self, count: int) -> None:
        """Make room for so many patches; a layer at a time, so that little is held twice."""
        if count <= self.slots:
            return
        more = max(count, min(2 * self.slots, self.size.max_patches)) - self.slots
        for layer in range(len(self.keys)):
            self.keys[layer] = F.pad(self.keys[layer], (0, 0, 0, more))
            self.values[layer] = F.pad(self.values[layer], (0, 0, 0, more))


def _step(block: Block, x: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor) -> Tensor:
    """One block for the newest patch of each row [R, H], which looks at the slots `seen`, bool [R, 1, 1, S]."""
    rows, heads = keys.shape[:2]
    q, k, v = block.project(x).view(rows, 3, heads, HEAD_SIZE).unbind(1)
    every, most = torch.arange(rows, device=x.device), seen.shape[-1]
    keys[every, :, slot] = k
    values[every, :, slot] = v
    # with a mask even where every slot is seen: without one a CPU takes longer
    y = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, :most], values[:, :, :most], attn_mask=seen)
    return block.rest(x, y.reshape(rows, heads * HEAD_SIZE))
