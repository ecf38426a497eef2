"""The sixteen characters of a patch, drawn one after the other for rows side by side.

Shape letters: R rows, A heads, C = 16 characters, E = 64 numbers of a head, V = 128 characters, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmart.kernels.sample import UNDEFINED, sample_tokens
from fastsmart.machine.cuda_graph import GraphCapture
from fastsmart.notagen.model import CHARACTERS, EOS, HEAD_SIZE, PAD, PATCH_CHARS, NotaGen
from fastsmart.sampling.rollout import not_finite
from fastsmart.sampling.sampler import truncate
from fastsmart.sampling.settings import SamplingSettings

DRAW = -1  # of a character that is not given
_COMPACT_BELOW = 0.75  # share of rows whose patch still goes on at which the others are dropped


class CharLoop:
    """Draws patches, each character from the likeliest `top_k`, of those from the likeliest of mass `top_p`, of those
    by `temperature`: in this order, which is that of the authors' program.

    capture : records the loop on a GPU, for `rows` rows; None = nothing is recorded, and rows that have ended leave
    """

    def __init__(
        self, model: NotaGen, settings: SamplingSettings, rows: int = 0, capture: GraphCapture | None = None
    ) -> None:
        self.network = model.char_level_decoder.network
        self.size, self.settings = model.size, settings
        weight = self.network.wte.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture is not None:
            self.told = torch.zeros(rows, self.size.hidden, dtype=self.dtype, device=self.device)
            self.uniform = torch.zeros(rows, PATCH_CHARS, device=self.device)
            self.given = torch.full((rows, PATCH_CHARS), DRAW, device=self.device)
            self.graph, self.drawn = capture(lambda: self.draw_all(self.told, self.uniform, self.given))

    def __call__(self, told: Tensor, uniform: Tensor, given: Tensor) -> Tensor:
        """Patches int64 [R, C], PAD after the first EOS.

        told    : [R, H], what the patch level says of them
        uniform : float32 [R, C] in [0, 1), which decide what is drawn
        given   : int64 [R, C], characters the patches begin with, then `DRAW`

        Raises UserError where the network's logits are not finite.
        """
        if self.graph is None:
            drawn = self._draw_those_left(told, uniform, given)
        else:
            rows = len(told)
            for held, new in ((self.told, told), (self.uniform, uniform), (self.given, given)):
                held[:rows].copy_(new)
            self.graph.replay()
            drawn = self.drawn[:rows]
        ended = (drawn == EOS).cumsum(1) > (drawn == EOS).int()  # after the first EOS
        if bool(((drawn == UNDEFINED) & ~ended).any()):
            raise not_finite()
        return drawn.masked_fill(ended, PAD)

    def draw_all(self, told: Tensor, uniform: Tensor, given: Tensor) -> Tensor:
        """Draw all sixteen characters of every row, ended or not, without a look at them: int64 [R, C]."""
        kv, x = self._room(len(told)), told
        drawn = []
        for place in range(PATCH_CHARS):
            drawn.append(self._draw(self._logits(x, place, kv), uniform[:, place], given[:, place]))
            x = self._word(drawn[-1])
        return torch.stack(drawn, dim=1)

    def _draw_those_left(self, told: Tensor, uniform: Tensor, given: Tensor) -> Tensor:
        """Draw the same, but rows that have drawn EOS leave, once a quarter of them has; what they lack is PAD."""
        drawn = torch.full_like(given, PAD)
        left = torch.arange(len(told), device=self.device)  # numbers of the rows that are computed
        kv, x = self._room(len(told)), told
        for place in range(PATCH_CHARS):
            new = self._draw(self._logits(x, place, kv), uniform[left, place], given[left, place])
            drawn[left, place] = new
            on = (drawn[left] != EOS).all(1)
            if not on.any():
                break
            if on.sum() < _COMPACT_BELOW * len(on):
                left, new, kv = left[on], new[on], [kept[:, on] for kept in kv]
            x = self._word(new)
        return drawn

    def _room(self, rows: int) -> list[Tensor]:
        """Room for the keys and values of so many rows: [2, R, A, C, E] for each layer."""
        shape = (2, rows, self.size.heads, PATCH_CHARS, HEAD_SIZE)
        return [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self.network.blocks]

    def _logits(self, x: Tensor, place: int, kv: list[Tensor]) -> Tensor:
        """Logits float32 [R, V] of the character at `place`, from what stands before it, [R, H]."""
        network, rows, heads = self.network, len(x), self.size.heads
        x = x + network.wpe.weight[place]
        for block, kept in zip(network.blocks, kv, strict=True):
            split = block.project(x).view(rows, 3, heads, HEAD_SIZE)
            kept[:, :, :, place] = split[:, 1:].transpose(0, 1)
            q = split[:, 0].reshape(rows * heads, 1, HEAD_SIZE) * HEAD_SIZE**-0.5
            keys, values = kept.flatten(1, 2)[:, :, : place + 1]
            y = torch.bmm(torch.bmm(q, keys.transpose(1, 2)).softmax(-1), values)
            x = block.rest(x, y.view(rows, -1))
        return (network.ln_f(x) @ network.wte.weight.t()).float()

    def _draw(self, logits: Tensor, uniform: Tensor, given: Tensor) -> Tensor:
        settings = self.settings
        logits = truncate(logits, settings.top_k, settings.top_p)
        drawn, _ = sample_tokens(logits, uniform, settings.temperature)
        return torch.where(given == DRAW, drawn, given)

    def _word(self, drawn: Tensor) -> Tensor:
        """Embeddings [R, H] of characters, of an undefined one any."""
        return self.network.wte(drawn.clamp(0, CHARACTERS - 1))
