"""Moments of windows by kernel (on a GPU, or in Triton's interpreter) and twin, against numpy in float64."""

import numpy as np
import pytest
import torch

from fastsmart.kernels import moments
from fastsmart.kernels.moments import window_moments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# more windows than samples reach, a last one that is cut; two chunks; windows that leave samples out
@pytest.mark.parametrize(("samples", "taps", "stride", "count"), [(103, 10, 5, 30), (211, 4, 2, 105), (50, 3, 7, 5)])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_sums_and_products_of_windows(kernel, samples, taps, stride, count, monkeypatch):
    if kernel == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(moments, "WINDOWS", 64)
    rng = np.random.default_rng(0)
    x = 3 + rng.standard_normal((2, samples)).astype(np.float32)  # a mean beside which a variance is a difference
    given = torch.from_numpy(x).to(DEVICE if kernel == "triton" else "cpu")
    sums, products = window_moments(given, taps, stride, count, kernel)
    longer = np.pad(x.astype(np.float64), ((0, 0), (0, count * stride + taps)))
    windows = np.lib.stride_tricks.sliding_window_view(longer, taps, axis=1)[:, ::stride][:, :count]
    assert sums.dtype == products.dtype == torch.float64
    np.testing.assert_allclose(sums.cpu(), windows.sum(1), rtol=1e-13)
    np.testing.assert_allclose(products.cpu(), windows.swapaxes(1, 2) @ windows, rtol=1e-13)
