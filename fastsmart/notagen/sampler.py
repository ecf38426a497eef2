"""Pieces drawn patch by patch, with the keys and values of both levels kept, many pieces side by side.

A piece depends on the weights, its prompt, the seed and its own number, not on the pieces beside it (up to rounding in
the matrix products). Shape letters: R rows, P patches, C = 16 characters, H width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.machine.cuda_graph import GraphCapture
from fastsmart.notagen.char_loop import DRAW, CharLoop
from fastsmart.notagen.model import PATCH_CHARS, NotaGen
from fastsmart.notagen.packed import packed
from fastsmart.notagen.patch_cache import PatchCache
from fastsmart.notagen.patches import COUNTDOWN, END_PATCH, decode, encode_open, is_end, split_piece
from fastsmart.sampling.settings import SamplingSettings

AS_THE_AUTHORS = SamplingSettings(group=1, max_tokens=16 * 1024, temperature=1.2, top_k=9, top_p=0.9, max_rows=32)
FIRST_COUNTDOWN = np.frombuffer(b"[r:0/", np.uint8)  # the body begins with its bar 0, whatever was drawn
_COMPACT_BELOW = 0.75  # share of rows still running at which the others are dropped


@dataclass(frozen=True)
class Piece:
    """A piece that has been drawn.

    index    : its number
    text     : ABC with countdowns and without the rests left out, its prompt included
    patches  : uint8 [P, C] as the network saw them last: all, unless the piece is longer than its context
    complete : whether it ended by itself, not at the limit
    """

    index: int
    text: str
    patches: np.ndarray
    complete: bool


@dataclass
class _Row:
    """A piece that is being drawn."""

    index: int
    patches: list[np.ndarray]
    random: np.random.Generator
    text: str
    given: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # characters the next patch begins with
    left: int = 0  # patches that may still be drawn
    lines: int = 0  # of the body that are kept when the context is full; 0 = it has not been
    in_body: bool = False


class PatchSampler:
    """Draws pieces from a network, on its device and in its dtype.

    settings : temperature, top_k and top_p, of one character; max_tokens in characters, sixteen a patch; max_rows
    """

    def __init__(self, model: NotaGen, settings: SamplingSettings = AS_THE_AUTHORS) -> None:
        self.model, self.settings = packed(model, settings.max_rows), settings
        self.device = model.char_level_decoder.network.wte.weight.device
        self.recorded = settings.cuda_graph and self.device.type == "cuda"

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[np.ndarray], seed: tuple[int, ...], first: int = 0) -> Iterator[Piece]:
        """Draw a piece from each prompt, patches uint8 [P, C], and yield each as it ends, numbered from `first`.

        A piece that fills the context goes on from its header and the second half of its bars, as the authors' program
        has it. Raises UserError for a prompt longer than the context, or where the logits are not finite.
        """
        waiting = deque(self._row(i, prompt, seed, first) for i, prompt in enumerate(prompts))
        rows: list[_Row | None] = [waiting.popleft() for _ in range(min(self.settings.max_rows, len(waiting)))]
        cache = PatchCache(self.model, len(rows))
        loop = CharLoop(self.model, self.settings, len(rows), GraphCapture() if self.recorded else None)
        for place, row in enumerate(rows):
            self._fill(cache, place, row)
        while any(rows):
            drawn = self._drawn(loop, rows, self._told(cache, rows))
            for place, row in enumerate(rows):
                if row is None:
                    continue
                ended = self._take(row, drawn[place])
                if ended is not None:
                    yield Piece(row.index, row.text, np.stack(row.patches), ended)
                    rows[place] = row = waiting.popleft() if waiting else None
                    self._fill(cache, place, row)
                elif len(row.patches) >= self.model.size.max_patches:
                    if not self._go_on(row):
                        yield Piece(row.index, row.text, np.stack(row.patches), False)
                        rows[place] = row = waiting.popleft() if waiting else None
                    self._fill(cache, place, row)
            rows = self._without_idle(cache, rows)

    def _row(self, i: int, prompt: np.ndarray, seed: tuple[int, ...], first: int) -> _Row:
        if not 0 < len(prompt) < self.model.size.max_patches:
            raise UserError(
                f"a prompt of {len(prompt)} patches leaves nothing to draw, the context is "
                f"{self.model.size.max_patches}; shorten it"
            )
        text = decode(prompt)
        return _Row(
            first + i,
            list(prompt),
            np.random.default_rng([*seed, first + i]),
            text,
            left=-(-self.settings.max_tokens // PATCH_CHARS),
            in_body=COUNTDOWN in text,
        )

    def _fill(self, cache: PatchCache, place: int, row: _Row | None) -> None:
        """Have the cache read what the row holds, but for its last patch, which is the next step's."""
        if row is not None:
            cache.fill(place, self._tensor(np.array(row.patches[:-1], np.int64).reshape(-1, PATCH_CHARS)))

    def _told(self, cache: PatchCache, rows: Sequence[_Row | None]) -> Tensor:
        """Give what the char level is told of the next patch of every row, [R, H]; of idle ones anything."""
        last = np.zeros((len(rows), PATCH_CHARS), np.int64)
        slot = np.zeros(len(rows), np.int64)
        for place, row in enumerate(rows):
            if row is not None:
                last[place], slot[place] = row.patches[-1], len(row.patches) - 1
        return cache.step(self._tensor(last), self._tensor(slot))

    def _drawn(self, loop: CharLoop, rows: Sequence[_Row | None], told: Tensor) -> np.ndarray:
        """The next patch of every row, uint8 [R, C]."""
        given = np.full((len(rows), PATCH_CHARS), DRAW, np.int64)
        uniform = np.zeros((2, len(rows), PATCH_CHARS), np.float32)
        for place, row in enumerate(rows):
            if row is not None:
                given[place, : len(row.given)] = row.given
                uniform[:, place] = row.random.random((2, PATCH_CHARS), np.float32)
        drawn = loop(told, self._tensor(uniform[0]), self._tensor(given)).cpu().numpy().astype(np.uint8)
        again = [
            place
            for place, row in enumerate(rows)
            if row is not None and not row.in_body and bytes(drawn[place, :3]) == COUNTDOWN.encode()
        ]
        if again:
            given[again, : len(FIRST_COUNTDOWN)] = FIRST_COUNTDOWN
            chosen = (told[again], self._tensor(uniform[1, again]), self._tensor(given[again]))
            drawn[again] = loop(*chosen).cpu().numpy()
            for place in again:
                rows[place].in_body = True  # type: ignore[union-attr]
        return drawn

    def _take(self, row: _Row, patch: np.ndarray) -> bool | None:
        """Add a patch to its row; say whether the piece is complete where it has ended, None where it goes on."""
        row.left -= 1
        if is_end(patch):
            row.patches.append(END_PATCH)
            return True
        row.patches.append(patch)
        row.text += decode(patch[None])[len(row.given) :]
        row.given = row.given[:0]
        return False if row.left == 0 else None

    def _go_on(self, row: _Row) -> bool:
        """Empty the context but for the header and the last lines of the body; say whether there was room to."""
        try:
            header, body = split_piece(row.text)
        except UserError:
            return False
        row.lines = row.lines or len(body) // 2
        if not row.lines:
            return False
        kept = "".join(header + body[-row.lines :])
        patches, given = encode_open(kept if row.text.endswith("\n") else kept.removesuffix("\n"))
        if len(patches) >= self.model.size.max_patches:
            return False
        row.patches, row.given = list(patches), given
        return True

    def _without_idle(self, cache: PatchCache, rows: list[_Row | None]) -> list[_Row | None]:
        """Drop rows for which no piece is left; a recorded loop goes on computing them."""
        busy = [place for place, row in enumerate(rows) if row is not None]
        if self.recorded or not busy or len(busy) >= _COMPACT_BELOW * len(rows):
            return rows
        cache.keep(self._tensor(np.array(busy)))
        return [rows[place] for place in busy]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)
