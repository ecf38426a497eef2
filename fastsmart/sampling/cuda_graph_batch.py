"""Sequences decoded in memory that never moves, so that a GPU can record a decode step once and replay it.

A step of a few layers is some tens of kernels, which take Python far longer to launch than they take to run; replayed,
they are one launch. So nothing is decided between two steps: where a step stands is a tensor, the host looks only now
and then at what has been drawn, and rows that have ended go on being computed.

Shape letters: R rows, C new tokens of each at most, S slots of the cache, E head size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.kernels.decode_step import add_normalised, attend_next, gated
from fastsmart.kernels.sample import sample_next
from fastsmart.machine.cuda_graph import GraphCapture
from fastsmart.sampling.decoder_weights import DecoderWeights
from fastsmart.sampling.kv_cache import LayerCache
from fastsmart.sampling.sampler import truncated
from fastsmart.sampling.settings import SamplingSettings

LOOK_EVERY = 16  # steps; what ends is handed on that late, and the GPU waits for the host that rarely


class GraphBatch:
    """R sequences decoded with these weights, which stay where they are when `load` replaces them.

    capture : records the decode step on a GPU
    slots   : at least those of the longest prompt and C
    """

    def __init__(
        self, weights: DecoderWeights, capture: GraphCapture, rows: int, slots: int, settings: SamplingSettings
    ) -> None:
        size, device, tokens = weights.size, weights.device, settings.max_tokens
        self.weights, self.settings = weights, settings
        self.rope = torch.view_as_real(weights.rope)  # [positions, E / 2, 2]
        self.left = torch.zeros(rows, dtype=torch.int64, device=device)  # slots of padding before the prompt
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)  # drawn last
        self.place = torch.zeros(2, dtype=torch.int64, device=device)
        self.slot, self.column = self.place.split(1)  # that `token` takes; of what is drawn next
        self.uniform = torch.zeros(rows, tokens, device=device)
        self.sampled = torch.zeros(rows, tokens, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(rows, tokens, device=device)
        shape = (2, rows, size.num_kv_heads, slots, size.head_size)
        # zeros, so that slots nobody has written yet weigh nothing
        self.cache = [LayerCache(torch.zeros(shape, dtype=weights.dtype, device=device), None) for _ in weights.layers]
        self.count = 0  # `column`, as the host knows it
        self.step: Callable[[], None] = self._step
        if device.type == "cuda":
            self.graph, _ = capture(self._step)  # what this leaves behind, `begin` overwrites
            self.step = self.graph.replay

    def begin(self, ids: Tensor, left: Tensor | None, uniform: np.ndarray) -> None:
        """Take in prompts int64 [R, T], padded on the left by `left` [R] (None = nowhere), and draw the first tokens.

        uniform : float32 [R, C] in [0, 1), which decides what is drawn
        """
        self.left.zero_()
        if left is not None:
            self.left.copy_(left)
        self.slot.fill_(ids.shape[1])
        self.column.zero_()
        self.uniform.copy_(torch.from_numpy(uniform))
        self._sample(self.weights.forward(ids, self.cache, 0, left))
        self.column.fill_(1)
        self.count = 1

    def advance(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Draw up to `LOOK_EVERY` tokens more, the first with those that `begin` has drawn.

        Gives how many were known before, and all there are now: ids int32 [R, count], log-probs float32 [R, count].
        """
        known = self.count if self.count > 1 else 0
        for _ in range(min(LOOK_EVERY, self.settings.max_tokens - self.count)):
            self.step()
            self.count += 1
        return known, self.sampled[:, : self.count].cpu().numpy(), self.logprobs[:, : self.count].cpu().numpy()

    def _step(self) -> None:
        """Let the policy read `token` and draw the next."""
        weights, size = self.weights, self.weights.size
        x, more = F.embedding(self.token, weights.embed), None
        for layer, kept in zip(weights.layers, self.cache, strict=True):
            qkv = layer.qkv(add_normalised(x, more, size.rms_norm_eps, x.dtype))
            y = attend_next(qkv, kept.kv, self.rope, self.slot, self.left, size.num_heads)
            gate_up = layer.gate_up(add_normalised(x, layer.out(y), size.rms_norm_eps, x.dtype))
            more = layer.down(gated(gate_up))
        self._sample(add_normalised(x, more, size.rms_norm_eps, torch.float32))
        self.place += 1

    def _sample(self, hidden: Tensor) -> None:
        logits, temperature = truncated(self.weights.head(hidden), self.settings)
        # an undefined token is found when the host looks
        sample_next(logits, self.uniform, self.column, self.sampled, self.logprobs, self.token, temperature)
