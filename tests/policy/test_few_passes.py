"""Gradients that are written out are those of PyTorch's own operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastsmart.policy import few_passes
from fastsmart.policy.few_passes import rms_norm, rotated, swiglu

B, T, D, F, H, K, E = 3, 5, 16, 12, 4, 2, 8


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def angles() -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(T), torch.tensor([1.0, 0.5, 0.1, 0.01]))
    return angle.cos(), angle.sin()


def outputs_and_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    found = function(*inputs)
    found = (found,) if isinstance(found, Tensor) else found
    weighed = sum((y.float() * made(*y.shape, seed=7 + i).detach()).sum() for i, y in enumerate(found))
    assert isinstance(weighed, Tensor)
    return [*found, *torch.autograd.grad(weighed, inputs)]


CASES = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-5), lambda d: (made(B, T, D, dtype=d), made(D, seed=1, dtype=d))),
    "rotation": (lambda x: rotated(x, *angles(), H, K), lambda d: (made(B, T, H + 2 * K, E, dtype=d),)),
    "gate": (swiglu, lambda d: (made(B, T, 2 * F, dtype=d),)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_the_operators(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = CASES[case]
    found = outputs_and_gradients(function, *inputs(dtype))
    monkeypatch.setattr(few_passes, "_composed", lambda x: True)
    wanted = outputs_and_gradients(function, *inputs(dtype))
    rounding = {} if dtype == torch.float32 else {"atol": 2**-7, "rtol": 2**-6}  # the operators round more often
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **rounding)


@pytest.mark.parametrize("case", ["rotation", "gate"])
def test_they_are_those_of_finite_differences(case: str) -> None:
    function, inputs = CASES[case]
    assert torch.autograd.gradcheck(function, inputs(torch.float64))


def test_the_norm_is_that_of_finite_differences() -> None:
    x, weight = made(B, T, D, dtype=torch.float64), made(D, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: few_passes._Norm.apply(x, w, 1e-5), (x, weight))


def test_a_row_of_zeros_has_a_norm() -> None:
    x = torch.zeros(1, D, requires_grad=True)
    found = outputs_and_gradients(lambda x: rms_norm(x, torch.ones(D), 1e-5), x)
    assert all(torch.isfinite(y).all() for y in found)


def test_layouts_that_are_not_contiguous_are_read() -> None:
    wide = made(B, T, 2 * D)
    found = outputs_and_gradients(lambda x: rms_norm(x[..., ::2], torch.ones(D), 1e-5), wide)
    wanted = outputs_and_gradients(lambda x: rms_norm(x[..., ::2].contiguous(), torch.ones(D), 1e-5), wide)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
