"""A decode step's kernels (on a GPU, or in Triton's interpreter) and their torch twins, against PyTorch's own operators
in float64; they may err twice as much as these do in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

from fastsmart.kernels.decode_step import SLOTS, add_normalised, attend_next, gated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton"])
def kernel(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def place(kernel, *tensors):
    """Copies where the kernel runs."""
    if kernel == "triton" and DEVICE == "cpu" and tensors[0].dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds")
    return [t.to(DEVICE if kernel == "triton" else "cpu", copy=True) for t in tensors]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, exact, plain):
    """`found` is as near to `exact`, float64, as twice what `plain`, PyTorch's in the same dtype, is."""
    slack = 2 * (plain.double() - exact).abs().max() + 1e-6
    assert found.dtype == plain.dtype
    assert (found.cpu().double() - exact).abs().max() <= slack


# a row that fills its block; one that does not; one number
@pytest.mark.parametrize("shape", [(3, 64), (5, 100), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_the_sum(kernel, shape, dtype):
    x, more = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    for added in (more, None):
        total = x + added if added is not None else x.clone()
        for out in {dtype, torch.float32}:
            mine, extra = place(kernel, x, more)
            found = add_normalised(mine, extra if added is not None else None, 1e-5, out, kernel)
            exact = F.rms_norm(total.double(), shape[1:], eps=1e-5)
            assert_near(found, exact, F.rms_norm(total, shape[1:], eps=1e-5).to(out))
            assert torch.equal(mine.cpu(), total)


@pytest.mark.parametrize("width", [1, 64, 1025])  # a block and one more are two programs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_product(kernel, width, dtype):
    gate_up = 4 * normal(3, 2 * width, dtype=dtype)
    (mine,) = place(kernel, gate_up)

    def product(x):
        gate, up = x.chunk(2, dim=1)
        return F.silu(gate) * up

    assert_near(gated(mine, kernel), product(gate_up.double()), product(gate_up))


def rotated(x, rope):
    """x [R, heads, E] turned by complex turn [R, E / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2)


def attention(qkv, kv, rope, slot, left, heads):
    """By PyTorch's scaled_dot_product_attention, row by row: mix [R, H E] and the cache afterwards."""
    kv, (_, rows, kv_heads, _, size) = kv.clone(), kv.shape
    q, k, v = qkv.view(rows, -1, size).split([heads, kv_heads, kv_heads], 1)
    angle = rope[slot - left]
    q, k = rotated(q.to(rope.real.dtype), angle).to(qkv.dtype), rotated(k.to(rope.real.dtype), angle).to(qkv.dtype)
    kv[0, :, :, slot], kv[1, :, :, slot] = k, v
    mixed = []
    for row in range(rows):
        keys, values = kv[:, row, :, int(left[row]) : slot + 1].repeat_interleave(heads // kv_heads, 1)
        mixed.append(F.scaled_dot_product_attention(q[row, :, None], keys, values, scale=1.0).flatten())
    return torch.stack(mixed), kv


def next_token(rows, heads, kv_heads, size, slots, dtype=torch.float32):
    """What `attend_next` gets, and the angles as complex numbers."""
    qkv = normal(rows, (heads + 2 * kv_heads) * size, dtype=dtype)
    kv = normal(2, rows, kv_heads, slots, size, seed=1, dtype=dtype)
    rope = torch.polar(torch.ones(slots, size // 2), normal(slots, size // 2, seed=2))
    return qkv, kv, rope


# the first token of all; within, at the end of and just behind a pass of the loop; the last slot
@pytest.mark.parametrize("slot", [0, 5, SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS + 9])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 16), (6, 2, 8), (2, 1, 12)], ids=str)
def test_a_token_is_put_into_the_cache_and_attends(kernel, slot, heads, kv_heads, size):
    """A head size that is no power of two; heads that share keys; rows with padding up to the token itself."""
    qkv, kv, rope = next_token(3, heads, kv_heads, size, 2 * SLOTS + 10)
    left = torch.tensor([0, min(3, slot), slot])
    exact, cache = attention(qkv.double(), kv.double(), rope.to(torch.complex128), slot, left, heads)
    mine = place(kernel, qkv, kv, torch.view_as_real(rope), torch.tensor([slot]), left)
    found = attend_next(*mine, heads, kernel)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine[1].cpu().double(), cache, rtol=1e-5, atol=1e-6)
    others = torch.arange(kv.shape[3]) != slot
    assert torch.equal(mine[1].cpu()[:, :, :, others], kv[:, :, :, others])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_in_16_bit(kernel, dtype):
    slot, left = SLOTS + 20, torch.tensor([0, 7])
    qkv, kv, rope = next_token(2, 4, 2, 16, SLOTS + 30, dtype)
    exact, _ = attention(qkv.double(), kv.double(), rope.to(torch.complex128), slot, left, 4)
    plain, cache = attention(qkv, kv, rope, slot, left, 4)
    mine = place(kernel, qkv, kv, torch.view_as_real(rope), torch.tensor([slot]), left)
    assert_near(attend_next(*mine, 4, kernel), exact, plain)
    torch.testing.assert_close(mine[1].cpu(), cache)


def test_scores_far_from_zero_overflow_nothing(kernel):
    qkv, kv, rope = next_token(2, 2, 2, 16, SLOTS + 30)
    slot, left = SLOTS + 20, torch.zeros(2, dtype=torch.int64)
    qkv[:, :32] *= 300.0
    exact, _ = attention(qkv.double(), kv.double(), rope.to(torch.complex128), slot, left, 2)
    mine = place(kernel, qkv, kv, torch.view_as_real(rope), torch.tensor([slot]), left)
    torch.testing.assert_close(attend_next(*mine, 2, kernel).cpu().double(), exact, rtol=1e-3, atol=1e-3)


def test_no_rows(kernel):
    qkv, kv, rope = next_token(0, 2, 2, 16, 8)
    mine = place(kernel, qkv, kv, torch.view_as_real(rope), torch.tensor([3]), torch.zeros(0, dtype=torch.int64))
    assert attend_next(*mine, 2, kernel).shape == (0, 32)
    (empty,) = place(kernel, torch.zeros(0, 8))
    assert add_normalised(empty, empty, 1e-5, torch.float32, kernel).shape == (0, 8)
    assert gated(empty, kernel).shape == (0, 4)
