"""Drawing a token: the torch twin and Triton's kernel (on a GPU, or in its interpreter) against numpy in float64."""

import numpy as np
import pytest
import torch

from fastsmart.kernels.sample import UNDEFINED, WIDEST, sample_next, sample_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def draw(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    device = DEVICE if request.param == "triton" else "cpu"

    def run(logits, uniform, temperature=1.0):
        got = sample_tokens(logits.to(device), uniform.to(device), temperature, request.param)
        return tuple(x.cpu() for x in got)

    return run


def problem(rows, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(3 * rng.standard_normal((rows, vocabulary), np.float32))
    return logits, torch.from_numpy(rng.random(rows, np.float32))


# a column to spare in every block; none; one row of a single token
@pytest.mark.parametrize(("rows", "vocabulary"), [(300, 413), (20, 1024), (3, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_inverts_the_cumulative_distribution(draw, rows, vocabulary, temperature):
    logits, uniform = problem(rows, vocabulary)
    token, logprob = draw(logits, uniform, temperature)
    x = logits.double().numpy() / temperature
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    above = p.cumsum(1)[np.arange(rows), token]
    below = above - p[np.arange(rows), token]
    slack = 1e-6  # p in float32 moves the borders by so much
    assert (below - slack <= uniform.numpy()).all()
    assert (uniform.numpy() < above + slack).all()
    np.testing.assert_allclose(logprob, np.log(p[np.arange(rows), token]), rtol=1e-5, atol=2e-6)


def test_the_kernel_draws_what_the_twin_draws():
    pytest.importorskip("triton")
    logits, uniform = problem(1000, 413, seed=1)
    token, logprob = sample_tokens(logits, uniform, 0.9, "torch")
    again = [x.cpu() for x in sample_tokens(logits.to(DEVICE), uniform.to(DEVICE), 0.9, "triton")]
    same = token == again[0]
    assert same.sum() >= 998  # a number on a border may fall on either side of it
    torch.testing.assert_close(again[1][same], logprob[same], rtol=1e-5, atol=2e-6)


def test_what_is_impossible_is_never_drawn(draw):
    logits = torch.zeros(3, 413)
    logits[:, [0, 1, 412]] = -torch.inf
    token, logprob = draw(logits, torch.tensor([0.0, 1 - 2**-24, 0.5]))
    assert token.tolist() == [2, 411, 207]
    torch.testing.assert_close(logprob, torch.full((3,), -float(np.log(410))))


def test_a_row_does_not_depend_on_its_neighbours(draw):
    logits, uniform = problem(40, 413)
    whole, alone = draw(logits, uniform), draw(logits[7:8], uniform[7:8])
    assert (whole[0][7], whole[1][7]) == (alone[0][0], alone[1][0])


def test_a_distribution_that_is_not_one(draw):
    logits, uniform = problem(4, 413)
    logits[1, 5], logits[2, 5], logits[3] = torch.nan, torch.inf, -torch.inf
    token, _ = draw(logits, uniform)
    assert token[0] != UNDEFINED
    assert token[1:].tolist() == [UNDEFINED] * 3


def test_a_wide_vocabulary_takes_the_twin():
    pytest.importorskip("triton")
    logits, uniform = problem(3, WIDEST + 1)
    logits, uniform = logits.to(DEVICE), uniform.to(DEVICE)
    asked, twin = (sample_tokens(logits, uniform, 1.0, kernel) for kernel in ("triton", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(asked, twin, strict=True))


def test_no_rows(draw):
    token, logprob = draw(torch.zeros(0, 413), torch.zeros(0))
    assert token.shape == logprob.shape == (0,)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("vocabulary", [413, WIDEST + 1])
def test_the_next_token_goes_where_it_belongs(kernel, vocabulary):
    if kernel == "triton":
        pytest.importorskip("triton")
    device, columns, column = DEVICE if kernel == "triton" else "cpu", 5, 3
    logits, _ = problem(6, vocabulary)
    logits[2] = torch.nan
    uniform = problem(6, columns, seed=1)[0].sigmoid()
    ids, logprobs = torch.full((6, columns), 7, dtype=torch.int32), torch.full((6, columns), 7.0)
    token = torch.full((6,), 7)
    places = [t.to(device) for t in (logits, uniform, torch.tensor([column]), ids, logprobs, token)]
    sample_next(*places, 0.9, kernel)
    *_, ids, logprobs, token = (t.cpu() for t in places)
    wanted, logprob = sample_tokens(logits, uniform[:, column], 0.9, "torch")
    assert wanted[2] == UNDEFINED
    assert ids[:, column].tolist() == wanted.tolist()
    assert token.tolist() == wanted.clamp(min=0).tolist()
    defined = wanted != UNDEFINED
    torch.testing.assert_close(logprobs[defined, column], logprob[defined], rtol=1e-5, atol=2e-6)
    others = torch.arange(columns) != column
    assert (ids[:, others] == 7).all()
    assert (logprobs[:, others] == 7.0).all()
