"""What a layer does between its matrix products, with gradients written out: fewer passes over memory on a CPU.

Each function is differentiable, once, and does what PyTorch's own operators do, rounded otherwise. Composed of those,
the norm reads and writes its input some twenty times in both directions, and every split is put together again by a
copy. On a GPU and under torch.compile, which fuses by itself, the operators are used.

Shape letters: B rows, T positions, D hidden size, F feed-forward size, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) of x [..., D], weight [D]."""
    if _composed(x) or x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return _Norm.apply(x, weight, epsilon)


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, E] and k [B, T, K, E] turned by their positions' angles (RoPE, arXiv 2104.09864), v [B, T, K, E].

    qkv [B, T, H + 2 K, E]; cos, sin [T, E / 2]; the two halves of a head are the coordinates.
    """
    cos, sin = cos.unsqueeze(-2).to(qkv.dtype), sin.unsqueeze(-2).to(qkv.dtype)
    if not _composed(qkv):
        return _Rotated.apply(qkv, cos, sin, heads, kv_heads)
    qk, v = qkv.split([heads + kv_heads, kv_heads], dim=-2)
    first, second = qk.chunk(2, dim=-1)
    q, k = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).split([heads, kv_heads], dim=-2)
    return q, k, v


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202), [..., F], of gate_up [..., 2 F], gates first."""
    if not _composed(gate_up):
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _composed(x: Tensor) -> bool:
    return x.device.type != "cpu" or torch.compiler.is_compiling()


class _Norm(torch.autograd.Function):
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


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=-2)
        return _turned(q, cos, sin, torch.empty_like(q)), _turned(k, cos, sin, torch.empty_like(k)), v.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_q: Tensor, for_k: Tensor, for_v: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads, kv_heads = for_q.shape[-2], for_k.shape[-2]
        grad = for_q.new_empty(*for_q.shape[:-2], heads + 2 * kv_heads, for_q.shape[-1])
        q, k, v = grad.split([heads, kv_heads, kv_heads], dim=-2)
        _turned(for_q, cos, -sin, q)
        _turned(for_k, cos, -sin, k)
        v.copy_(for_v)
        return grad, None, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """x [B, T, heads, E] turned, into `out`; cos, sin [T, 1, E / 2]."""
    (first, second), (one, other) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=other).addcmul_(first, sin)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        open_gate = F.silu(gate)
        ctx.save_for_backward(gate_up, open_gate)
        return open_gate * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, open_gate = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        for_gate, for_up = both.chunk(2, dim=-1)
        torch.mul(grad, open_gate, out=for_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=for_gate)
        return both
