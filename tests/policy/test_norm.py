"""The norm's gradient, which is written out, is that of PyTorch's own operators."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.policy.transformer import Norm, _FewPasses

B, T, D = 3, 5, 16


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def norm_and_gradients(x: Tensor, weight: Tensor, plain: bool = False) -> list[Tensor]:
    """The norm of x and the gradients of a weighed sum of it for x and the weight."""
    norm = Norm(D, eps=1e-5)
    norm.weight.data = weight.detach()
    y = F.rms_norm(x, (D,), norm.weight, 1e-5) if plain else norm(x)
    return [y, *torch.autograd.grad((y.float() * made(*y.shape, seed=7).detach()).sum(), (x, norm.weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_the_operators(dtype: torch.dtype) -> None:
    x, weight = made(B, T, D, dtype=dtype), made(D, seed=1, dtype=dtype)
    for ours, theirs in zip(norm_and_gradients(x, weight), norm_and_gradients(x, weight, plain=True), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_it_is_written_out_in_float32_on_a_cpu() -> None:
    assert type(Norm(D, eps=1e-5)(made(B, D)).grad_fn).__name__ == "_FewPassesBackward"
    assert type(Norm(D, eps=1e-5).bfloat16()(made(B, D, dtype=torch.bfloat16)).grad_fn).__name__ != "_FewPassesBackward"


def test_its_gradient_is_that_of_finite_differences() -> None:
    x, weight = made(B, T, D, dtype=torch.float64), made(D, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: _FewPasses.apply(x, w, 1e-5), (x, weight))


def test_a_row_of_zeros_has_a_norm() -> None:
    found = norm_and_gradients(torch.zeros(1, D, requires_grad=True), torch.ones(D))
    assert all(torch.isfinite(y).all() for y in found)


def test_layouts_that_are_not_contiguous_are_read() -> None:
    wide = made(B, T, 2 * D)
    found = norm_and_gradients(wide[..., ::2], made(D, seed=1))
    for ours, theirs in zip(found, norm_and_gradients(wide[..., ::2].contiguous(), made(D, seed=1)), strict=False):
        torch.testing.assert_close(ours, theirs)
