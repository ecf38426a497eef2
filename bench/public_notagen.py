"""The public way to draw from NotaGen, written anew: no cache at either level, one piece at a time.

Every patch runs the whole prefix through the patch level, every character that of its patch through the char level,
by transformers' GPT-2; the draw is numpy's on the CPU. It is what `bench/notagen.py` compares with, and what the tests
hold our log-probs and our distribution against.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.notagen.model import PATCH_CHARS, NotaGen
from fastsmart.notagen.weights import WORDS
from fastsmart.sampling.settings import SamplingSettings

Choose = Callable[[np.ndarray], int]  # a character of these probabilities


class PublicNotaGen:
    """NotaGen in transformers' modules, with the weights of ours."""

    def __init__(self, model: NotaGen) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

        size, state = model.size, dict(model.named_parameters())
        width = {"n_embd": size.hidden, "n_head": size.heads, "bos_token_id": None, "eos_token_id": None}
        with torch.device("meta"):
            reader = GPT2Config(n_layer=size.patch_layers, n_positions=size.max_patches, vocab_size=1, **width)
            writer = GPT2Config(n_layer=size.char_layers, n_positions=PATCH_CHARS + 1, vocab_size=128, **width)
            self.reader, self.writer = GPT2Model(reader).eval(), GPT2LMHeadModel(writer).eval()
        self.reader.load_state_dict(_below(state, "patch_level_decoder.base."), assign=True)
        head = {"lm_head.weight": state[WORDS]}
        self.writer.load_state_dict(_below(state, "char_level_decoder.base.") | head, assign=True)
        self.weight, self.bias = (state[f"patch_level_decoder.patch_embedding.{name}"] for name in ("weight", "bias"))
        self.words = state[WORDS]

    def logprobs(self, patches: Tensor) -> Tensor:
        """Log-probs [N, P - 1, C] of all characters of patches int64 [N, P, C] after the first, PAD too."""
        told = self._read(patches)[:, :-1].flatten(0, 1)
        targets = patches[:, 1:].flatten(0, 1)
        embedded = torch.cat([told[:, None], F.embedding(targets[:, :-1], self.words)], dim=1)
        logprobs = self.writer(inputs_embeds=embedded, use_cache=False).logits.log_softmax(-1)
        return logprobs.gather(-1, targets[..., None])[..., 0].view(len(patches), -1, PATCH_CHARS)

    @torch.no_grad()
    def patch(self, patches: np.ndarray, choose: Choose, given: bytes = b"") -> np.ndarray:
        """The next patch [C] after patches [P, C], which begins with `given`; all sixteen characters are drawn."""
        told = self._read(torch.from_numpy(patches.astype(np.int64))[None])[0, -1:]
        drawn = list(given)
        while len(drawn) < PATCH_CHARS:
            before = F.embedding(torch.tensor(drawn, dtype=torch.int64), self.words)
            logits = self.writer(inputs_embeds=torch.cat([told, before])[None], use_cache=False).logits[0, -1]
            drawn.append(choose(logits.softmax(-1).numpy()))
        return np.array(drawn, np.uint8)

    def piece(self, prompt: np.ndarray, patches: int, choose: Choose) -> np.ndarray:
        """A prompt [P, C] and up to so many patches after it, PAD after the EOS of each; it ends as the public one."""
        found, in_body = list(prompt), False
        for _ in range(patches):
            patch = self.patch(np.stack(found), choose)
            if not in_body and bytes(patch[:3]) == b"[r:":
                in_body = True
                patch = self.patch(np.stack(found), choose, b"[r:0/")
            if patch[0] == 1 and patch[1] == 2:
                break
            ended = np.cumsum(patch == 2) - (patch == 2) > 0
            found.append(np.where(ended, 0, patch))
        return np.stack(found)

    def _read(self, patches: Tensor) -> Tensor:
        embedded = F.one_hot(patches, 128).to(self.weight.dtype).flatten(-2) @ self.weight.t() + self.bias
        return self.reader(inputs_embeds=embedded, use_cache=False).last_hidden_state


def truncated(probabilities: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    """Probabilities after top-k, then top-p, then temperature, each made to sum to 1."""
    p = probabilities.astype(np.float64)
    order = np.argsort(-p)
    if settings.top_k:
        p[order[settings.top_k :]] = 0.0
        p /= p.sum()
    if settings.top_p < 1.0:
        enough = int(np.searchsorted(np.cumsum(p[order]), settings.top_p)) + 1  # the fewest of that mass
        p[order[enough:]] = 0.0
        p /= p.sum()
    p = np.where(p > 0, p, 0.0) ** (1.0 / settings.temperature)
    return p / p.sum()


def random_choice(settings: SamplingSettings, random: np.random.Generator) -> Choose:
    """Draws as the public program does."""
    return lambda probabilities: int(random.choice(len(probabilities), p=truncated(probabilities, settings)))


def _below(state: dict[str, torch.nn.Parameter], start: str) -> dict[str, torch.nn.Parameter]:
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
