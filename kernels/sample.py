"""One token a row by inverting its cumulative distribution, with its log-prob, in one kernel.

For R = 64 rows of V = 413 logits that is 106 KB: the floor is one launch a decode step, where the twin makes nine.
Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmart.kernels.jit import Shipped, choose_kernel, jit, next_power_of_2, tl

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


# ------------------------------------------------------------------------------------------------------- torch twin


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


# ---------------------------------------------------------------------------------------------------- Triton kernel


@jit
def _sample(
    logits, uniform, ids, logprob, vocabulary, TEMPERATURE: tl.constexpr, UNDEFINED: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of V <= BLOCK logits."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < vocabulary
    x = tl.load(logits + row * vocabulary + column, mask=inside, other=0.0) / TEMPERATURE
    x = tl.where(inside, x, -float("inf"))
    d = x - tl.max(x, axis=0)
    log_p = d - tl.log(tl.sum(tl.exp(d), axis=0))
    p = tl.exp(log_p).to(tl.float64)
    total = tl.sum(p, axis=0)
    below = tl.cumsum(p, axis=0) <= tl.load(uniform + row).to(tl.float64) * total
    token = tl.sum((below & inside).to(tl.int32), axis=0)
    chosen = tl.sum(tl.where(column == token, log_p, 0.0), axis=0)
    tl.store(ids + row, tl.where(total < float("inf"), token, UNDEFINED))
    tl.store(logprob + row, chosen)


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


_TYPES = {"logits": "*fp32", "uniform": "*fp32", "ids": "*i64", "logprob": "*fp32", "vocabulary": "i32"}
SHIPPED = [Shipped("sample, V 413", _sample, _TYPES, {"TEMPERATURE": 1.0, "UNDEFINED": UNDEFINED, "BLOCK": 512})]
