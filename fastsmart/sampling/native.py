"""fastsmart's own sampler: a static KV cache and one small matrix product after the other.

On a CPU finished rows are compacted away; on a GPU a decode step is recorded and replayed
(`fastsmart.sampling.cuda_graph_batch`).

Shape letters: R rows decoded side by side, T new tokens of each, S cache slots, D hidden size, K key/value heads,
E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.sample import UNDEFINED
from fastsmart.machine.cuda_graph import Recorder
from fastsmart.machine.files import mkl_knows_processor
from fastsmart.policy.transformer import Policy
from fastsmart.sampling.cuda_graph_batch import GraphBatch
from fastsmart.sampling.kv_cache import LayerCache
from fastsmart.sampling.rollout import Completion, SamplingSettings, check_prompts, not_finite
from fastsmart.sampling.sampler import sample_token
from fastsmart.tokens.token_batch import TokenBatch

_STATIC_SLOTS = 64  # a fixed batch has a multiple of so many, to serve prompts of other lengths too
_STATIC_KEPT = 4  # batches whose memory and graphs are kept: those of training and evaluation, whole and their rests
_COMPACT_BELOW = 0.75  # share of rows still running at which finished ones are dropped from the cache


class _Matrix:
    """x -> x @ W^T for a decode step: few rows, the same weight over and over.

    On a CPU the weight is packed for the number of rows, which saves the library doing so in every product. MKL where
    it has kernels for the processor: 249 against 208 GFLOP/s for 64 rows on two Intel cores in fp32, 186 against 141
    for 32. oneDNN on others, where MKL keeps to AVX2: 112 against 90 for 64 rows on one Zen 4 core. Which one depends
    on the machine alone, so that a run resumed on it gives the same bits. Elsewhere the transpose is kept, which is
    still faster than `F.linear` for so few rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.library = _packing_library(weight)
        self.weight = weight.contiguous() if self.library else weight.t().contiguous()
        self.packed: Tensor | None = None
        self.rows = 0

    def load(self, weight: Tensor) -> None:
        """Take over another weight of the same shape, where the old one is: graphs go on reading there."""
        self.weight.copy_(weight if self.library else weight.t())
        self.packed, self.rows = None, 0

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in] -> [R, out]."""
        if not self.library:
            return x @ self.weight
        if len(x) != self.rows:
            self.rows = len(x)
            mkl, onednn = torch.ops.mkl._mkl_reorder_linear_weight, torch.ops.mkldnn._reorder_linear_weight
            self.packed = (mkl if self.library == "mkl" else onednn)(self.weight, self.rows)
        if self.library == "mkl":
            return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, None, self.rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def _packing_library(weight: Tensor) -> str:
    """Whose packed products serve this weight best: "mkl", "mkldnn" (oneDNN), or "" for nobody's."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return ""
    if torch.backends.mkl.is_available() and mkl_knows_processor():
        return "mkl"
    return "mkldnn" if torch.backends.mkldnn.is_available() else ""


@dataclass
class _LayerWeights:
    """One layer. The weights of the two norms and the scale of the scores are multiplied into the matrices, and the
    rows of every query and key head reordered so that the two coordinates a rotation turns are neighbours."""

    qkv: _Matrix
    out: _Matrix
    gate_up: _Matrix
    down: _Matrix


def _arranged(policy: Policy, dtype: torch.dtype) -> Iterator[Tensor]:
    """The embedding, the matrices of every layer in the order of `_LayerWeights`, the head; some are the policy's."""
    size, model = policy.size, policy.model
    yield model.embed_tokens.weight.to(dtype)
    pairs = torch.arange(size.head_size, device=policy.device).view(2, -1).t().flatten()  # 0, E/2, 1, E/2 + 1, ...
    rotary_rows = (size.num_heads + size.num_kv_heads) * size.head_size
    for layer in model.layers:
        qkv = layer.self_attn.qkv_proj.weight * layer.input_layernorm.weight
        qkv[: size.num_heads * size.head_size] *= size.head_size**-0.5  # the scale of the scores
        qk = qkv[:rotary_rows].unflatten(0, (-1, size.head_size))[:, pairs].flatten(0, 1)
        gate_up = layer.mlp.gate_up_proj.weight * layer.post_attention_layernorm.weight
        for weight in (
            torch.cat([qk, qkv[rotary_rows:]]),
            layer.self_attn.o_proj.weight,
            gate_up,
            layer.mlp.down_proj.weight,
        ):
            yield weight.to(dtype)
    yield (policy.lm_head.weight * model.norm.weight).float()


