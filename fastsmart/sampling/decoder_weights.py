"""A policy's weights as a decode step reads them, and the pass of a prompt or a token through them.

Shape letters: R rows decoded side by side, T new tokens of each, S cache slots, D hidden size, K key/value heads,
H query heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.machine.files import mkl_knows_processor
from fastsmart.policy.transformer import Policy
from fastsmart.sampling.kv_cache import LayerCache


class _Matrix:
    """x -> x @ W^T for a decode step: few rows, the same weight over and over.

    On a CPU the weight is packed for the number of rows, which saves the library doing so in every product. MKL where
    it has kernels for the processor: 249 against 208 GFLOP/s for 64 rows on two Intel cores in fp32, 186 against 141
    for 32. oneDNN on others, where MKL keeps to AVX2: 112 against 90 for 64 rows on one Zen 4 core. Which one depends
    on the machine alone, so that a run resumed on it gives the same bits. Other dtypes of a CPU have the transpose
    kept, which is still faster than `F.linear` for so few rows. On a GPU the inputs of an output stand side by side, as
    kernels of ours read them.
    """

    def __init__(self, weight: Tensor) -> None:
        self.library = _packing_library(weight)
        self.turned = not self.library and weight.device.type == "cpu"
        self.weight = weight.t().contiguous() if self.turned else weight.contiguous()
        self.packed: Tensor | None = None
        self.rows = 0

    def load(self, weight: Tensor) -> None:
        """Take over another weight of the same shape, where the old one is: graphs go on reading there."""
        self.weight.copy_(weight.t() if self.turned else weight)
        self.packed, self.rows = None, 0

    @property
    def by_output(self) -> Tensor:
        """[out, in], a view of what is kept."""
        return self.weight.t() if self.turned else self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in] -> [R, out]."""
        if not self.library:
            return x @ (self.weight if self.turned else self.weight.t())
        if len(x) != self.rows:
            self.rows = len(x)
            mkl, onednn = torch.ops.mkl._mkl_reorder_linear_weight, torch.ops.mkldnn._reorder_linear_weight
            self.packed = (mkl if self.library == "mkl" else onednn)(self.weight, self.rows)
        if self.library == "mkl":
            return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, None, self.rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def _packing_library(weight: Tensor) -> str:
    """Choose the library with the fastest packed products for this weight: "mkl", "mkldnn" (oneDNN), or "" for none."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return ""
    if torch.backends.mkl.is_available() and mkl_knows_processor():
        return "mkl"
    return "mkldnn" if torch.backends.mkldnn.is_available() else ""


@dataclass
class _LayerWeights:
    """One layer. The weights of the two norms and the scale of the scores are multiplied into the matrices, and the
    rows of every query and key head reordered so that the two coordinates a rotation turns are neighbours."""

    qkv: _Matrix
    out: _Matrix
    gate_up: _Matrix
    down: _Matrix


def _arranged(policy: Policy, dtype: torch.dtype) -> Iterator[Tensor]:
    """The embedding, the matrices of every layer in the order of `_LayerWeights`, the head; some are the policy's."""
    size, model = policy.size, policy.model
    yield model.embed_tokens.weight.to(dtype)
    pairs = torch.arange(size.head_size, device=policy.device).view(2, -1).t().flatten()  # 0, E/2, 1, E/2 + 1, ...
    rotary_rows = (size.num_heads + size.num_kv_heads) * size.head_size
    for layer in model.layers:
        qkv = layer.self_attn.qkv_proj.weight * layer.input_layernorm.weight
        qkv[: size.num_heads * size.head_size] *= size.head_size**-0.5  # the scale of the scores
        qk = qkv[:rotary_rows].unflatten(0, (-1, size.head_size))[:, pairs].flatten(0, 1)
        gate_up = layer.mlp.gate_up_proj.weight * layer.post_attention_layernorm.weight
        for weight in (
            torch.cat([qk, qkv[rotary_rows:]]),
            layer.self_attn.o_proj.weight,
            gate_up,
            layer.mlp.down_proj.weight,
        ):
            yield weight.to(dtype)
    yield (policy.lm_head.weight * model.norm.weight).float()


