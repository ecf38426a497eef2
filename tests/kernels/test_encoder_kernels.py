"""GELU, norms and the positional convolution of the audio scorer, against their twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsmart.errors import UserError
from fastsmart.kernels import jit
from fastsmart.kernels.gelu import gelu
from fastsmart.kernels.jit import tl
from fastsmart.kernels.norm import ROWS, norm_of_sum
from fastsmart.kernels.positional import FEW, MANY, PositionalConvolution, blocks_for, together

needs_triton = pytest.mark.skipif(
    jit.triton is None or not (jit.INTERPRETED or torch.cuda.is_available()), reason="no Triton to run"
)
DEVICE = "cuda" if torch.cuda.is_available() and not jit.INTERPRETED else "cpu"
HALF = {"atol": 2e-3, "rtol": 2.0**-10}  # float16 of values up to 4, of sums that float32 rounds in another order


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@jit.jit
def _gelu_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, gelu(tl.load(x_ptr + at)))


@needs_triton
def test_gelu_is_its_definition_everywhere():
    x = torch.cat([torch.linspace(-9, 9, 4092), torch.tensor([-1e30, -300.0, 300.0, 1e30])]).to(DEVICE)
    out = torch.empty_like(x)
    _gelu_kernel[(1,)](x, out, BLOCK=4096)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    np.testing.assert_allclose(out.cpu().double(), exact, atol=8e-7, rtol=2e-7)
    nothing = torch.full_like(x, torch.nan)
    _gelu_kernel[(1,)](nothing, out, BLOCK=4096)
    assert out.isnan().all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("added", [True, False])
def test_norm_of_a_sum_its_copy_and_its_mean(dtype, added):
    frames = torch.tensor([ROWS + 5, 1, ROWS], dtype=torch.int32, device=DEVICE)
    x, y = normal(3, ROWS + 5, 48), normal(3, ROWS + 5, 48, dtype=dtype, seed=1) if added else None
    weight, bias = normal(48, seed=2), normal(48, seed=3)
    found, exact = (norm_of_sum(x, y, weight, bias, 1e-5, frames, dtype, kernel) for kernel in ("triton", "torch"))
    torch.testing.assert_close(found[0], exact[0], atol=5e-6, rtol=0)
    assert found[1].dtype == exact[1].dtype == dtype
    torch.testing.assert_close(found[1], exact[1], **HALF)
    torch.testing.assert_close(found[2].sum(1), exact[2].sum(1), atol=2e-6, rtol=0)
    for b, count in enumerate(frames.tolist()):
        torch.testing.assert_close(exact[2][b, 0], exact[0][b, :count].mean(0), atol=2e-6, rtol=0)


@needs_triton
@pytest.mark.parametrize(("count", "taps"), [(33, 16), (35, 15), (4, 16)])
def test_the_positional_convolution(count, taps):
    weight, bias = normal(32, 8, taps) / (8 * taps) ** 0.5, normal(32, seed=1)
    x = normal(3, count, 32, seed=2)
    frames = torch.tensor([count, count // 2, 1], dtype=torch.int32, device=DEVICE)
    twin = PositionalConvolution(weight.half(), bias.half(), "torch")
    found = PositionalConvolution(weight.half(), bias.half(), "triton")(x.half(), frames)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, twin(x.half(), frames).half(), **HALF)
    heard = x.clone().double()
    for b, real in enumerate(frames.tolist()):
        heard[b, real:] = 0
    y = F.conv1d(heard.mT, weight.double(), bias.double(), padding=taps // 2, groups=4)[:, :, :count].mT
    torch.testing.assert_close(found.double(), F.gelu(y), atol=1e-2, rtol=0)


def test_blocks_grow_with_the_windows():
    assert [blocks_for(100 * windows) for windows in (1, 4, 8, 64)] == [FEW, FEW, MANY, MANY]


def test_five_outputs_of_a_group_are_one_row_of_a_product():
    weight = normal(6, 3, 4)
    rows = together(weight)
    assert rows.shape == (2, 15, 24)
    for group, output, tap, channel in ((0, 0, 0, 0), (1, 2, 3, 1)):
        for j in range(5):
            at = (tap + j) * 3 + channel
            assert rows[group, 3 * j + output, at] == weight[3 * group + output, channel, tap]
    assert int((rows != 0).sum()) == 5 * weight.numel()


def test_kernels_of_the_encoder_are_refused_where_they_cannot_run(monkeypatch):
    monkeypatch.setattr(jit, "INTERPRETED", False)
    x = torch.zeros(1, 8, 16, dtype=torch.float16)
    frames = torch.ones(1, dtype=torch.int32)
    with pytest.raises(UserError, match="needs the triton package and an NVIDIA GPU"):
        norm_of_sum(x, None, x[0, 0], x[0, 0], 1e-5, frames, x.dtype, "triton")
    with pytest.raises(UserError, match="needs the triton package and an NVIDIA GPU"):
        PositionalConvolution(x.new_zeros(16, 4, 8), x[0, 0], "triton")
