"""The two-level network: a GPT-2 over patches, and one over the sixteen characters of the next patch.

Its parameters bear the names of the published checkpoints. Shape letters: N pieces, P patches of each, C = 16
characters of a patch, H width, V = 128 characters (ASCII).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsmart.policy.embedding import Embedding

PATCH_CHARS = 16
CHARACTERS = 128
HEAD_SIZE = 64
EPSILON = 1e-5
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class NotaGenSize:
    """Size of a two-level network.

    patch_layers, char_layers : blocks of either level
    hidden                    : width of both, a multiple of 64
    max_patches               : patches the patch level has positions for
    """

    patch_layers: int
    char_layers: int
    hidden: int
    max_patches: int

    @property
    def heads(self) -> int:
        """Heads of attention, of 64 numbers each."""
        return self.hidden // HEAD_SIZE


class Conv1D(nn.Module):
    """An affine map whose weight is kept as [in, out], as GPT-2's is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    """A pre-norm block of GPT-2."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(hidden, EPSILON) for _ in range(2))
        self.attn = nn.ModuleDict({"c_attn": Conv1D(hidden, 3 * hidden), "c_proj": Conv1D(hidden, hidden)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(hidden, 4 * hidden), "c_proj": Conv1D(4 * hidden, hidden)})

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, H] -> [N, T, H]."""
        return self.forward_with_kv(x)[0]

    def forward_with_kv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, T, H] -> the same, and the keys and values [N, heads, T, 64] that later positions look at."""
        rows, length, hidden = x.shape
        split = self.project(x).view(rows, length, 3, hidden // HEAD_SIZE, HEAD_SIZE)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.rest(x, y.transpose(1, 2).reshape(rows, length, hidden)), k, v

    def project(self, x: Tensor) -> Tensor:
        """x [..., H] -> queries, keys and values [..., 3 H], heads side by side."""
        return self.attn["c_attn"](self.ln_1(x))

    def rest(self, x: Tensor, y: Tensor) -> Tensor:
        """Finish the block after attention: x [..., H] as it was given, y [..., H] as the heads made it."""
        x = x + self.attn["c_proj"](y)
        units = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](units)


class Gpt2(nn.Module):
    """Blocks with learned positions; `words` is 1 for the patch level, whose word embedding is kept and never used."""

    def __init__(self, layers: int, hidden: int, positions: int, words: int) -> None:
        super().__init__()
        self.wte = Embedding(words, hidden)
        self.wpe = Embedding(positions, hidden)
        self.h = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [N, T, H], without positions -> [N, T, H]."""
        x = x + self.wpe.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)

    @property
    def blocks(self) -> list[Block]:
        """Its blocks in order."""
        return [cast(Block, block) for block in self.h]


class PatchLevel(nn.Module):
    """The GPT-2 that reads patches."""

    def __init__(self, size: NotaGenSize) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(PATCH_CHARS * CHARACTERS, size.hidden)
        self.base = Gpt2(size.patch_layers, size.hidden, size.max_patches, words=1)

    def embed(self, patches: Tensor) -> Tensor:
        """Patches int64 [..., C] -> [..., H]: of a one-hot vector of 16 x 128 the product is a sum of 16 columns."""
        return F.embedding(patches + column_starts(patches.device), self.patch_embedding.weight.t()).sum(-2) + (
            self.patch_embedding.bias
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Patches int64 [N, P, C] -> [N, P, H], what the char level is told of the patch after each."""
        return self.base(self.embed(patches))


class CharLevel(nn.Module):
    """The GPT-2 that writes the characters of a patch; its head is its word embedding."""

    def __init__(self, size: NotaGenSize) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"transformer": Gpt2(size.char_layers, size.hidden, PATCH_CHARS + 1, CHARACTERS)})

    @property
    def network(self) -> Gpt2:
        """The GPT-2 without its head."""
        return cast(Gpt2, self.base["transformer"])

    def forward(self, told: Tensor, patches: Tensor) -> Tensor:
        """told [N, H], what the patch level says of patches int64 [N, C] -> logits [N, C, V] of their characters."""
        network = self.network
        x = torch.cat([told[:, None], network.wte(patches[:, :-1])], dim=1)
        return network(x) @ network.wte.weight.t()


class NotaGen(nn.Module):
    """Both levels. Parameters are not initialised: a checkpoint, or `weights.random_model`, has them."""

    def __init__(self, size: NotaGenSize) -> None:
        super().__init__()
        self.size = size
        self.patch_level_decoder = PatchLevel(size)
        self.char_level_decoder = CharLevel(size)

    def forward(self, patches: Tensor) -> Tensor:
        """Log-probs float32 [N, P - 1, C] of the characters of all patches int64 [N, P, C] after the first; 0 of PAD.

        Log p(piece) is their sum. Shorter pieces are filled up with patches of PAD, which change nothing.
        """
        told = self.patch_level_decoder(patches)[:, :-1].flatten(0, 1)
        targets = patches[:, 1:].flatten(0, 1)
        logprobs = self.char_level_decoder(told, targets).float().log_softmax(-1)
        chosen = logprobs.gather(-1, targets[..., None])[..., 0].masked_fill(targets == PAD, 0.0)
        return chosen.view(len(patches), -1, PATCH_CHARS)

    def adopt(self, tensors: Mapping[str, Tensor]) -> NotaGen:
        """The network with these tensors, by the names of its parameters, as its own."""
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))
        return self


def column_starts(device: torch.device) -> Tensor:
    """Where the 128 columns of each of the sixteen characters begin, int64 [C]."""
    return torch.arange(0, PATCH_CHARS * CHARACTERS, CHARACTERS, device=device)


def shapes(size: NotaGenSize) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its published name; the head, which is `wte` once more, is none of them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in NotaGen(size).named_parameters()}
