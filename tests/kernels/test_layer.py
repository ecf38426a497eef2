"""What a layer does between its products, forwards and backwards: kernels (on a GPU, or in Triton's interpreter) and
their torch twins, against PyTorch's own operators in float64; they may err twice as much as these do in the same dtype.
"""

import pytest
import torch
import torch.nn.functional as F

from fastsmart.kernels import layer
from fastsmart.kernels.layer import normalised_sum, rotated, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton"])
def kernel(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(layer, "PROGRAMS", 2)  # so that each walks over several tiles
        monkeypatch.setattr(layer, "TILE", 256)
        monkeypatch.setattr(layer, "FEATURES", 16)
    return request.param


def skip_truncation(kernel, dtype):
    if kernel == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(f, inputs, device="cpu", dtype=None):
    """Outputs of f and the gradients of its inputs, for gradients of the outputs that are always the same."""
    moved = [x.to(device, dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
    outputs = f(*moved)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    slopes = [normal(*o.shape, seed=9 + i).to(o.dtype).to(device, o.dtype) for i, o in enumerate(outputs)]
    torch.autograd.backward(list(outputs), slopes)
    return [*(o.detach().cpu() for o in outputs), *(x.grad.cpu() for x in moved)]


def assert_near(ours, plain, inputs, kernel, exact=None):
    """`plain(*inputs)` in float64 is what is right, in the inputs' dtype the yardstick."""
    where = DEVICE if kernel == "triton" else "cpu"
    truth = results(exact or plain, inputs, dtype=torch.float64)
    for found, yardstick, right in zip(results(ours, inputs, where), results(plain, inputs), truth, strict=True):
        assert found.dtype == yardstick.dtype
        slack = 2 * (yardstick.double() - right).abs().max() + 1e-6 * right.abs().max() + 1e-9
        assert (found.double() - right).abs().max() <= slack


# rows that fill their tiles and rows that do not; one row, one number
@pytest.mark.parametrize("shape", [(16, 64), (23, 100), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_the_sum(kernel, shape, dtype):
    skip_truncation(kernel, dtype)
    x, more, weight = normal(*shape), normal(*shape, seed=1, dtype=dtype), 1 + 0.1 * normal(shape[1], seed=2)

    def plain(x, more, weight):
        total = x + more
        normed = F.rms_norm(total, weight.shape, weight, 1e-5)
        return total, normed.to(dtype if more.dtype == dtype else torch.float64)

    assert_near(lambda *given: normalised_sum(*given, 1e-5, dtype, kernel), plain, (x, more, weight), kernel)


@pytest.mark.parametrize("only", [0, 1], ids=["sum alone", "norm alone"])
def test_one_of_the_two_results_may_go_unused(kernel, only):
    inputs = normal(9, 40), normal(9, 40, seed=1), normal(40, seed=2)

    def plain(x, more, weight):
        total = x + more
        # the weight is always asked for a gradient
        return (total + 0 * weight, F.rms_norm(total, weight.shape, weight, 1e-5))[only]

    def ours(x, more, weight):
        return (lambda pair: (pair[0] + 0 * weight, pair[1])[only])(
            normalised_sum(x, more, weight, 1e-5, torch.float32, kernel)
        )

    assert_near(ours, plain, inputs, kernel)


def test_a_norm_of_the_residual_alone(kernel):
    """The first of a network: x itself is handed on, and its gradient comes from both."""

    def ours(x, weight):
        same, normed = normalised_sum(x, None, weight, 1e-5, torch.float32, kernel)
        return same * 1.5, normed

    def plain(x, weight):
        return x * 1.5, F.rms_norm(x, weight.shape, weight, 1e-5)

    assert_near(ours, plain, (normal(11, 48), normal(48, seed=2)), kernel)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 16), (6, 2, 8), (2, 1, 12)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rotation(kernel, heads, kv_heads, size, dtype):
    """As transformers' Llama turns it, whose gradients come back with other strides than they went."""
    skip_truncation(kernel, dtype)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angle = normal(7, size // 2, seed=3)
    cos, sin = angle.cos(), angle.sin()
    qkv = normal(2, 7, heads + 2 * kv_heads, size, dtype=dtype)

    def plain(qkv):
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        tables = [torch.cat([t, t], -1)[None].to(qkv.dtype) for t in (cos, sin)]
        q, k = apply_rotary_pos_emb(q, k, *tables, unsqueeze_dim=2)
        return tuple(t.transpose(1, 2) for t in (q, k, v))

    def exact(qkv):
        first, second = qkv[:, :, : heads + kv_heads].chunk(2, dim=-1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        qk = torch.cat([first * c - second * s, second * c + first * s], -1)
        q, k = qk.split([heads, kv_heads], dim=2)
        return tuple(t.transpose(1, 2) for t in (q, k, qkv[:, :, heads + kv_heads :]))

    def ours(qkv):
        tables = cos.to(qkv.device), sin.to(qkv.device)
        return tuple(t.transpose(1, 2) for t in rotated(qkv, *tables, heads, kv_heads, kernel))

    assert_near(ours, plain, (qkv,), kernel, exact)


@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_product(kernel, width, dtype):
    skip_truncation(kernel, dtype)

    def plain(gate_up):
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up

    assert_near(lambda x: swiglu(x, kernel), plain, (4 * normal(3, 2 * width, dtype=dtype),), kernel)


def test_no_rows(kernel):
    device = DEVICE if kernel == "triton" else "cpu"
    x, weight = torch.zeros(0, 8, device=device, requires_grad=True), torch.ones(8, device=device, requires_grad=True)
    total, normed = normalised_sum(x, x.detach(), weight, 1e-5, torch.float32, kernel)
    gate = torch.zeros(0, 6, device=device, requires_grad=True)
    (total.sum() + normed.sum() + swiglu(gate, kernel).sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert (x.grad.shape, gate.grad.shape) == ((0, 8), (0, 6))
