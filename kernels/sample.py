"""One token a row by inverting its cumulative distribution, with its log-prob, in one kernel.

For R = 64 rows of V = 413 logits that is 106 KB: the floor is one launch a decode step, where the twin makes nine.
Shape letters: R rows, V vocabulary, C tokens of each row at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, overlapped, tl

WIDEST = 4096  # logits a Triton program holds; wider vocabularies take the twin
UNDEFINED = -1


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Ids int64 [R] drawn from softmax(logits / temperature), and their log-probs float32 [R].

    logits [R, V] float32 (−inf = impossible), uniform [R] float32 in [0, 1): a draw depends on its own row and number
    alone. A row whose distribution is not finite gives `UNDEFINED` as its id. `kernel`: "torch", "triton",
    or "auto" = Triton on a GPU.
    """
    if choose_kernel(kernel, logits.device) == "triton" and logits.shape[1] <= WIDEST:
        return _triton_sample(logits, uniform, temperature)
    return _torch_sample(logits, uniform, temperature)


def sample_next(
    logits: Tensor,
    uniform: Tensor,
    column: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    token: Tensor,
    temperature: float = 1.0,
    kernel: str = "auto",
) -> None:
    """`sample_tokens` by uniform[:, column], into ids[:, column] and logprobs[:, column]: for a step that is replayed.

    uniform, ids, logprobs : float32, int32, float32 [R, C], contiguous
    column                 : int64 [1]
    token                  : int64 [R], gets the ids too, 0 for `UNDEFINED`, so that they can be fed to the policy
    """
    rows, vocabulary = logits.shape
    if choose_kernel(kernel, logits.device) != "triton" or vocabulary > WIDEST:
        _torch_sample_next(logits, uniform, column, ids, logprobs, token, temperature)
    elif rows:
        _sample_next[(rows,)](
            logits.contiguous(),
            uniform,
            column,
            ids,
            logprobs,
            token,
            vocabulary,
            uniform.shape[1],
            TEMPERATURE=temperature,
            UNDEFINED=UNDEFINED,
            BLOCK=next_power_of_2(vocabulary),
            **overlapped(logits.device),
        )


# ------------------------------------------------------------------------------------------------------- torch twins


def _torch_sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if temperature != 1.0:
        logits = logits / temperature
    logprob = logits.log_softmax(-1)
    cumulative = logprob.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # uniform <= 1 - 2^-24, so in float64 the product stays below the total and the draw below V
    token = torch.searchsorted(cumulative, uniform.double()[:, None] * total, right=True)
    token = torch.where(total.isfinite(), token, UNDEFINED)
    return token[:, 0], logprob.gather(-1, token.clamp(min=0))[:, 0]


def _torch_sample_next(
    logits: Tensor,
    uniform: Tensor,
    column: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    token: Tensor,
    temperature: float,
) -> None:
    drawn, logprob = _torch_sample(logits, uniform.index_select(1, column)[:, 0], temperature)
    ids.index_copy_(1, column, drawn.int()[:, None])
    logprobs.index_copy_(1, column, logprob[:, None])
    token.copy_(drawn.clamp_min(0))


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _drawn(logits, uniform, vocabulary, TEMPERATURE: tl.constexpr, UNDEFINED: tl.constexpr, BLOCK: tl.constexpr):
    """Id and log-prob of one row of V <= BLOCK logits."""
    column = tl.arange(0, BLOCK)
    inside = column < vocabulary
    x = tl.load(logits + column, mask=inside, other=0.0) / TEMPERATURE
    x = tl.where(inside, x, -float("inf"))
    d = x - tl.max(x, axis=0)
    log_p = d - tl.log(tl.sum(tl.exp(d), axis=0))
    p = tl.exp(log_p).to(tl.float64)
    total = tl.sum(p, axis=0)
    below = tl.cumsum(p, axis=0) <= uniform.to(tl.float64) * total
    token = tl.sum((below & inside).to(tl.int32), axis=0)
    chosen = tl.sum(tl.where(column == token, log_p, 0.0), axis=0)
    return tl.where(total < float("inf"), token, UNDEFINED), chosen


@jit
def _sample(
    logits, uniform, ids, logprob, vocabulary, TEMPERATURE: tl.constexpr, UNDEFINED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    number = tl.load(uniform + row)
    token, chosen = _drawn(logits + row * vocabulary, number, vocabulary, TEMPERATURE, UNDEFINED, BLOCK)
    tl.store(ids + row, token)
    tl.store(logprob + row, chosen)


@jit
def _sample_next(
    logits,
    uniform,
    column,
    ids,
    logprobs,
    token,
    vocabulary,
    columns,
    TEMPERATURE: tl.constexpr,
    UNDEFINED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    at = row * columns + tl.load(column)
    number = tl.load(uniform + at)
    drawn, chosen = _drawn(logits + row * vocabulary, number, vocabulary, TEMPERATURE, UNDEFINED, BLOCK)
    tl.store(ids + at, drawn)
    tl.store(logprobs + at, chosen)
    tl.store(token + row, tl.maximum(drawn, 0))


def _triton_sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    rows, vocabulary = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, device=logits.device)
    if rows:
        _sample[(rows,)](
            logits.contiguous(),
            uniform.contiguous(),
            ids,
            logprob,
            vocabulary,
            TEMPERATURE=temperature,
            UNDEFINED=UNDEFINED,
            BLOCK=next_power_of_2(vocabulary),
        )
    return ids, logprob


_CONSTANTS = {"TEMPERATURE": 1.0, "UNDEFINED": UNDEFINED, "BLOCK": 512}
_TYPES = {"logits": "*fp32", "uniform": "*fp32", "vocabulary": "i32"}
_NEXT = {"column": "*i64", "ids": "*i32", "logprobs": "*fp32", "token": "*i64", "columns": "i32"}
SHIPPED = [
    Shipped("sample, V 413", _sample, _TYPES | {"ids": "*i64", "logprob": "*fp32"}, _CONSTANTS),
    Shipped("sample next, V 413", _sample_next, _TYPES | _NEXT, _CONSTANTS, aligned=("columns",)),  # 256
]
