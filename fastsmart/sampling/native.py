"""fastsmart's own sampler: a static KV cache and one small matrix product after the other.

On a CPU finished rows are compacted away; on a GPU a decode step is recorded and replayed
(`fastsmart.sampling.cuda_graph_batch`).

Shape letters: R rows decoded side by side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.kernels.sample import UNDEFINED, sample_tokens
from fastsmart.machine.cuda_graph import GraphCapture, OwnStream
from fastsmart.policy.transformer import Policy
from fastsmart.sampling.cuda_graph_batch import HALVED_ABOVE, GraphBatch
from fastsmart.sampling.decoder_weights import DecoderWeights
from fastsmart.sampling.kv_cache import LayerCache
from fastsmart.sampling.rollout import Completion, check_prompts, not_finite
from fastsmart.sampling.sampler import guided, truncated
from fastsmart.sampling.settings import SamplingSettings
from fastsmart.tokens.token_batch import TokenBatch

_STATIC_SLOTS = 64  # a fixed batch has a multiple of so many, to serve prompts of other lengths too
_STATIC_KEPT = 4  # batches whose memory and graphs are kept: those of training and evaluation, whole and their rests
_COMPACT_BELOW = 0.75  # share of rows still running at which finished ones are dropped from the cache


class NativeEngine:
    """Samples from a copy of a policy's weights, on the policy's device; the head and the log-softmax are float32.

    dtype    : of the other matrix products and, on a GPU, of the KV cache (see `LayerCache`)
    static_cache : whether to decode in memory that stays in place, on a GPU by replaying graphs of it; None = on a GPU,
               where `SamplingSettings.cuda_graph` is on
    """

    def __init__(
        self, policy: Policy, version: int = 0, dtype: torch.dtype = torch.float32, static_cache: bool | None = None
    ) -> None:
        self.version, self.dtype, self.static_cache = version, dtype, static_cache
        self.size, self.eos, self.style_ids = policy.size, policy.vocab.eos_id, policy.vocab.style_ids
        self.memory: list[LayerCache] = []
        self.own = OwnStream(policy.device, urgent=True)  # of small kernels that all wait for each other
        self.capture = GraphCapture(self.own.stream)
        self.graph_batches: dict[tuple[Any, ...], GraphBatch] = {}
        with self.own.in_turn():
            self.weights = DecoderWeights(policy, dtype)

    def load(self, policy: Policy, version: int) -> None:
        self.version = version
        with self.own.in_turn():
            self.weights.load(policy)

    def first_difference(self, policy: Policy) -> str | None:
        fresh = DecoderWeights(policy, self.dtype)
        for (name, held), (_, wanted) in zip(self.weights.named(), fresh.named(), strict=True):
            if not torch.equal(held, wanted):
                return name
        return None

    def close(self) -> None:
        self.weights.layers, self.memory, self.graph_batches = [], [], {}

    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        with closing(self._drawn(prompts, settings, seed, first)) as source:
            while True:
                with self.own.on():  # but not what is done with a completion
                    completion = next(source, None)
                if completion is None:
                    return
                yield completion

    @torch.inference_mode()
    def _drawn(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int
    ) -> Generator[Completion, None, None]:
        check_prompts(prompts, settings, self.size.max_positions)
        static_cache = self.static_cache
        if static_cache is None:
            static_cache = settings.cuda_graph and self.weights.device.type == "cuda"
        decode, most = self._decode_static if static_cache else self._decode, settings.max_rows
        if settings.guidance != 1:
            if not self.style_ids:
                raise UserError(
                    f"sampling.guidance is {settings.guidance}, and the policy knows no styles; leave it at 1"
                )
            decode, most = self._decode, max(1, most // 2)
        for start in range(0, len(prompts) * settings.group, most):
            index = np.arange(start, min(start + most, len(prompts) * settings.group))
            rows = [prompts.row(int(i) // settings.group) for i in index]
            yield from decode(rows, index + first, settings, seed)

    def _decode(
        self, prompts: list[np.ndarray], index: np.ndarray, settings: SamplingSettings, seed: tuple[int, ...]
    ) -> Iterator[Completion]:
        """Decode, and drop rows that have ended; with guidance as many rows more in the cache have no style."""
        device, guides = self.weights.device, settings.guidance != 1
        plain = [p[~np.isin(p, self.style_ids)] for p in prompts] if guides else []
        ids, left = _left_padded(prompts + plain, device)
        longest = ids.shape[1]
        slots = longest + settings.max_tokens
        uniform = torch.from_numpy(_uniform(seed, index, settings.max_tokens)).to(device)
        cache = memory = self._cache(len(ids), slots)
        sampled = torch.zeros(len(prompts), settings.max_tokens, dtype=torch.int32, device=device)
        logprobs = torch.zeros(len(prompts), settings.max_tokens, device=device)
        row_of = np.arange(len(prompts))  # place among the prompts of each row in the cache
        running = np.ones(len(prompts), bool)  # of the rows in the cache
        eos = self._end_of_piece(settings)
        hidden = self.weights.forward(ids, cache, 0, left)
        for step in range(settings.max_tokens):
            logits = self.weights.head(hidden)
            logits = guided(logits, settings.guidance) if guides else logits
            logits, temperature = truncated(logits, settings)
            token, logprob = sample_tokens(logits, uniform[:, step], temperature)
            sampled[:, step], logprobs[:, step] = token, logprob
            seen, last = token.cpu().numpy(), step + 1 == settings.max_tokens
            if (running & (seen == UNDEFINED)).any():
                raise not_finite()
            over = running & ((seen == eos) | last)
            running &= ~over
            if not running.any():  # before the last one goes out: who has it asks for no more
                self.memory = memory
            for row in np.flatnonzero(over):
                yield Completion(
                    int(index[row_of[row]]),
                    sampled[row, : step + 1].cpu().numpy().copy(),
                    logprobs[row, : step + 1].cpu().numpy().copy(),
                    self.version,
                )
            if not running.any():
                return
            if (fewer := _fewer_rows(len(running), int(running.sum()))) < len(running):
                kept = np.argsort(~running, kind="stable")[:fewer]  # those that run, and some that do not to fill up
                keep = torch.from_numpy(kept).to(device)
                sampled, logprobs, uniform, token = (t[keep] for t in (sampled, logprobs, uniform, token))
                keep = torch.cat([keep, keep + len(running)]) if guides else keep
                cache = [layer.rows(keep) for layer in cache]
                left = None if left is None else left[keep]
                row_of, running = row_of[kept], running[kept]
            token = torch.cat([token, token]) if guides else token
            hidden = self.weights.forward(token[:, None], cache, longest + step, left)

    def _decode_static(
        self, prompts: list[np.ndarray], index: np.ndarray, settings: SamplingSettings, seed: tuple[int, ...]
    ) -> Iterator[Completion]:
        """Decode in memory that stays in place; rows that have ended go on, and what they draw is ignored.

        Where half of many rows have ended, the others go on in a batch of half the rows.
        """
        ids, left = _left_padded(prompts, self.weights.device)
        slots = -(-(ids.shape[1] + settings.max_tokens) // _STATIC_SLOTS) * _STATIC_SLOTS
        key = (len(prompts), slots, settings.max_tokens, settings.temperature, settings.top_k, settings.top_p)
        whole = self.graph_batches.pop(key, None)
        if whole is None:
            whole = GraphBatch(self.weights, self.capture, len(prompts), slots, settings)
        whole.begin(ids, left, partial(_uniform, seed, index, settings.max_tokens))
        batch, running, eos = whole, np.ones(len(prompts), bool), self._end_of_piece(settings)
        while running.any():
            before, sampled, logprobs = batch.advance()
            count = sampled.shape[1]
            ended = sampled[:, before:] == eos
            ends = np.where(ended.any(1), before + ended.argmax(1) + 1, count)  # tokens of each row that count
            over = running & (ended.any(1) | (count == settings.max_tokens))
            within = np.arange(count) < ends[:, None]
            if (running[:, None] & within & (sampled == UNDEFINED)).any():
                raise not_finite()
            completed = [
                Completion(int(index[row]), sampled[row, :end].copy(), logprobs[row, :end].copy(), self.version)
                for row, end in sorted(zip(np.flatnonzero(over), ends[over], strict=True), key=lambda pair: pair[1])
            ]
            running &= ~over
            if not running.any():  # before the last one goes out: who has it asks for no more
                self._keep(key, whole)
            yield from completed
            while running.any() and batch.rows > HALVED_ABOVE and 2 * running.sum() <= batch.rows:
                kept = np.argsort(~running, kind="stable")[: batch.rows // 2]
                batch = batch.halved(torch.from_numpy(kept).to(self.weights.device))
                running, index = running[kept], index[kept]

    def _keep(self, key: tuple[Any, ...], batch: GraphBatch) -> None:
        """Have a batch at hand for prompts of the same shape; the one used longest ago goes."""
        self.graph_batches[key] = batch
        while len(self.graph_batches) > _STATIC_KEPT:
            del self.graph_batches[next(iter(self.graph_batches))]

    def _end_of_piece(self, settings: SamplingSettings) -> int:
        """The token that ends a completion; -1, which is none, where only `max_tokens` does."""
        return -1 if settings.ignore_eos else self.eos

    def _cache(self, rows: int, slots: int) -> list[LayerCache]:
        """Cache of every layer, uninitialised; the last call's memory where its shape fits.

        The caller puts it back into `memory` when done, so that two streams at once do not share it.
        """
        shape = (rows, self.size.num_kv_heads, slots, self.size.head_size)
        memory, self.memory = self.memory, []
        if memory and memory[0].kv.shape[1:] == shape:
            return memory
        return [LayerCache.empty(shape, self.dtype, self.weights.device) for _ in self.weights.layers]


def _fewer_rows(rows: int, running: int) -> int:
    """Rows to keep in the cache when so many of them run: a step on a ladder that each batch goes down.

    oneDNN compiles products for every number of rows it meets and keeps them, 5 MB each for a policy of 3.6 M
    parameters, so there should be few such numbers.
    """
    while running <= (fewer := int(_COMPACT_BELOW * rows)) and fewer:
        rows = fewer
    return rows


def _left_padded(prompts: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts that end at the same slot, int64 [R, longest], and how many slots of padding are left of each, int64 [R];
    None where none has any. Padding has to be masked."""
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + p.tolist() for p in prompts], device=device)
    if min(len(p) for p in prompts) == longest:
        return ids, None
    return ids, torch.tensor([longest - len(p) for p in prompts], device=device)


def _uniform(seed: tuple[int, ...], index: np.ndarray, count: int) -> np.ndarray:
    """float32 [R, count] in [0, 1): one Philox stream a completion, keyed by seed and index."""
    streams = (np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, int(i)]))) for i in index)
    return np.stack([stream.random(count, np.float32) for stream in streams])
