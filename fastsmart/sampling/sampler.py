"""What is done to logits before a token is drawn: guidance and truncation. Shape letters: R rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmart.sampling.settings import SamplingSettings


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits [R, V] of prompts whose style counts `guidance` times, from [2 R, V]: with their styles, then without.

    Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598; of language models Sanchez et al. 2023, arXiv
    2306.17806); 1 gives the first R rows, 0 the others.
    """
    styled, plain = logits.chunk(2)
    return plain + guidance * (styled - plain)


def truncated(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, float]:
    """Logits [R, V], truncated where that is asked for, and the temperature that is still to be applied to them."""
    if settings.top_k or settings.top_p < 1.0:
        return truncate(logits / settings.temperature, settings.top_k, settings.top_p), 1.0
    return logits, settings.temperature


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the `top_k` largest logits, and all beyond the nucleus of mass `top_p` (Holtzman 2020), to -inf."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.scatter(-1, order, ordered.masked_fill(mass_before >= top_p, -torch.inf))
    return logits
