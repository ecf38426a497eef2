"""The torch twin of the log-prob kernel: the definition of right for every other one.

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
from fastsmart.kernels.logprob import logprob

V_SMART = 413


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


def both_paths(monkeypatch, path):
    """Probabilities kept (small vocabulary) or recomputed (large); 3 rows a chunk, so that borders matter."""
    monkeypatch.setattr(kernel, "MIN_ROWS", 3)
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(kernel, "KEEP_ELEMENTS", 2**24 if path == "kept" else 0)


# one row; exactly one chunk; one row into the next chunk; several chunks; a vocabulary of one
@pytest.mark.parametrize(("m", "v"), [(1, 17), (3, 17), (4, 17), (20, V_SMART), (5, 1)])
@pytest.mark.parametrize("path", ["kept", "recomputed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_log_softmax_in_fp64(monkeypatch, m, v, path, temperature):
    both_paths(monkeypatch, path)
    hidden, weight, ids = problem(m, v, 8)
    got, want = logprob(hidden, weight, ids, temperature), plain(hidden, weight, ids, temperature)
    for name, a, b in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    cotangents = torch.randn(3, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        gradients(logprob, hidden, weight, ids, cotangents, temperature),
        gradients(plain, hidden, weight, ids, cotangents, temperature),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", ["kept", "recomputed"])
def test_gradcheck(monkeypatch, path):
    both_paths(monkeypatch, path)
    hidden, weight, ids = problem(7, 11, 4)
    hidden.requires_grad_(), weight.requires_grad_()
    for output in range(3):
        assert torch.autograd.gradcheck(lambda h, w, o=output: logprob(h, w, ids, 0.8)[o], (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: tuple(logprob(h, w, ids)), (hidden, weight))


@pytest.mark.parametrize("path", ["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_twice_pytorchs_own(monkeypatch, path, dtype):
    """Against fp64 on the same (rounded) inputs; 16-bit inputs get the fp32 computation, so fp32 is the yardstick."""
    both_paths(monkeypatch, path)
    hidden, weight, ids = problem(64, V_SMART, 32, dtype)
    hidden, weight = hidden * 4, weight * 4  # logits of about ±50: peaked rows and flat ones
    cotangents = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    exact = [x.double() for x in (hidden, weight)]
    single = [x.float() for x in (hidden, weight)]

    def errors(results, truths):
        return [(r.double() - t).abs().max().item() for r, t in zip(results, truths, strict=True)]

    truth = plain(*exact, ids)
    for ours, theirs in zip(
        errors(logprob(hidden, weight, ids), truth), errors(plain(*single, ids), truth), strict=True
    ):
        assert ours <= 2 * theirs
    got = gradients(logprob, hidden, weight, ids, cotangents)
    assert [g.dtype for g in got] == [dtype, dtype]
    truth = gradients(plain, *exact, ids, cotangents)
    native = gradients(plain, *single, ids, cotangents)
    native = [g.to(dtype) for g in native]  # our gradients are rounded to the input's dtype too
    for ours, theirs in zip(errors(got, truth), errors(native, truth), strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("path", ["kept", "recomputed"])
def test_extreme_logits(monkeypatch, path):
    both_paths(monkeypatch, path)
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
    # one-hot hidden states pick a column of the weight; −inf times 0 would be NaN, so 1e38 overflows to −inf instead
    weight = torch.where(rows.isinf(), -1e38, rows / 10).t().contiguous().requires_grad_()
    hidden = (10 * torch.eye(4)).requires_grad_()
    got = logprob(hidden, weight, ids)
    log = torch.log(torch.tensor([v, 2.0, 4.0, 1.0]))
    assert (hidden @ weight.t()).isinf().sum() == 7
    torch.testing.assert_close(got.logprob, torch.tensor([-log[0], -log[1], -torch.inf, 0.0]))
    torch.testing.assert_close(got.entropy, log)
    torch.testing.assert_close(got.logsumexp, torch.tensor([log[0], 1e4 + log[1], log[2], 3.0]))

    (grad,) = torch.autograd.grad(got.logprob.sum() + got.entropy.sum() + got.logsumexp.sum(), weight)
    # entropy is flat in all four rows, and logsumexp adds p to onehot − p: what is left is 10 · onehot
    want = torch.zeros(v, 4)
    want[2] = 10.0
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", ["kept", "recomputed"])
def test_no_rows(monkeypatch, path):
    both_paths(monkeypatch, path)
    hidden, weight, ids = problem(0, 17, 4, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    got = logprob(hidden, weight, ids)
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
    keep=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_any_chunk(m, v, d, rows, keep, seed):
    hidden, weight, ids = problem(m, v, d, seed=seed)
    cotangents = torch.randn(3, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    want = (*plain(hidden, weight, ids), *gradients(plain, hidden, weight, ids, cotangents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "MIN_ROWS", rows)
        patch.setattr(kernel, "CHUNK_ELEMENTS", 1)
        patch.setattr(kernel, "KEEP_ELEMENTS", 2**24 if keep else 0)
        got = (*logprob(hidden, weight, ids), *gradients(logprob, hidden, weight, ids, cotangents))
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


def test_peak_memory_is_a_chunk_not_the_logits():
    """V = 151,936 (a large language model's), 1,024 tokens: the full fp32 logits would be 594 MiB."""
    script = textwrap.dedent("""
        import resource, torch
        from fastsmart.kernels.logprob import logprob
        torch.set_num_threads(1)

        def step(m, v, d=4):
            hidden = torch.randn(m, d, requires_grad=True)
            weight = torch.randn(v, d, requires_grad=True)
            logprob(hidden, weight, torch.randint(v, (m,))).logprob.sum().backward()

        step(8, 100)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(1024, 151_936)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak_mib = int(run.stdout) / 1024
    assert peak_mib < 594 / 4
