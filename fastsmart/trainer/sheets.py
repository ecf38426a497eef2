"""Pieces that NotaGen writes, drawn in styles and scored as music: what `fastsmart.trainer.sheet_dpo` learns from.

Shape letters: N pieces, P patches of each, C = 16 characters.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from fastsmart.audio import RenderPool
from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.files import make_folder, write_atomic
from fastsmart.notagen.engine import CHARACTERS_A_TOKEN
from fastsmart.notagen.model import NotaGen
from fastsmart.notagen.notation import read_abc
from fastsmart.notagen.patches import encode_prompt
from fastsmart.notagen.sampler import AS_THE_AUTHORS, PatchSampler
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, RewardBlend, Scores
from fastsmart.trainer.rollout_pipeline import Progress

TERM = "term "
WEIGHTS_KEY = "weights_sha256"


@dataclass(frozen=True)
class Sheets:
    """N pieces and what they are worth.

    patches  : uint8 [P, C] each, as the network saw them last
    begins   : int64 [N], patches of each that were given, not drawn
    pool     : int64 [N], number of its prompt
    complete : bool [N], whether it ended by itself
    notes    : int64 [N]; 0 where it cannot be read as music
    scores   : of the rewards, float32 [N]; NaN where it could not be scored
    """

    patches: list[np.ndarray]
    begins: np.ndarray
    pool: np.ndarray
    complete: np.ndarray
    notes: np.ndarray
    scores: Scores

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def characters(self) -> np.ndarray:
        """Characters of each that were drawn, all but the padding, int64 [N]: what its log-prob is a sum over."""
        drawn = (piece[begin:] for piece, begin in zip(self.patches, self.begins, strict=True))
        return np.array([np.count_nonzero(patches) for patches in drawn], np.int64)

    def save(self, path: Path, weights: str) -> None:
        """Keep them; `weights` is the hash of those that wrote them. Raises UserError when the disk is full."""
        content, lengths = io.BytesIO(), [len(piece) for piece in self.patches]
        arrays = {name: getattr(self, name) for name in ("begins", "pool", "complete", "notes")}
        arrays |= {"lengths": np.array(lengths, np.int64), "patches": np.concatenate(self.patches)}
        arrays |= {f"{TERM}{name}": values for name, values in self.scores.terms.items()}
        np.savez_compressed(content, **arrays, total=self.scores.total, **{WEIGHTS_KEY: np.array(weights)})  # type: ignore[arg-type]
        make_folder(path.parent)
        write_atomic(path, content.getvalue())

    @staticmethod
    def load(path: Path, weights: str = "") -> Sheets | None:
        """What was kept; None where there is nothing, or other weights than these, where any are named, wrote it.

        Raises UserError where it is damaged.
        """
        if not path.is_file():
            return None
        try:
            with open(path, "rb") as source, np.load(source, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if weights and str(arrays[WEIGHTS_KEY]) != weights:
                return None
            patches = np.split(arrays["patches"], np.cumsum(arrays["lengths"])[:-1])
            terms = {name.removeprefix(TERM): values for name, values in arrays.items() if name.startswith(TERM)}
            known = {name: arrays[name] for name in ("begins", "pool", "complete", "notes")}
            return Sheets(patches, **known, scores=Scores(terms, arrays["total"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it back") from error


class SheetPlayer:
    """Draws pieces from a network and scores them. A context manager, which ends its renderers.

    config  : sampling.max_tokens (of four characters each) and max_rows, audio and reward are read
    prompts : patches uint8 [P, C], one for each style
    """

    def __init__(self, config: Config, prompts: Sequence[np.ndarray], statistics: str | Path) -> None:
        self.config, self.prompts = config, list(prompts)
        drawn = config.sampling
        characters = CHARACTERS_A_TOKEN * drawn.max_tokens
        self.settings = replace(AS_THE_AUTHORS, max_tokens=characters, max_rows=drawn.max_rows)
        self.reward = RewardBlend(config.reward, statistics)
        most = max(config.dpo.prompts * drawn.group, config.train.eval_prompts)
        self.pool = RenderPool(config.audio, min(most, config.train.score_batch)) if self.reward.needs_audio else None

    def __enter__(self) -> SheetPlayer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.close()

    def play(
        self, model: NotaGen, prompts: int, group: int, seed: tuple[int, ...], progress: Progress
    ) -> tuple[Sheets, NoteBatch]:
        """`group` pieces of each of so many prompts, the styles in turn, and their notes as they were scored."""
        numbers = np.repeat(np.arange(prompts), group)
        given = [self.prompts[number % len(self.prompts)] for number in numbers]
        pieces = []
        for piece in PatchSampler(model, self.settings)(given, seed):
            pieces.append(piece)
            progress("sample", len(pieces), len(given))
        pieces.sort(key=lambda piece: piece.index)
        notes, _ = read_abc([piece.text for piece in pieces], self.config.audio.max_seconds)
        scores = Scores.concat(list(self._scored(notes, progress)))
        # a piece that has filled its context goes on without its prompt
        kept = [len(g) if np.array_equal(p.patches[: len(g)], g) else 1 for g, p in zip(given, pieces, strict=True)]
        complete = np.array([piece.complete for piece in pieces])
        patches = [piece.patches for piece in pieces]
        return Sheets(patches, np.array(kept), numbers, complete, notes.counts.astype(np.int64), scores), notes

    def _scored(self, notes: NoteBatch, progress: Progress) -> list[Scores]:
        found, size = [], self.config.train.score_batch
        for start in range(0, len(notes), size):
            some = notes.select(range(start, min(start + size, len(notes))))
            found.append(self.reward(Clips(some, self.pool.render(some) if self.pool else None)))
            progress("score", start + len(some), len(notes))
        return found


def prompts_of(styles: Sequence[str], known: bool) -> list[np.ndarray]:
    """Patches that pieces of these styles begin with; those of a piece of no style where none is named.

    known : whether the weights were trained with styles

    Raises UserError for a style that is none, or weights that know none.
    """
    from fastsmart.notagen.styles import read_style

    if styles and not known:
        raise UserError("these weights of NotaGen were trained without styles; leave prompts.styles empty")
    return [encode_prompt(read_style(style).lines) for style in styles] or [encode_prompt([])]
