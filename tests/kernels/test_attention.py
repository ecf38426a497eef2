"""The kernels of the audio scorer against their torch twins, interpreted where there is no GPU."""

import math

import numpy as np
import pytest
import torch

from fastsmart.kernels import jit
from fastsmart.kernels.attention import gated_attention
from fastsmart.kernels.convolution import convolution_gelu

needs_triton = pytest.mark.skipif(
    jit.triton is None or not (jit.INTERPRETED or torch.cuda.is_available()), reason="no Triton to run"
)
DEVICE = "cuda" if torch.cuda.is_available() and not jit.INTERPRETED else "cpu"
# a GPU sums in another order and has an exp2 of 2 ulp: twice what float32 makes of these sums on a CPU
FP32_ATOL = 2e-6 if DEVICE == "cpu" else 5e-6


def attention_case(frames: int, lengths: list[int], size: int, dtype: torch.dtype, spare: int = 0) -> tuple:
    """Arguments as the encoder has them: q, k and v are slices of one product."""
    generator = torch.Generator().manual_seed(0)
    batch, heads = len(lengths), 3
    packed = torch.randn(batch, frames, 3 * heads * size + 2 * heads, generator=generator).to(DEVICE, dtype)
    q, k, v = packed[..., : 3 * heads * size].view(batch, frames, 3, heads, size).permute(2, 0, 3, 1, 4)
    gate = (2 * torch.rand(heads, generator=generator)).to(DEVICE)
    wide = frames + spare
    bias = torch.full((heads, frames, wide), 1e4)  # nothing beyond the frames is looked at
    bias[:, :, :frames] = torch.randn(heads, frames, frames, generator=generator)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return q, k, v, packed[..., 3 * heads * size :], gate, bias.to(DEVICE, dtype), lengths


def by_definition(q, k, v, raw, gate, bias, lengths) -> np.ndarray:
    q, k, v, raw, gate, bias = (x.double().cpu().numpy() for x in (q, k, v, raw, gate, bias))
    frames = q.shape[2]
    a, b = (1 / (1 + np.exp(-raw[..., i::2])) for i in range(2))
    gate = (a * (b * gate - 1) + 2).swapaxes(1, 2)  # WavLM's equations 4 to 6
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3]) + gate[..., None] * bias[:, :, :frames]
    scores = np.where(np.arange(frames) < lengths.cpu().numpy()[:, None, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


CASES = [  # frames, lengths, size of a head, numbers of a row of bias beyond the frames
    (130, [130, 64, 1], 64, 30),  # more than two blocks, a whole block of padding, a single key; rows of whole blocks
    (64, [63], 16, 0),  # one block that is not full
    (5, [5, 3], 32, 2),  # fewer frames than a block
]


@pytest.mark.parametrize(("frames", "lengths", "size", "spare"), CASES)
def test_the_twin_is_attention_by_its_definition(frames, lengths, size, spare):
    case = attention_case(frames, lengths, size, torch.float32, spare)
    np.testing.assert_allclose(gated_attention(*case, kernel="torch").cpu(), by_definition(*case), atol=FP32_ATOL)


@needs_triton
@pytest.mark.parametrize(("frames", "lengths", "size", "spare"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_agrees_with_the_twin(frames, lengths, size, spare, dtype):
    case = attention_case(frames, lengths, size, dtype, spare)
    expected = gated_attention(*(x.float() if x.is_floating_point() else x for x in case), kernel="torch")
    actual = gated_attention(*case, kernel="triton")
    assert actual.dtype == dtype
    assert actual.transpose(1, 2).is_contiguous()  # heads side by side, as the next product reads them
    # float16 keeps 11 bits of values up to 4 and of the probabilities they are weighted with
    torch.testing.assert_close(actual.float(), expected, atol=FP32_ATOL if dtype == torch.float32 else 4e-3, rtol=0)


def test_a_head_size_the_kernel_does_not_take_goes_the_other_way():
    case = attention_case(7, [7], 8, torch.float32)
    np.testing.assert_allclose(gated_attention(*case).cpu(), by_definition(*case), atol=FP32_ATOL)


def convolution_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 1003), (2, 10, 130), (2, 130))
    return tuple(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convolution_gelu_is_a_convolution_and_gelu(kernel, dtype):
    samples, weight, bias = convolution_case()
    actual = convolution_gelu(samples, weight, bias, 5, dtype, kernel=kernel)
    x, w, b = (t.double().cpu().numpy() for t in (samples, weight, bias))
    windows = np.lib.stride_tricks.sliding_window_view(x, 10, axis=1)[:, ::5]
    y = windows @ w + b[:, None]
    expected = 0.5 * y * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        actual.cpu().double(), expected, atol=1e-5, rtol=0 if dtype == torch.float32 else 2.0**-11
    )