class NativeEngine:
    """Samples from a copy of a policy's weights, on the policy's device; the head and the log-softmax are float32.

    dtype    : of the other matrix products and the KV cache
    static_cache : whether to decode in memory that never moves, on a GPU by replaying graphs of it; None = on a GPU,
               where `SamplingSettings.cuda_graph` is on
    """

    def __init__(
        self, policy: Policy, version: int = 0, dtype: torch.dtype = torch.float32, static_cache: bool | None = None
    ) -> None:
        self.version, self.dtype, self.static_cache = version, dtype, static_cache
        self.size, self.eos = policy.size, policy.vocab.eos_id
        self.epsilon = torch.tensor(self.size.rms_norm_eps, device=policy.device)
        self.rope = torch.complex(policy.model.cos.float(), policy.model.sin.float())  # [positions, E / 2]
        self.memory: list[LayerCache] = []
        self.recorder = Recorder()
        self.graph_batches: dict[tuple[Any, ...], GraphBatch] = {}
        with torch.no_grad():
            self.embed, *weights = (weight.clone() for weight in _arranged(policy, dtype))
        *matrices, self.head = map(_Matrix, weights)
        self.layers = [_LayerWeights(*matrices[i : i + 4]) for i in range(0, len(matrices), 4)]

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        self.version = version
        weights = _arranged(policy, self.dtype)
        self.embed.copy_(next(weights))
        for matrix, weight in zip(self._matrices(), weights, strict=True):
            matrix.load(weight)

    def first_difference(self, policy: Policy) -> str | None:
        fresh = NativeEngine(policy, self.version, self.dtype)
        for (name, held), (_, wanted) in zip(self._named_weights(), fresh._named_weights(), strict=True):
            if not torch.equal(held, wanted):
                return name
        return None

    def _matrices(self) -> Iterator[_Matrix]:
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self.head

    def _named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What is held, under the policy's name for it and in the policy's order; a norm is in the matrix it feeds."""
        names = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
        of_layers = [f"model.layers.{i}.{name}.weight" for i in range(len(self.layers)) for name in names]
        yield "model.embed_tokens.weight", self.embed
        for name, matrix in zip([*of_layers, "lm_head.weight"], self._matrices(), strict=True):
            yield name, matrix.weight

    def close(self) -> None:
        self.layers, self.memory, self.graph_batches = [], [], {}

    @torch.inference_mode()
    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        check_prompts(prompts, settings, self.size.max_positions)
        total = len(prompts) * settings.group
        static_cache = self.static_cache
        if static_cache is None:
            static_cache = settings.cuda_graph and self.embed.device.type == "cuda"
        decode = self._decode_static if static_cache else self._decode
        for start in range(0, total, settings.max_rows):
            index = np.arange(start, min(start + settings.max_rows, total))
            rows = [prompts.row(int(i) // settings.group) for i in index]
            yield from decode(rows, index + first, settings, seed)

    def _decode(
        self, prompts: list[np.ndarray], index: np.ndarray, settings: SamplingSettings, seed: tuple[int, ...]
    ) -> Iterator[Completion]:
        device = self.embed.device
        ids, left = _left_padded(prompts, device)
        longest = ids.shape[1]
        slots = longest + settings.max_tokens
        uniform = torch.from_numpy(_uniform(seed, index, settings.max_tokens)).to(device)
        cache = memory = self._cache(len(prompts), slots)
        sampled = torch.zeros(len(prompts), settings.max_tokens, dtype=torch.int32, device=device)
        logprobs = torch.zeros(len(prompts), settings.max_tokens, device=device)
        row_of = np.arange(len(prompts))  # place among the prompts of each row in the cache
        running = np.ones(len(prompts), bool)  # of the rows in the cache
        hidden = self.forward(ids, cache, 0, left)
        for step in range(settings.max_tokens):
            token, logprob = sample_token(self.head(hidden), uniform[:, step], settings)
            sampled[:, step], logprobs[:, step] = token, logprob
            seen, last = token.cpu().numpy(), step + 1 == settings.max_tokens
            if (running & (seen == UNDEFINED)).any():
                raise not_finite()
            for row in np.flatnonzero(running & ((seen == self.eos) | last)):
                running[row] = False
                yield Completion(
                    int(index[row_of[row]]),
                    sampled[row, : step + 1].cpu().numpy().copy(),
                    logprobs[row, : step + 1].cpu().numpy().copy(),
                    self.version,
                )
            if not running.any():
                self.memory = memory
                return
            if (fewer := _fewer_rows(len(running), int(running.sum()))) < len(running):
                kept = np.argsort(~running, kind="stable")[:fewer]  # those that run, and some that do not to fill up
                keep = torch.from_numpy(kept).to(device)
                cache = [layer.rows(keep) for layer in cache]
                sampled, logprobs, uniform, token = (t[keep] for t in (sampled, logprobs, uniform, token))
                left = None if left is None else left[keep]
                row_of, running = row_of[kept], running[kept]
            hidden = self.forward(token[:, None], cache, longest + step, left)

    def _decode_static(
        self, prompts: list[np.ndarray], index: np.ndarray, settings: SamplingSettings, seed: tuple[int, ...]
    ) -> Iterator[Completion]:
        """The same in memory that never moves; rows that have ended go on, and nobody looks at what they draw."""
        ids, left = _left_padded(prompts, self.embed.device)
        slots = -(-(ids.shape[1] + settings.max_tokens) // _STATIC_SLOTS) * _STATIC_SLOTS
        key = (len(prompts), slots, settings.max_tokens, settings.temperature, settings.top_k, settings.top_p)
        batch = self.graph_batches.pop(key, None)
        if batch is None:
            batch = GraphBatch(self, len(prompts), slots, settings)
        batch.begin(ids, left, _uniform(seed, index, settings.max_tokens))
        running = np.ones(len(prompts), bool)
        while running.any():
            before, sampled, logprobs = batch.advance()
            count = sampled.shape[1]
            ended = sampled[:, before:] == self.eos
            ends = np.where(ended.any(1), before + ended.argmax(1) + 1, count)  # tokens of each row that count
            over = running & (ended.any(1) | (count == settings.max_tokens))
            within = np.arange(count) < ends[:, None]
            if (running[:, None] & within & (sampled == UNDEFINED)).any():
                raise not_finite()
            for row in np.flatnonzero(over)[np.argsort(ends[over], kind="stable")]:
                end = ends[row]
                yield Completion(int(index[row]), sampled[row, :end].copy(), logprobs[row, :end].copy(), self.version)
            running &= ~over
        self.graph_batches[key] = batch
        while len(self.graph_batches) > _STATIC_KEPT:
            del self.graph_batches[next(iter(self.graph_batches))]

    def _cache(self, rows: int, slots: int) -> list[LayerCache]:
        """That of every layer, uninitialised; the last call's memory where its shape fits.

        The caller puts it back into `memory` when done, so that two streams at once do not share it.
        """
        shape = (rows, self.size.num_kv_heads, slots, self.size.head_size)
        memory, self.memory = self.memory, []
        if memory and memory[0].kv.shape[1:] == shape:
            return memory
        return [LayerCache.empty(shape, self.dtype, self.embed.device) for _ in self.layers]

    def forward(self, ids: Tensor, cache: list[LayerCache], start: int, left: Tensor | None) -> Tensor:
        """Normalised hidden states float32 [R, D] after the last of ids [R, T], which take the slots from `start` on.

        left : int64 [R], slots of padding before each prompt; None where there are none
        """
        size, (rows, width) = self.size, ids.shape
        heads, kv_heads = size.num_heads, size.num_kv_heads
        end = start + width
        rope, seen = self.rope[start:end], None
        if width > 1 or left is not None:
            slot = torch.arange(end, device=ids.device)
            seen = slot <= slot[start:, None]  # [T, end]
            if left is not None:
                rope = self.rope[(slot[start:] - left[:, None]).clamp_min(0)]  # [R, T, E / 2]
                # a padded position sees itself, so that its softmax is defined; nobody reads it
                seen = (seen & ((slot >= left[:, None, None]) | (slot == slot[start:, None])))[:, None]
        rope = rope.unsqueeze(-2)
        x = F.embedding(ids.flatten(), self.embed)
        for layer, kept in zip(self.layers, cache, strict=True):
            qkv = layer.qkv(self._normalised(x)).view(rows, width, heads + 2 * kv_heads, size.head_size)
            _rotate(qkv[:, :, : heads + kv_heads], rope)
            kept.put(qkv[:, :, heads:].view(rows, width, 2, kv_heads, size.head_size), start)
            # the query heads of a key head stand side by side: [R K, H / K T, E]
            q = qkv[:, :, :heads].transpose(1, 2).reshape(rows * kv_heads, -1, size.head_size)
            y = kept.attend(q, end, seen)
            y = y.view(rows, heads, width, size.head_size).transpose(1, 2)
            x += layer.out(y.reshape(rows * width, -1))
            gate, up = layer.gate_up(self._normalised(x)).chunk(2, dim=-1)
            x += layer.down(F.silu(gate).mul_(up))
        return self._normalised(x.view(rows, width, -1)[:, -1].float())

    def _normalised(self, x: Tensor) -> Tensor:
        """RMSNorm without its weight, which the next matrix holds."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = torch.addcmul(self.epsilon, length, length, value=1.0 / x.shape[-1])
        return x * mean_square.rsqrt_().to(x.dtype)


def _rotate(x: Tensor, rope: Tensor) -> None:
    """Rotary embedding, in place, of x [R, T, heads, E], whose coordinates stand in pairs.

    rope : complex [T, 1, E / 2] or [R, T, 1, E / 2]
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    if x.dtype == torch.float32:
        pairs *= rope
    else:
        x.copy_(torch.view_as_real(pairs * rope).flatten(-2))


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
