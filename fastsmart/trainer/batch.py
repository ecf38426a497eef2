"""Completions of a step: all of its batch as a table, and those that go through the policy together.

Shape letters: N completions of all ranks, B of a micro-batch, T tokens of a row, M completion tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsmart.machine.distributed import Ranks
from fastsmart.music.histograms import histograms
from fastsmart.notes import NoteBatch
from fastsmart.reward import Scores
from fastsmart.sampling.rollout import Rollout
from fastsmart.trainer.rollout_pipeline import ScoredRollout


@dataclass(frozen=True)
class Batch:
    """Table of a step's N completions that every rank has.

    scores  : float32 [N] each
    notes   : int64 [N], notes of each clip
    lengths : int64 [N], tokens of each completion
    group   : int64 [N], number of its prompt
    mine    : the numbers of this rank's own completions
    version : of the policy that drew them
    rows    : the clips' histograms side by side, float32 [N, B of all]; None where nothing needs them
    """

    scores: Scores
    notes: np.ndarray
    lengths: np.ndarray
    group: np.ndarray
    mine: range
    version: int
    rows: np.ndarray | None = None

    @staticmethod
    def gather(scored: ScoredRollout, prompts: int, ranks: Ranks, with_rows: bool = False) -> Batch:
        """Put the ranks' completions of `prompts` prompts side by side, on request with the clips' histograms."""
        scores, rollout = scored.scores, scored.rollout
        columns = [*scores.terms.values(), scores.total, scored.notes.counts, rollout.lengths]
        size = len(rollout) // len(ranks.share(prompts))  # completions a prompt
        per_prompt = np.stack(columns, axis=1).astype(np.float64).reshape(len(rollout) // size, -1)
        table = ranks.gather(per_prompt, prompts).reshape(prompts * size, -1)
        *terms, total, notes, lengths = table.T
        share = ranks.share(prompts)
        return Batch(
            Scores({name: values.astype(np.float32) for name, values in zip(scores.terms, terms, strict=True)},
                   total.astype(np.float32)),
            notes.astype(np.int64),
            lengths.astype(np.int64),
            np.repeat(np.arange(prompts), size),
            range(share.start * size, share.stop * size),
            rollout.version,
            _gathered_rows(scored.notes, prompts, size, ranks) if with_rows else None,
        )  # fmt: skip


def histogram_rows(notes: NoteBatch) -> np.ndarray:
    """The histograms of each clip side by side (see `fastsmart.music.histograms`), float32 [N, B of all]."""
    return np.concatenate(list(histograms(notes).values()), axis=1).astype(np.float32)


def _gathered_rows(notes: NoteBatch, prompts: int, size: int, ranks: Ranks) -> np.ndarray:
    """`histogram_rows` of all ranks' clips, `size` a prompt."""
    rows = histogram_rows(notes)
    table = ranks.gather(rows.reshape(len(rows) // size, -1).astype(np.float64), prompts)
    return table.reshape(prompts * size, -1).astype(np.float32)


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
