"""fastsmart's own sampler: a static KV cache, one small matrix product after the other, finished rows compacted away.

Shape letters: R rows decoded side by side, T new tokens of each, S cache slots, D hidden size, K key/value heads,
E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.policy.transformer import Policy, PolicySize, rotate
from fastsmart.sampling.rollout import Completion, SamplingSettings
from fastsmart.tokens.sequences import TokenBatch

_COMPACT_BELOW = 0.75  # share of rows still running at which the finished ones are dropped from the cache


@dataclass
class _LayerWeights:
    """One layer, matrices transposed to [in, out]: at 64 rows x @ W^T runs a third faster so on a CPU than F.linear's
    [out, in] (154 against 115 GFLOP/s, one core, fp32)."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class NativeEngine:
    """Samples from a copy of a policy's weights, on the policy's device; the head and the log-softmax are float32.

    dtype : of the other matrix products and the KV cache
    """

    def __init__(self, policy: Policy, version: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.load(policy, version)

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        self.size: PolicySize = policy.size
        self.eos = policy.vocab.eos_id
        self.version = version
        self.embed = self._copy(policy.model.embed_tokens.weight)
        self.layers = [
            _LayerWeights(
                self._copy(layer.input_layernorm.weight),
                self._transposed(layer.self_attn.qkv_proj.weight),
                self._transposed(layer.self_attn.o_proj.weight),
                self._copy(layer.post_attention_layernorm.weight),
                self._transposed(layer.mlp.gate_up_proj.weight),
                self._transposed(layer.mlp.down_proj.weight),
            )
            for layer in policy.model.layers
        ]
        self.norm = self._copy(policy.model.norm.weight)
        self.head = policy.lm_head.weight.detach().float().t().contiguous()
        self.cos, self.sin = policy.model.cos, policy.model.sin

    def _copy(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype, copy=True)

    def _transposed(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype).t().contiguous()

    def close(self) -> None:
        self.layers = []

    @torch.no_grad()
    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        longest = int(np.diff(prompts.offsets).max(initial=0)) + settings.max_tokens
        if longest > self.size.max_positions:
            raise UserError(
                f"prompt and completion make {longest} tokens, the policy holds {self.size.max_positions}; "
                "lower sampling.max_tokens"
            )
        if len(prompts) and np.diff(prompts.offsets).min() < 1:
            raise UserError("a prompt is empty; a policy needs at least one token, such as BOS, to start from")
        total = len(prompts) * settings.group
        for start in range(0, total, settings.max_rows):
            index = np.arange(start, min(start + settings.max_rows, total))
            rows = [prompts.row(int(i) // settings.group) for i in index]
            yield from self._decode(rows, index + first, settings, seed)

    def _decode(
        self, prompts: list[np.ndarray], index: np.ndarray, settings: SamplingSettings, seed: tuple[int, ...]
    ) -> Iterator[Completion]:
        device, longest = self.embed.device, max(len(p) for p in prompts)
        # Prompts end at the same slot: padding stands on the left and is masked
        ids = torch.tensor([[0] * (longest - len(p)) + p.tolist() for p in prompts], device=device)
        left = torch.tensor([longest - len(p) for p in prompts], device=device)
        slots = longest + settings.max_tokens
        uniform = torch.from_numpy(_uniform(seed, index, settings.max_tokens)).to(device)
        cache = self._new_cache(len(prompts), slots)
        drawn = torch.zeros(len(prompts), settings.max_tokens, dtype=torch.int32, device=device)
        logprobs = torch.zeros(len(prompts), settings.max_tokens, device=device)
        row_of = np.arange(len(prompts))  # place among the prompts of each row in the cache
        running = np.ones(len(prompts), bool)  # of the rows in the cache
        hidden = self._forward(ids, cache, 0, left)[:, -1]
        for step in range(settings.max_tokens):
            token, logprob = draw(hidden @ self.head, uniform[:, step], settings)
            drawn[:, step], logprobs[:, step] = token, logprob
            last = step + 1 == settings.max_tokens
            for row in np.flatnonzero(running & ((token.cpu().numpy() == self.eos) | last)):
                running[row] = False
                yield Completion(
                    int(index[row_of[row]]),
                    drawn[row, : step + 1].cpu().numpy().copy(),
                    logprobs[row, : step + 1].cpu().numpy().copy(),
                    self.version,
                )
            if not running.any():
                return
            if running.mean() <= _COMPACT_BELOW:
                keep = torch.from_numpy(np.flatnonzero(running)).to(device)
                cache = [t[keep] for t in cache]
                drawn, logprobs, uniform, left, token = (t[keep] for t in (drawn, logprobs, uniform, left, token))
                row_of, running = row_of[running], running[running]
            hidden = self._forward(token[:, None], cache, longest + step, left)[:, -1]

    def _new_cache(self, rows: int, slots: int) -> list[Tensor]:
        """Keys and values of every layer, [R, 2K, S, E]."""
        shape = (rows, 2 * self.size.num_kv_heads, slots, self.size.head_size)
        return [torch.zeros(shape, dtype=self.embed.dtype, device=self.embed.device) for _ in self.layers]

    def _forward(self, ids: Tensor, cache: list[Tensor], start: int, left: Tensor) -> Tensor:
        """Final hidden states float32 [R, T, D] of ids [R, T] that take the slots from `start` on, writing the cache.

        left : int64 [R], slots of padding before each prompt
        """
        size, width = self.size, ids.shape[1]
        end = start + width
        if left.any():
            slot = torch.arange(end, device=ids.device)
            position = (slot[start:] - left[:, None]).clamp_min(0)
            cos, sin = self.cos[position], self.sin[position]
            causal = slot <= slot[start:, None]
            # a padded position sees itself, so that its softmax is defined; nobody reads it
            mask = causal & ((slot >= left[:, None, None]) | (slot == slot[start:, None]))
            mask, causal_only = mask[:, None], False
        else:
            cos, sin = self.cos[start:end], self.sin[start:end]
            mask, causal_only = None, width > 1
        heads, grouped = size.num_heads, size.num_heads != size.num_kv_heads
        x = self.embed[ids]
        for layer, kv in zip(self.layers, cache, strict=True):
            y = F.rms_norm(x, (size.hidden_size,), layer.attention_norm, size.rms_norm_eps)
            qkv = (y @ layer.qkv).unflatten(-1, (heads + 2 * size.num_kv_heads, size.head_size))
            qk = rotate(qkv[:, :, : heads + size.num_kv_heads], cos, sin)
            kv[:, : size.num_kv_heads, start:end] = qk[:, :, heads:].transpose(1, 2)
            kv[:, size.num_kv_heads :, start:end] = qkv[:, :, heads + size.num_kv_heads :].transpose(1, 2)
            keys, values = kv[:, :, :end].split(size.num_kv_heads, dim=1)
            y = F.scaled_dot_product_attention(
                qk[:, :, :heads].transpose(1, 2), keys, values, mask, is_causal=causal_only, enable_gqa=grouped
            )
            x = x + y.transpose(1, 2).flatten(2) @ layer.out
            y = F.rms_norm(x, (size.hidden_size,), layer.mlp_norm, size.rms_norm_eps)
            gate, up = (y @ layer.gate_up).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ layer.down
        return F.rms_norm(x, (size.hidden_size,), self.norm, size.rms_norm_eps).float()


def draw(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at `uniform`.

    logits [R, V] float32, uniform [R] in [0, 1) -> ids [R] int64 and their log-probs [R] float32 under the tempered
    (and, where asked for, truncated) distribution that was drawn from.

    Raises UserError when the logits are not finite, as those of a policy that has diverged.
    """
    logits = truncate(logits / settings.temperature, settings.top_k, settings.top_p)
    logprob = logits.log_softmax(-1)
    cumulative = logprob.double().exp().cumsum(-1)
    if not cumulative[:, -1].isfinite().all():
        raise UserError("the policy's logits are no longer finite; go back to an earlier checkpoint")
    # uniform <= 1 - 2^-24, so in float64 the product stays below the total and the draw below V
    token = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True)
    return token[:, 0], logprob.gather(-1, token)[:, 0]


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the `top_k` largest logits, and all beyond the nucleus of mass `top_p` (Holtzman 2020), to -inf."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.scatter(-1, order, ordered.masked_fill(mass_before >= top_p, -torch.inf))
    return logits


def _uniform(seed: tuple[int, ...], index: np.ndarray, count: int) -> np.ndarray:
    """float32 [R, count] in [0, 1): one Philox stream a completion, keyed by seed and index."""
    streams = (np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, int(i)]))) for i in index)
    return np.stack([stream.random(count, np.float32) for stream in streams])
