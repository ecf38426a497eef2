"""The policy: a decoder-only transformer whose parameters are named, shaped and laid out as Hugging Face's Phi-3.

Shape letters: B rows, T positions, D hidden size, F feed-forward size, H query heads, K key/value heads, E head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastsmart.errors import UserError
from fastsmart.policy.embedding import Embedding
from fastsmart.tokens.vocabulary import Vocabulary

# Far above any policy of music; a size is refused before memory is taken for it
MOST = {
    "vocab_size": 2**22,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_layers": 1024,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "max_positions": 2**20,
}


@dataclass(frozen=True)
class PolicySize:
    """The shape of a policy.

    vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads : V, D, F, layers, H, K
    max_positions : longest sequence, for which the rotary tables are made; that of a checkpoint with a sliding window
                    is at most the window, inside which every position sees all before it
    rope_theta, rms_norm_eps : as in the checkpoint
    tied_head     : the output head is the embedding matrix
    """

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    max_positions: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tied_head: bool = False

    def __post_init__(self) -> None:
        for key, most in MOST.items():
            if not 1 <= getattr(self, key) <= most:
                raise UserError(f"{key} of a policy is {getattr(self, key)}; it must be from 1 to {most:,}")
        for key in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"{key} of a policy is {getattr(self, key)}; it must be a number above 0")
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise UserError(f"hidden_size {self.hidden_size} does not split into {self.num_heads} heads of even size")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads; `qkv_proj` holds q, k and v rows."""

    def __init__(self, size: PolicySize) -> None:
        super().__init__()
        self.size = size
        heads = size.num_heads + 2 * size.num_kv_heads
        self.qkv_proj = nn.Linear(size.hidden_size, heads * size.head_size, bias=False)
        self.o_proj = nn.Linear(size.num_heads * size.head_size, size.hidden_size, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, E] and k [B, T, K, E], rotated, and v [B, T, K, E] of x [B, T, D]."""
        size = self.size
        qkv = self.qkv_proj(x).unflatten(-1, (size.num_heads + 2 * size.num_kv_heads, size.head_size))
        qk, v = qkv.split([size.num_heads + size.num_kv_heads, size.num_kv_heads], dim=-2)
        q, k = rotate(qk, cos, sin).split([size.num_heads, size.num_kv_heads], dim=-2)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x, cos, sin))
        grouped = self.size.num_heads != self.size.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU; `gate_up_proj` holds the gate rows, then the up rows."""

    def __init__(self, size: PolicySize) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(size.hidden_size, 2 * size.intermediate_size, bias=False)
        self.down_proj = nn.Linear(size.intermediate_size, size.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Norm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467); on a CPU in float32 by `_FewPasses`."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
            return super().forward(x)
        return _FewPasses.apply(x, self.weight, self.eps)


class _FewPasses(torch.autograd.Function):
    """The norm with its gradient written out: PyTorch's operators pass over x some twenty times in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product = (grad * x).view(-1, x.shape[-1])
        for_weight = torch.mv(product.t(), scale.flatten())
        along = torch.mv(product, weight).view(scale.shape).mul_(scale.pow(3)).div_(-x.shape[-1])
        return (grad * scale).mul_(weight).addcmul_(x, along), for_weight, None


class Layer(nn.Module):
    def __init__(self, size: PolicySize) -> None:
        super().__init__()
        self.input_layernorm = Norm(size.hidden_size, eps=size.rms_norm_eps)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = Norm(size.hidden_size, eps=size.rms_norm_eps)
        self.mlp = FeedForward(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Everything under the checkpoint's `model.` prefix."""

    layers: Sequence[Layer]  # a ModuleList
    cos: Tensor
    sin: Tensor

    def __init__(self, size: PolicySize, pad_id: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(size.vocab_size, size.hidden_size, padding_idx=pad_id)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.num_layers))  # type: ignore[assignment]
        self.norm = Norm(size.hidden_size, eps=size.rms_norm_eps)
        self.size = size
        for name, table in zip(("cos", "sin"), rotary_tables(self.size), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Policy(nn.Module):
    """A causal language model over the vocabulary.

    `hidden(ids)` gives final hidden states, to which a loss applies `lm_head.weight` itself; `forward(ids)` logits.
    PAD's row of the embedding gets no gradient and stays as it is in the checkpoint, as in transformers. There it is
    zero, and the first RMSNorm multiplies the gradient of a zero row by rms_norm_eps^-1/2: a few sampled PADs would let
    gradient clipping shrink everything else. PAD's row of the output head learns like any other; with a tied head the
    two are one row, which learns as the head's.

    Raises UserError when `vocab` has another number of tokens than `size`.
    """

    def __init__(self, size: PolicySize, vocab: Vocabulary) -> None:
        super().__init__()
        if len(vocab) != size.vocab_size:
            raise UserError(f"a policy of {size.vocab_size} tokens cannot use a vocabulary of {len(vocab)}")
        self.size = size
        self.vocab = vocab
        self.model = Backbone(size, vocab.pad_id)
        self.lm_head = nn.Linear(size.hidden_size, size.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the output head the embedding matrix, where the size says so."""
        if self.size.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def adopt(self, tensors: dict[str, Tensor]) -> None:
        """Take these tensors as the weights of a module created without storage (on the meta device)."""
        self.load_state_dict(tensors, assign=True, strict=False)
        self.tie()

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, T] int -> hidden states [B, T, D]. Rows shorter than T are padded on the right with any id: under the
        causal mask no real position sees the padding."""
        if ids.shape[1] > self.size.max_positions:
            raise ValueError(f"{ids.shape[1]} positions, but the policy was made for {self.size.max_positions}")
        return self.model(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] int -> logits [B, T, V]."""
        return self.lm_head(self.hidden(ids))

    def initialise(self, generator: torch.Generator) -> Policy:
        """Draw fresh weights: normal, 0.02, with the residual projections scaled down by depth (GPT-2's rule)."""
        residual_std = 0.02 / (2 * self.size.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(parameter, 0.0, std, generator=generator)
        return self

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def rotary_tables(size: PolicySize) -> tuple[Tensor, Tensor]:
    """cos and sin [max_positions, E / 2] float32 of the rotary embedding (Su et al. 2021, eq. 34), in memory even of a
    policy that is created without storage."""
    steps, places = (
        torch.arange(*span, dtype=torch.float32, device="cpu")
        for span in ((0, size.head_size, 2), (size.max_positions,))
    )
    angle = places[:, None] * size.rope_theta ** -(steps / size.head_size)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [..., T, heads, E] by its position's angle, cos and sin [T, E / 2]; the two halves are the coordinates."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
