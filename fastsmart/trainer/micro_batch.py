"""Completions of a rollout that go through the policy together.

Shape letters: B completions of a micro-batch, T tokens of a row, M completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsmart.sampling.rollout import Rollout


@dataclass(frozen=True)
class MicroBatch:
    """B completions of a rollout, with their tokens packed.

    rows     : int64 [B, T], prompt and completion, padded on the right; the last token is no input and left out
    gather_index : int64 [M], place in the flattened [B, T] that predicts each completion token
    ids      : int64 [M]
    sequence : int64 [M], row of each token
    offsets  : int64 [B + 1], the tokens of row b are offsets[b] … offsets[b + 1] − 1
    begins   : int64 [B], place in the flattened [B, T] that predicts each row's first completion token
    sampler_logprobs : float32 [M]
    completions : int64 [B], number in the rollout of each row
    lengths  : int64 [B], completion tokens of each row
    """

    rows: Tensor
    gather_index: Tensor
    ids: Tensor
    sequence: Tensor
    offsets: Tensor
    begins: Tensor
    sampler_logprobs: Tensor
    completions: Tensor
    lengths: Tensor


def micro_batches(rollout: Rollout, size: int, device: torch.device) -> Iterator[MicroBatch]:
    """The rollout in micro-batches of `size` completions of like length, longest first, so that little is padding."""
    order = np.argsort(-(rollout.prompt_lengths + rollout.lengths), kind="stable")
    for start in range(0, len(order), size):
        yield packed(rollout, order[start : start + size], device)


def packed(rollout: Rollout, chosen: np.ndarray, device: torch.device) -> MicroBatch:
    """The completions of these numbers, int64 [B], as one micro-batch, in this order."""
    total = rollout.prompt_lengths + rollout.lengths
    width = int(total[chosen].max()) - 1
    rows = np.zeros((len(chosen), width), np.int64)
    for row, i in zip(rows, chosen, strict=True):
        row[: total[i] - 1] = rollout.sequence(int(i))[:-1]
    lengths = rollout.lengths[chosen].astype(np.int64)
    sequence = np.repeat(np.arange(len(chosen)), lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    step = np.arange(len(sequence)) - offsets[sequence]
    begins = np.arange(len(chosen)) * width + rollout.prompt_lengths[chosen] - 1
    ids, sampler_logprobs = rollout.ids[chosen][sequence, step], rollout.logprobs[chosen][sequence, step]
    numbers = (rows.ravel(), begins[sequence] + step, ids, sequence, offsets, begins)
    flat = uploaded(np.concatenate(numbers).astype(np.int64, copy=False), device)  # one copy for all
    parts = flat.split([len(part) for part in numbers])
    return MicroBatch(
        rows=parts[0].view(rows.shape),
        gather_index=parts[1],
        ids=parts[2],
        sequence=parts[3],
        offsets=parts[4],
        begins=parts[5],
        sampler_logprobs=uploaded(sampler_logprobs, device),
        completions=torch.from_numpy(chosen),
        lengths=torch.from_numpy(lengths),
    )


def uploaded(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The values as a tensor on the device, which a GPU copies when it comes to it: nobody waits."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
