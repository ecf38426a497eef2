"""Sequences decoded in memory that stays in place, so that a GPU can record a decode step once and replay it.

A step of a few layers is some tens of kernels, which take Python far longer to launch than they take to run; replayed,
they are one launch. So nothing is decided between two steps: where a step stands is a tensor, the host looks only now
and then at what has been drawn, and rows that have ended go on being computed.

Shape letters: R rows, C new tokens of each at most, S slots of the cache, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.decode_product import added_product, gated_product, normalised_product, serves
from fastsmart.kernels.decode_step import add_normalised, attend_next, gated
from fastsmart.kernels.sample import sample_next
from fastsmart.machine.cuda_graph import GraphCapture
from fastsmart.sampling.decoder_weights import DecoderWeights
from fastsmart.sampling.kv_cache import LayerCache
from fastsmart.sampling.sampler import truncated
from fastsmart.sampling.settings import SamplingSettings

LOOK_EVERY = 16  # steps; what ends is handed on that late, and the GPU waits for the host that rarely
HALVED_ABOVE = 128  # rows; with fewer a decode step is a chain of small kernels, which fewer rows hardly shorten


class GraphBatch:
    """R sequences decoded with these weights, which stay where they are when `load` replaces them.

    capture : records the decode step on a GPU
    slots   : at least those of the longest prompt and C
    """

    def __init__(
        self, weights: DecoderWeights, capture: GraphCapture, rows: int, slots: int, settings: SamplingSettings
    ) -> None:
        size, device, tokens = weights.size, weights.device, settings.max_tokens
        self.weights, self.capture, self.rows, self.slots, self.settings = weights, capture, rows, slots, settings
        self.half: GraphBatch | None = None  # what `halved` goes on in, made when it is needed and kept
        self.rope = torch.view_as_real(weights.rope)  # [positions, E / 2, 2]
        self.left = torch.zeros(rows, dtype=torch.int64, device=device)  # slots of padding before the prompt
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # drawn last
        self.place = torch.zeros(2, dtype=torch.int64, device=device)
        self.slot, self.column = self.place.split(1)  # that `token` takes; where it stands among those drawn
        self.uniform = torch.zeros(rows, tokens, device=device)
        self.sampled = torch.zeros(rows, tokens, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(rows, tokens, device=device)
        shape = (2, rows, size.num_kv_heads, slots, size.head_size)
        # zeros, so that slots nobody has written yet weigh nothing
        self.cache = [LayerCache(torch.zeros(shape, dtype=weights.dtype, device=device), None) for _ in weights.layers]
        self.count = 0  # columns drawn or being drawn, as the host knows it
        self.fused = serves(rows, weights.dtype, device)
        self.looks = [_Look(self.sampled, self.logprobs) for _ in range(2 if device.type == "cuda" else 1)]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of steps that one replays
        if device.type == "cuda":
            for steps in dict.fromkeys((min(LOOK_EVERY, tokens - 1), (tokens - 1) % LOOK_EVERY)):
                self.place.zero_()  # what recording leaves behind, `begin` overwrites
                if steps:
                    self.graphs[steps], _ = capture(partial(self.draw, steps))

    def begin(self, ids: Tensor, left: Tensor | None, uniform: Callable[[], np.ndarray]) -> None:
        """Take in prompts int64 [R, T], padded on the left by `left` [R] (None = nowhere), and draw the first tokens.

        uniform : gives float32 [R, C] in [0, 1), which decide what is drawn, while a GPU reads the prompts
        """
        self.left.zero_()
        if left is not None:
            self.left.copy_(left)
        self.slot.fill_(ids.shape[1])
        self.column.zero_()
        hidden = self.weights.forward(ids, self.cache, 0, left)
        self.uniform.copy_(torch.from_numpy(uniform()))
        self._sample(self.weights.head(hidden))
        self.count = 1
        for look in self.looks:
            look.count = 0

    def advance(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Look at up to `LOOK_EVERY` tokens more, the first with those that `begin` has drawn.

        Gives how many were known before, and all there are now: ids int32 [R, count], log-probs float32 [R, count],
        until the next but one. A GPU draws the next meanwhile, which nobody sees where all rows have ended.
        """
        look = self.looks[0]
        if not look.count:
            self._draw_for(look)
        if len(self.looks) > 1 and self.count < self.settings.max_tokens:
            self._draw_for(self.looks[1])
        known, count = look.known, look.count
        look.count = 0
        self.looks.reverse()
        return known, *look.seen(count)

    def halved(self, kept: Tensor) -> GraphBatch:
        """Half as many rows in a batch of their own, which goes on where this one stands: int64 [R // 2] `kept`.

        What this one has drawn since the last look is in the next look at that one.
        """
        if self.half is None:
            self.half = GraphBatch(self.weights, self.capture, self.rows // 2, self.slots, self.settings)
        half = self.half
        for name in ("left", "token", "uniform", "sampled", "logprobs"):
            torch.index_select(getattr(self, name), 0, kept, out=getattr(half, name))
        for mine, other in zip(self.cache, half.cache, strict=True):
            torch.index_select(mine.kv, 1, kept, out=other.kv)
        half.place.copy_(self.place)
        half.count = self.count
        for look in half.looks:
            look.count = 0
        if (ahead := self.looks[0]).count:
            half.looks[0].take(half.sampled, half.logprobs, ahead.known, ahead.count)
        return half

    def _draw_for(self, look: _Look) -> None:
        """Draw a block of tokens, and let `look` have them."""
        known = self.count if self.count > 1 else 0
        steps = min(LOOK_EVERY, self.settings.max_tokens - self.count)
        self.draw(steps)
        self.count += steps
        look.take(self.sampled, self.logprobs, known, self.count)

    def draw(self, steps: int) -> None:
        """Draw so many tokens more, by replaying where so many steps have been recorded."""
        if steps in self.graphs:
            self.graphs[steps].replay()
            return
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """Let the policy read `token` and draw the next."""
        if self.fused:
            logits = self._fused_logits()
        else:
            logits = self._logits()
            self.place += 1
        self._sample(logits)

    def _logits(self) -> Tensor:
        """[R, V] after `token`, in products of a library and kernels between them."""
        weights, size = self.weights, self.weights.size
        x, more = F.embedding(self.token, weights.embed), None
        for layer, kept in zip(weights.layers, self.cache, strict=True):
            qkv = layer.qkv(add_normalised(x, more, size.rms_norm_eps, x.dtype))
            y = attend_next(qkv, kept.kv, self.rope, self.slot, self.left, size.num_heads)
            gate_up = layer.gate_up(add_normalised(x, layer.out(y), size.rms_norm_eps, x.dtype))
            more = layer.down(gated(gate_up))
        return weights.head(add_normalised(x, more, size.rms_norm_eps, torch.float32))

    def _fused_logits(self) -> Tensor:
        """The same in five kernels a layer and one for the head, which also moves `place` on."""
        weights, epsilon = self.weights, self.weights.size.rms_norm_eps
        x = weights.embed
        ids: Tensor | None = self.token  # rows of the table, until the first layer has added to them
        for layer, kept in zip(weights.layers, self.cache, strict=True):
            qkv = normalised_product(x, layer.qkv.by_output, epsilon, ids)
            y = attend_next(qkv, kept.kv, self.rope, self.slot, self.left, weights.size.num_heads)
            x, ids = added_product(x, y, layer.out.by_output, ids), None
            units = gated_product(x, layer.gate_up.by_output, epsilon)
            x = added_product(x, units, layer.down.by_output)
        return normalised_product(x, weights.head.by_output, epsilon, ids, self.place)

    def _sample(self, logits: Tensor) -> None:
        logits, temperature = truncated(logits, self.settings)
        # an undefined token is found when the host looks
        sample_next(logits, self.uniform, self.column, self.sampled, self.logprobs, self.token, temperature)


class _Look:
    """Tokens as the host sees them: on a GPU a copy in pinned memory, made while the next are drawn.

    count : tokens of each row seen, of which `known` were seen before; 0 = none
    """

    def __init__(self, sampled: Tensor, logprobs: Tensor) -> None:
        self.known = self.count = 0
        self.made = torch.cuda.Event() if sampled.is_cuda else None
        self.ids, self.logprobs = sampled, logprobs
        if self.made:
            self.ids = torch.empty_like(sampled, device="cpu", pin_memory=True)
            self.logprobs = torch.empty_like(logprobs, device="cpu", pin_memory=True)

    def take(self, sampled: Tensor, logprobs: Tensor, known: int, count: int) -> None:
        """Copy what has been drawn when the GPU gets here."""
        self.known, self.count = known, count
        if self.made:
            self.ids.copy_(sampled, non_blocking=True)
            self.logprobs.copy_(logprobs, non_blocking=True)
            self.made.record()

    def seen(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probs [R, count], when the GPU has made them."""
        if self.made:
            self.made.synchronize()
        return self.ids[:, :count].numpy(), self.logprobs[:, :count].numpy()
