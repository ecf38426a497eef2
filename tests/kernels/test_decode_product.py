"""A decode step's products (on a GPU, or in Triton's interpreter) and their torch twins, against PyTorch's own
operators in float64; they may err twice as much as these do in the same dtype."""

import pytest
import torch
import torch.nn.functional as F
from test_decode_step import assert_near, normal, place

from fastsmart.kernels import decode_product
from fastsmart.kernels.decode_product import Tile, added_product, gated_product, normalised_product, serves

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(3, 64, 48), (17, 48, 80), (40, 640, 24)]  # rows, inputs, outputs; borders inside a tile, several tiles
EPSILON = 1e-5


@pytest.fixture(params=["torch", "triton"])
def kernel(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def normalised(x):
    return F.rms_norm(x, x.shape[1:], eps=EPSILON)


def problem(shape, dtype, seed=0, factor=1):
    rows, inputs, outputs = shape
    x = 3 * normal(rows, inputs, seed=seed, dtype=dtype)
    return x, (normal(factor * outputs, inputs, seed=seed + 1) / inputs**0.5).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_normalised_product(kernel, shape, dtype):
    """Of rows, and of rows of a table."""
    x, weight = problem(shape, dtype)
    ids = torch.randint(len(x), (5,), generator=torch.Generator().manual_seed(0))
    mine, held, names = place(kernel, x, weight, ids)
    for rows, found in (
        (x, normalised_product(mine, held, EPSILON, kernel=kernel)),
        (x[ids], normalised_product(mine, held, EPSILON, names, kernel=kernel)),
    ):
        assert_near(found, normalised(rows.double()) @ weight.double().t(), normalised(rows) @ weight.t())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_heads_product_is_one_of_float32_and_moves_on(kernel, shape, dtype):
    x, weight = problem(shape, dtype)
    weight = normal(*weight.shape, seed=2) / shape[1] ** 0.5
    mine, held, counters = place(kernel, x, weight, torch.tensor([7, 300]))
    found = normalised_product(mine, held, EPSILON, place=counters, kernel=kernel)
    exact = normalised(x.double()) @ weight.double().t()
    assert_near(found, exact, normalised(x.float()) @ weight.t())
    assert counters.tolist() == [8, 301]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_product(kernel, shape, dtype):
    x, weight = problem(shape, dtype, factor=2)

    def units(x, weight):
        gate, up = (normalised(x) @ weight.t()).chunk(2, dim=1)
        return F.silu(gate) * up

    found = gated_product(*place(kernel, x, weight), EPSILON, kernel)
    assert_near(found, units(x.double(), weight.double()), units(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_added(kernel, shape, dtype):
    """In place; or to rows of a table, which stays as it is."""
    x, weight = problem(shape, dtype)
    table = normal(len(x) + 2, shape[2], seed=3, dtype=dtype)
    ids = torch.randint(len(table), (len(x),), generator=torch.Generator().manual_seed(0))
    mine, held, rows, names = place(kernel, x, weight, table, ids)
    found = added_product(rows, mine, held, names, kernel)
    assert_near(found, table[ids].double() + x.double() @ weight.double().t(), table[ids] + x @ weight.t())
    assert torch.equal(rows.cpu(), table)
    before = table[: len(x)]
    residual = rows[: len(x)]
    assert added_product(residual, mine, held, kernel=kernel) is residual
    assert_near(residual, before.double() + x.double() @ weight.double().t(), before + x @ weight.t())


@pytest.mark.parametrize("tile", [Tile(16, 16, 64, 4), Tile(32, 16, 128, 2), Tile(16, 32, 256, 8)], ids=str)
def test_whatever_the_tile(monkeypatch, tile):
    """Inputs taken at once or in several passes, the last of them not full."""
    pytest.importorskip("triton")
    monkeypatch.setattr(decode_product, "choose_tile", lambda *_: tile)
    x, weight = problem((20, 208, 40), torch.float16)
    exact = normalised(x.double()) @ weight.double().t()
    found = normalised_product(*place("triton", x, weight), EPSILON, kernel="triton")
    assert_near(found, exact, normalised(x) @ weight.t())


def test_no_rows(kernel):
    empty, weight, gates = place(
        kernel, *(torch.zeros(shape, dtype=torch.float16) for shape in ((0, 32), (16, 32), (64, 32)))
    )
    assert normalised_product(empty, weight, EPSILON, kernel=kernel).shape == (0, 16)
    assert gated_product(empty, gates, EPSILON, kernel).shape == (0, 32)
    assert added_product(empty, empty, gates[:32], kernel=kernel).shape == (0, 32)


def test_who_is_served():
    """Few rows of 16 bit on a GPU."""
    cpu = torch.device("cpu")
    assert not serves(64, torch.bfloat16, cpu)
    pytest.importorskip("triton")
    gpu = torch.device("cuda")
    assert serves(decode_product.MOST_ROWS, torch.bfloat16, gpu)
    assert not serves(decode_product.MOST_ROWS + 1, torch.bfloat16, gpu)
    assert not serves(64, torch.float32, gpu)
