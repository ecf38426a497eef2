"""NotaGen as a policy that an evaluation can play: its pieces as tokens of the vocabulary the others write in.

So they are decoded, rendered and measured by what measures all others, on the same grid of time and velocity.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastsmart.errors import UserError
from fastsmart.notagen.model import NotaGen
from fastsmart.notagen.notation import read_abc
from fastsmart.notagen.packed import sampling_dtype
from fastsmart.notagen.patches import encode_prompt
from fastsmart.notagen.sampler import AS_THE_AUTHORS, PatchSampler
from fastsmart.notagen.styles import Style, read_style
from fastsmart.notagen.weights import load_notagen
from fastsmart.notes import NoteBatch
from fastsmart.sampling.rollout import Completion
from fastsmart.sampling.settings import SamplingSettings
from fastsmart.tokens.dataset import encode_midi
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

CHARACTERS_A_TOKEN = (
    4  # drawn for each token asked for; a note takes three or four tokens, and the header is drawn, too
)
STYLE_MARK = "@"


class SheetPolicy:
    """A network, the style it is asked for and the vocabulary its pieces are written in.

    source     : of `load_notagen`, perhaps with a style behind an @
    vocabulary : of the policies it is compared with

    Raises UserError as `load_notagen` and `read_style` do.
    """

    def __init__(self, source: str, vocab: Vocabulary, device: str = "cpu") -> None:
        name, mark, style = source.partition(STYLE_MARK)
        self.style: Style | None = read_style(style) if mark else None
        self.device, self.vocab = torch.device(device), vocab
        self.model: NotaGen = load_notagen(name, sampling_dtype(device), device)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's, in float32."""
        for name, parameter in self.model.named_parameters():
            yield name, nn.Parameter(parameter.detach().float(), requires_grad=False)

    def engine(self) -> SheetEngine:
        """A sampler of its pieces."""
        return SheetEngine(self)


class SheetEngine:
    """An `Engine` that answers the prompt BOS with the tokens of a piece that NotaGen writes.

    Pieces are drawn as the authors draw them, whatever temperature and truncation others are drawn with; log-probs, of
    tokens that were never drawn, are 0. A piece that cannot be read as music is empty.
    """

    version = 0

    def __init__(self, policy: SheetPolicy) -> None:
        self.policy = policy

    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        if prompts.lengths.max(initial=0) > 1:
            raise UserError("NotaGen cannot go on from an opening in tokens; compare with --set prompts.source=bos")
        policy, characters = self.policy, settings.max_tokens * CHARACTERS_A_TOKEN
        drawing = replace(AS_THE_AUTHORS, max_tokens=characters, max_rows=settings.max_rows)
        prompt = encode_prompt(policy.style.lines if policy.style else [])
        for piece in PatchSampler(policy.model, drawing)([prompt] * (len(prompts) * settings.group), seed, first):
            notes, _ = read_abc([piece.text])
            ids = tokens_of(notes, policy.vocab, piece.complete)[: settings.max_tokens].astype(np.int32)
            yield Completion(piece.index, ids, np.zeros(len(ids), np.float32), self.version)

    def load(self, policy: object, version: int) -> None:
        raise UserError("NotaGen has a loop of its own (fastsmart.trainer.sheet_dpo)")

    def first_difference(self, policy: object) -> str | None:
        return None

    def close(self) -> None: ...


def tokens_of(notes: NoteBatch, vocab: Vocabulary, complete: bool) -> np.ndarray:
    """Token ids of a piece, with EOS where it is complete or has no notes."""
    ids = np.zeros(0, np.uint16)
    if notes.counts[0]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "piece.mid"
            notes.to_midi(0, path)
            try:
                ids = encode_midi(path, vocab)
            except UserError:  # no note that the vocabulary has
                complete = True
    return np.append(ids, vocab.eos_id) if complete or not len(ids) else ids
