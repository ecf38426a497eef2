"""A policy with 16-bit copies of its matrices, as a GPU trains it: products in 16 bit, all else fused, in float32.

Shape letters: B rows, T positions, R = B T tokens, D hidden size, N outputs of a product.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsmart.kernels.layer import normalised_sum, rotated, swiglu
from fastsmart.policy.transformer import Policy


class CastPolicy:
    """The hidden states of a policy, whose matrices are cast once after each change of theirs and not at each use.

    Gradients go to the policy's own parameters, in float32. Against autocast, which rounds after each operator, what is
    between two products is rounded once.

    kernel : of `fastsmart.kernels.layer`: "auto", "torch" or "triton"
    """

    def __init__(self, policy: Policy, dtype: torch.dtype, kernel: str = "auto") -> None:
        self._policy = weakref.ref(policy)  # who holds the policy may hold this one by it
        self.dtype, self.kernel = dtype, kernel
        self.copies: list[Tensor] = []
        self._copied: list[tuple[int, int]] = []  # address and version of each matrix when it was cast

    @property
    def policy(self) -> Policy:
        policy = self._policy()
        assert policy is not None  # it outlives what is found by it
        return policy

    def refresh(self) -> bool:
        """Cast the matrices where they have changed; gives whether the copies lie where they lay."""
        matrices = [p.detach() for p in _matrices(self.policy)]
        now = [(p.data_ptr(), p._version) for p in matrices]
        if now == self._copied:
            return True
        stayed = [address for address, _ in now] == [address for address, _ in self._copied]
        if not stayed:
            self.copies = [torch.empty_like(p, dtype=self.dtype) for p in matrices]
        torch._foreach_copy_(self.copies, matrices)
        self._copied = now
        return stayed

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, T] int -> hidden states float32 [B, T, D], as `Policy.hidden`, by the copies that `refresh` made."""
        policy, kernel, dtype = self.policy, self.kernel, self.dtype
        model, size, epsilon = policy.model, policy.size, policy.size.rms_norm_eps
        rows, positions = ids.shape
        if positions > size.max_positions:
            raise ValueError(f"{positions} positions, but the policy was made for {size.max_positions}")
        cos, sin = model.cos[:positions], model.sin[:positions]
        copies = iter(self.copies)
        x, more = model.embed_tokens(ids).flatten(0, 1), None
        for layer in model.layers:
            x, h = normalised_sum(x, more, layer.input_layernorm.weight, epsilon, dtype, kernel)
            qkv = product(h, layer.self_attn.qkv_proj.weight, next(copies))
            qkv = qkv.view(rows, positions, -1, size.head_size)
            q, k, v = rotated(qkv, cos, sin, size.num_heads, size.num_kv_heads, kernel)
            more = product(attention(q, k, v).flatten(0, 1), layer.self_attn.o_proj.weight, next(copies))
            x, h = normalised_sum(x, more, layer.post_attention_layernorm.weight, epsilon, dtype, kernel)
            gate_up = product(h, layer.mlp.gate_up_proj.weight, next(copies))
            more = product(swiglu(gate_up, kernel), layer.mlp.down_proj.weight, next(copies))
        _, h = normalised_sum(x, more, model.norm.weight, epsilon, torch.float32, kernel)
        return h.view(rows, positions, -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, T, H, E], k and v [B, T, K, E]: [B, T, H E]."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(2)


def product(x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
    """x [R, K] times the transpose of `copy` [N, K], of the same dtype; the gradient of `copy` goes to `weight`."""
    return _Product.apply(x, weight, copy)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.dtype = weight.dtype
        return x @ copy.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, copy = ctx.saved_tensors
        if grad.is_cuda and grad.dtype != ctx.dtype:  # the sum over tokens is not rounded to 16 bit on its way
            grad_weight = torch.mm(grad.t(), x, out_dtype=ctx.dtype)
        else:
            grad_weight = (grad.t() @ x).to(ctx.dtype)
        return grad @ copy, grad_weight, None


def _matrices(policy: Policy) -> list[Tensor]:
    """Matrices that `hidden` multiplies with, in its order."""
    return [
        weight
        for layer in policy.model.layers
        for weight in (
            layer.self_attn.qkv_proj.weight,
            layer.self_attn.o_proj.weight,
            layer.mlp.gate_up_proj.weight,
            layer.mlp.down_proj.weight,
        )
    ]
