"""Products of float32 on tensor cores, or in Triton's interpreter, against float64: as exact as PyTorch's own."""

import pytest
import torch

from fastsmart.kernels import single
from fastsmart.kernels.single import single_product

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(single, "TILE", {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16})


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# tiles that are full, tiles that are not; a K of several parts, the last of them shorter
@pytest.mark.parametrize(("m", "k", "n"), [(32, 32, 16), (33, 40, 17), (20, 413, 30), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)], ids=["plain", "a", "b"])
def test_as_exact_as_pytorchs(small_tiles, m, k, n, turned):
    a, b = normal(m, k, seed=0), normal(k, n, seed=1)
    a, b = (x.t().contiguous().t() if turn else x for x, turn in zip((a, b), turned, strict=True))
    out = torch.full((m, n + 3), torch.nan, device=DEVICE)[:, :n]
    assert single_product(a, b, out) is out
    exact = a.double() @ b.double()
    yardstick = (a @ b - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (out - exact).abs().max() <= 2 * yardstick


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_no_numbers(m, k, n):
    a, b = normal(m, k, seed=0), normal(k, n, seed=1)
    assert torch.equal(single_product(a, b, torch.ones(m, n, device=DEVICE)), torch.zeros(m, n, device=DEVICE))
