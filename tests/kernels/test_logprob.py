"""The log-prob kernels: the torch twin, and Triton's on a GPU or in Triton's interpreter, against PyTorch's own.

Shape letters: M tokens, D hidden width, V vocabulary.
"""

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmart.kernels import logprob as kernel
from fastsmart.kernels import logprob_tiles
from fastsmart.kernels.logprob import logprob

V_SMART = 413
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(m, v, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator) / d**0.5
    ids = torch.randint(v, (m,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), ids


def plain(hidden, weight, ids, temperature=1.0):
    """The same three numbers by PyTorch's own functions on the full logits, in the inputs' dtype."""
    logits = hidden @ weight.t() / temperature
    log_p = torch.log_softmax(logits, dim=-1)
    chosen = log_p.gather(1, ids[:, None]).squeeze(1)
    return chosen, -(log_p.exp() * log_p).sum(-1), torch.logsumexp(logits, dim=-1)


def gradients(f, hidden, weight, ids, cotangents, temperature=1.0):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    outputs = f(hidden, weight, ids, temperature)
    torch.autograd.backward(list(outputs), [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    return hidden.grad, weight.grad


def small_chunks(patch, path, rows=3, columns=100):
    """What the backward pass needs is kept (M·V small) or made again (large), in whole rows or in tiles; few rows a
    chunk and few columns a tile, so borders matter."""
    patch.setattr(kernel, "WIDE", 1 if path == "tiles" else 2**31)
    patch.setattr(logprob_tiles, "TILE_ROWS", rows)
    patch.setattr(logprob_tiles, "TILE_COLUMNS", columns)
    patch.setattr(kernel, "MIN_ROWS", rows)
    patch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    patch.setattr(kernel, "GPU_CHUNK_ELEMENTS", 1)
    patch.setattr(kernel, "KEEP_ELEMENTS", 2**24 if path == "kept" else 0)


def on_its_device(name):
    """`logprob` by one implementation: the torch twin on the CPU, Triton on a GPU or in its interpreter."""

    def run(hidden, weight, ids, temperature=1.0):
        device = DEVICE if name == "triton" else "cpu"
        got = logprob(hidden.to(device), weight.to(device), ids.to(device), temperature, name)
        return type(got)(*(x.cpu() for x in got))

    return run


@pytest.fixture(params=["torch, kept", "torch, recomputed", "torch, tiles", "triton, kept", "triton, recomputed"])
def ours(request, monkeypatch):
    name, path = request.param.split(", ")
    if name == "triton":
        pytest.importorskip("triton")
    small_chunks(monkeypatch, path)
    return on_its_device(name)


# one row; exactly one chunk; one row into the next chunk; several chunks; a vocabulary of one
@pytest.mark.parametrize(("m", "v"), [(1, 17), (3, 17), (4, 17), (20, V_SMART), (5, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax_in_fp64(ours, m, v, temperature):
    hidden, weight, ids = problem(m, v, 8)
    got, want = ours(hidden, weight, ids, temperature), plain(hidden, weight, ids, temperature)
    for name, a, b in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    cotangents = torch.randn(3, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        gradients(ours, hidden, weight, ids, cotangents, temperature),
        gradients(plain, hidden, weight, ids, cotangents, temperature),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", ["kept", "recomputed", "tiles"])
def test_gradcheck(monkeypatch, path):
    small_chunks(monkeypatch, path, columns=4)
    hidden, weight, ids = problem(7, 11, 4)
    hidden.requires_grad_(), weight.requires_grad_()
    for output in range(3):
        assert torch.autograd.gradcheck(lambda h, w, o=output: logprob(h, w, ids, 0.8)[o], (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: tuple(logprob(h, w, ids)), (hidden, weight))


# What each size covers. Triton: several rows a program with columns to spare (17, 413) and without (1,024), one whole
# row a program (4,096), and rows walked block by block: seven full blocks and a rest (32,000), many (151,936).
@pytest.mark.parametrize(
    ("v", "m", "temperature", "dtype"),
    [
        (17, 63, 1.0, torch.float32),
        (17, 63, 0.7, torch.float16),
        (V_SMART, 63, 0.7, torch.float32),
        (V_SMART, 63, 1.0, torch.bfloat16),
        (V_SMART, 63, 1.0, torch.float16),
        (1024, 33, 1.0, torch.float32),
        (4096, 9, 0.7, torch.float32),
        (4096, 9, 1.0, torch.bfloat16),
        (32_000, 3, 0.7, torch.float32),
        (32_000, 3, 1.0, torch.float16),
        (151_936, 3, 1.0, torch.float32),
        (151_936, 3, 0.7, torch.bfloat16),
    ],
)
def test_error_at_most_twice_pytorchs_own(ours, v, m, temperature, dtype):
    """Against fp64 on the same (rounded) inputs; 16-bit inputs get the fp32 computation, so fp32 is the yardstick.

    Where PyTorch is lucky to err by less, one rounding of the largest number is the yardstick.
    """
    hidden, weight, ids = problem(m, v, 16, dtype)
    hidden, weight = hidden * 4, weight * 4  # logits of about ±50: peaked rows and flat ones
    hidden[m // 2 :] /= 16
    cotangents = torch.randn(3, m, generator=torch.Generator().manual_seed(2))
    exact = [x.double() for x in (hidden, weight)]
    single = [x.float() for x in (hidden, weight)]

    def compare(got, native, truth, dtype):
        for a, b, t in zip(got, native, truth, strict=True):
            error, yardstick = ((x.double() - t).abs().max() for x in (a, b))
            assert error <= 2 * torch.maximum(yardstick, torch.finfo(dtype).eps * t.abs().max())

    compare(
        ours(hidden, weight, ids, temperature),
        plain(*single, ids, temperature),
        plain(*exact, ids, temperature),
        torch.float32,
    )
    got = gradients(ours, hidden, weight, ids, cotangents, temperature)
    assert [g.dtype for g in got] == [dtype, dtype]
    native = gradients(plain, *single, ids, cotangents, temperature)
    native = [g.to(dtype) for g in native]  # our gradients are rounded to the input's dtype too
    compare(got, native, gradients(plain, *exact, ids, cotangents, temperature), dtype)


@pytest.mark.parametrize("padding", [0, 5000], ids=["whole rows", "walked rows"])
def test_extreme_logits(ours, padding):
    """With `padding`, every row ends in so many impossible tokens."""
    v = 6
    ids = torch.tensor([2, 2, 2, 2])
    rows = torch.tensor(
        [
            [0.0] * v,  # all equal
            [1e4, 0.0, 1e4, 0.0, -1e4, 0.0],  # exp would overflow
            [0.0, 0.0, -torch.inf, -torch.inf, 0.0, 0.0],  # the chosen one impossible
            [-torch.inf, -torch.inf, 3.0, -torch.inf, -torch.inf, -torch.inf],  # the chosen one certain
        ]
    )
    rows = torch.cat([rows, torch.full((4, padding), -torch.inf)], dim=1)
    # one-hot hidden states pick a column of the weight; −inf times 0 would be NaN, so 1e38 overflows to −inf instead
    weight = torch.where(rows.isinf(), -1e38, rows / 10).t().contiguous().requires_grad_()
    hidden = (10 * torch.eye(4)).requires_grad_()
    got = ours(hidden, weight, ids)
    log = torch.log(torch.tensor([v, 2.0, 4.0, 1.0]))
    assert (hidden @ weight.t()).isinf().sum() == 7 + 4 * padding
    torch.testing.assert_close(got.logprob, torch.tensor([-log[0], -log[1], -torch.inf, 0.0]))
    torch.testing.assert_close(got.entropy, log)
    torch.testing.assert_close(got.logsumexp, torch.tensor([log[0], 1e4 + log[1], log[2], 3.0]))

    (grad,) = torch.autograd.grad(got.logprob.sum() + got.entropy.sum() + got.logsumexp.sum(), weight)
    # entropy is flat in all four rows, and logsumexp adds p to onehot − p: what is left is 10 · onehot
    want = torch.zeros(v + padding, 4)
    want[2] = 10.0
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("v", [17, 5000], ids=["whole rows", "walked rows"])
def test_nothing_but_impossible_tokens_is_nan(ours, v):
    weight = torch.full((v, 1), -1e38)
    got = ours(torch.tensor([[10.0], [0.0]]), weight, torch.tensor([1, 1]))
    assert all(x[0].isnan() for x in got)
    assert all(x[1].isfinite() for x in got)  # a neighbour with all logits alike


@pytest.mark.parametrize("v", [17, 5000], ids=["whole rows", "walked rows"])
def test_an_impossible_first_block_does_no_harm(ours, v):
    weight = torch.full((v, 1), -1e38)
    weight[-2:] = 0.0
    got = ours(torch.tensor([[10.0]]), weight, torch.tensor([v - 1]))
    want = torch.log(torch.tensor([2.0]))
    for x, sign in zip(got, (-1, 1, 1), strict=True):
        torch.testing.assert_close(x, sign * want)


@pytest.mark.parametrize("v", [V_SMART, 5000], ids=["whole rows", "walked rows"])
def test_every_number_is_written(ours, v):
    """Uninitialised memory is NaN here, so that what a kernel leaves out shows."""
    hidden, weight, ids = problem(7, v, 4, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert hidden.new_empty(3).isnan().all()
        got = (*ours(hidden, weight, ids), *gradients(ours, hidden, weight, ids, torch.ones(3, 7)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("v", [300, 5000], ids=["whole rows", "walked rows"])
def test_tokens_far_below_the_rest_count_for_nothing(ours, v):
    """Far enough that their number times the distance would overflow."""
    weight = torch.zeros(v, 1)
    weight[v // 3 :] = -1e37
    got = ours(torch.ones(1, 1), weight, torch.tensor([0]))
    want = torch.log(torch.tensor([float(v // 3)]))
    for x, sign in zip(got, (-1, 1, 1), strict=True):
        torch.testing.assert_close(x, sign * want)


def test_no_rows(ours):
    hidden, weight, ids = problem(0, 17, 4, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    got = ours(hidden, weight, ids)
    assert [x.shape for x in got] == [(0,)] * 3
    got.logprob.sum().backward()
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(weight.grad, torch.zeros(17, 4))


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, ids = problem(9, 17, 4)
    for flags in ((True, False), (False, True)):
        h, w = hidden.clone().requires_grad_(flags[0]), weight.clone().requires_grad_(flags[1])
        logprob(h, w, ids).logprob.sum().backward()
        assert (h.grad is not None, w.grad is not None) == flags
    with torch.no_grad():
        assert not logprob(hidden.requires_grad_(), weight, ids).logprob.requires_grad


def test_autocast_does_not_lower_the_precision():
    hidden, weight, ids = problem(50, V_SMART, 16, torch.float32)
    cotangents = torch.ones(3, 50)
    want, want_grad = logprob(hidden, weight, ids), gradients(logprob, hidden, weight, ids, cotangents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, got_grad = logprob(hidden, weight, ids), gradients(logprob, hidden, weight, ids, cotangents)
    for a, b in zip((*got, *got_grad), (*want, *want_grad), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 12),
    v=st.integers(1, 40),
    d=st.integers(1, 9),
    rows=st.integers(1, 14),
    columns=st.integers(1, 41),
    way=st.sampled_from(["torch, kept", "torch, recomputed", "torch, tiles", "triton, kept", "triton, recomputed"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_any_chunk(m, v, d, rows, columns, way, seed):
    name, path = way.split(", ")
    hidden, weight, ids = problem(m, v, d, seed=seed)
    cotangents = torch.randn(3, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    want = (*plain(hidden, weight, ids), *gradients(plain, hidden, weight, ids, cotangents))
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, path, rows, columns)
        run = on_its_device(name)
        got = (*run(hidden, weight, ids), *gradients(run, hidden, weight, ids, cotangents))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rows_do_not_depend_on_their_neighbours():
    """Packing is free: any order and any split of the rows gives the same numbers up to the GEMM's own rounding."""
    hidden, weight, ids = problem(3000, V_SMART, 32, torch.float32)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(3))
    whole = torch.stack(list(logprob(hidden, weight, ids)))
    shuffled = torch.stack(list(logprob(hidden[order], weight, ids[order])))
    parts = [torch.stack(list(logprob(hidden[a:b], weight, ids[a:b]))) for a, b in ((0, 700), (700, 701), (701, 3000))]
    torch.testing.assert_close(shuffled, whole[:, order], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=2e-6)


def test_refuses_what_does_not_fit():
    hidden, weight, ids = problem(4, 17, 3)
    with pytest.raises(ValueError, match=r"hidden \[M, D\]"):
        logprob(hidden, weight[:, :2], ids)
    with pytest.raises(ValueError, match=r"ids \[M\]"):
        logprob(hidden, weight, ids[:2])
    with pytest.raises(ValueError, match="temperature above 0"):
        logprob(hidden, weight, ids, 0.0)
    with pytest.raises((IndexError, RuntimeError)):
        logprob(hidden, weight, ids + 17)
    for wrong in (-1, kernel.WIDE):
        with pytest.raises(IndexError):
            logprob(torch.zeros(1, 1), torch.zeros(kernel.WIDE, 1), torch.tensor([wrong]))


def test_an_unknown_id_is_nan_where_it_cannot_raise():
    pytest.importorskip("triton")
    for v in (17, 5000):
        hidden, weight, _ = problem(3, v, 3)
        got = on_its_device("triton")(hidden, weight, torch.tensor([-1, 0, v]))
        assert got.logprob.isnan().tolist() == [True, False, True]


PEAK_MEMORY = textwrap.dedent("""
    import sys, torch
    from fastsmart.kernels.logprob import logprob
    torch.set_num_threads(1)

    def plain(hidden, weight, ids):
        return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, ids[:, None])

    def step(f, m, v, d=4):
        hidden, weight = torch.randn(m, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
        f(hidden, weight, torch.randint(v, (m,))).sum().backward()

    def peak_kib():  # not ru_maxrss, which begins with that of the process that started this one
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    f = plain if sys.argv[1] == "plain" else lambda *args: logprob(*args).logprob
    step(f, 8, 100)
    before = peak_kib()
    step(f, int(sys.argv[2]), 151_936)
    print(peak_kib() - before)
""")


def peak_mib(what, tokens):
    """Growth of the resident set over loss and backward pass at V = 151,936, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", PEAK_MEMORY, what, str(tokens)], capture_output=True, text=True, check=True
    )
    return int(run.stdout) / 1024


def test_peak_memory_is_a_chunk_not_the_logits():
    """The full logits grow with the tokens; 1,024 of them already show it."""
    assert peak_mib("ours", 1024) < 4 * peak_mib("plain", 256) / 8


@pytest.mark.slow
def test_peak_memory_of_8192_tokens():
    assert peak_mib("ours", 8192) < 32 * peak_mib("plain", 256) / 8


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    v, m, d = 151_936, 8192, 64
    hidden = torch.randn(m, d, device="cuda", requires_grad=True)
    weight = torch.randn(v, d, device="cuda", requires_grad=True)
    ids = torch.randint(v, (m,), device="cuda")
    peaks = []
    for f in (lambda *x: logprob(*x).logprob, lambda *x: plain(*x)[0]):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f(hidden, weight, ids).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        hidden.grad = weight.grad = None
    assert peaks[0] < peaks[1] / 8