class DecoderWeights:
    """A copy of a policy's weights on the policy's device; `load` writes into the same memory, so graphs stay valid.

    dtype : of the embedding and the layers; the head is float32
    embed : [V, D]
    rope  : complex64 [positions, E / 2], the rotary table
    """

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self.size, self.dtype, self.device = policy.size, dtype, policy.device
        self.epsilon = torch.tensor(self.size.rms_norm_eps, device=policy.device)
        self.rope = torch.complex(policy.model.cos.float(), policy.model.sin.float())
        with torch.no_grad():
            self.embed, *weights = (weight.clone() for weight in _arranged(policy, dtype))
        *matrices, self.head = map(_Matrix, weights)
        self.layers = [_LayerWeights(*matrices[i : i + 4]) for i in range(0, len(matrices), 4)]

    @torch.no_grad()
    def load(self, policy: Policy) -> None:
        """Take over the weights of a policy of the same size."""
        weights = _arranged(policy, self.dtype)
        self.embed.copy_(next(weights))
        for matrix, weight in zip(self.matrices(), weights, strict=True):
            matrix.load(weight)

    def matrices(self) -> Iterator[_Matrix]:
        """Matrices of every layer, then the head."""
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self.head

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors held, under the policy's name and in the policy's order; a norm is in the matrix it feeds."""
        names = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
        of_layers = [f"model.layers.{i}.{name}.weight" for i in range(len(self.layers)) for name in names]
        yield "model.embed_tokens.weight", self.embed
        for name, matrix in zip([*of_layers, "lm_head.weight"], self.matrices(), strict=True):
            yield name, matrix.weight

    def forward(self, ids: Tensor, cache: list[LayerCache], start: int, left: Tensor | None) -> Tensor:
        """Normalised hidden states float32 [R, D] after the last of ids [R, T], which take the slots from `start` on.

        left : int64 [R], slots of padding before each prompt; None where there are none
        """
        size, (rows, width) = self.size, ids.shape
        heads, kv_heads = size.num_heads, size.num_kv_heads
        end = start + width
        rope, seen = self.rope[start:end], None
        if width > 1 or left is not None:
            slot = torch.arange(end, device=ids.device)
            seen = slot <= slot[start:, None]  # [T, end]
            if left is not None:
                rope = self.rope[(slot[start:] - left[:, None]).clamp_min(0)]  # [R, T, E / 2]
                # a padded position sees itself, so that its softmax is defined; nobody reads it
                seen = (seen & ((slot >= left[:, None, None]) | (slot == slot[start:, None])))[:, None]
        rope = rope.unsqueeze(-2)
        x = F.embedding(ids.flatten(), self.embed)
        for layer, kept in zip(self.layers, cache, strict=True):
            qkv = layer.qkv(self._normalised(x)).view(rows, width, heads + 2 * kv_heads, size.head_size)
            _rotate(qkv[:, :, : heads + kv_heads], rope)
            kept.put(qkv[:, :, heads:].view(rows, width, 2, kv_heads, size.head_size), start)
            # the query heads of a key head stand side by side: [R K, H / K T, E]
            q = qkv[:, :, :heads].transpose(1, 2).reshape(rows * kv_heads, -1, size.head_size)
            y = kept.attend(q, end, seen)
            y = y.view(rows, heads, width, size.head_size).transpose(1, 2)
            x += layer.out(y.reshape(rows * width, -1))
            gate, up = layer.gate_up(self._normalised(x)).chunk(2, dim=-1)
            x += layer.down(F.silu(gate).mul_(up))
        return self._normalised(x.view(rows, width, -1)[:, -1].float())

    def _normalised(self, x: Tensor) -> Tensor:
        """RMSNorm without its weight, which the next matrix holds."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = torch.addcmul(self.epsilon, length, length, value=1.0 / x.shape[-1])
        return x * mean_square.rsqrt_().to(x.dtype)


def _rotate(x: Tensor, rope: Tensor) -> None:
    """Rotary embedding, in place, of x [R, T, heads, E], whose coordinates stand in pairs.

    rope : complex [T, 1, E / 2] or [R, T, 1, E / 2]
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    x.copy_(torch.view_as_real(pairs * rope).flatten(-2))
