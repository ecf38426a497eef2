"""Measures of outputs by an encoder of music that nothing trains on: how varied, how near to real music, how far apart
by style. Shape letters: N outputs, D numbers of a vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.music.bootstrap import Draws, jackknife_draws, kept_by_jackknife
from fastsmart.music.covariance import Gaussian, fisher_ratio, frechet_distance
from fastsmart.music.diversity import prompt_numbers, vendi_score
from fastsmart.notes import NoteBatch
from fastsmart.reward.clamp3.reader import MusicReader
from fastsmart.reward.clamp3.styles import RealStyles, cosines
from fastsmart.reward.settings import RewardSettings
from fastsmart.study.style_stats import read_in_parts, vocabulary_hash
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

EFFECTIVE, FRECHET, BETWEEN = "clamp_effective_outputs", "frechet_music_distance", "between_style_ratio"
STYLE_TOKENS = ("PRE", "SUF", "INF")  # special tokens that music never uses, which name the style after BOS
SEED = 0


@dataclass(frozen=True)
class ClampMeasures:
    """An encoder of music and, where given, real music to compare with.

    checkpoint : where the weights came from
    """

    checkpoint: str
    reader: MusicReader
    real: RealStyles | None = None

    @staticmethod
    def of(checkpoint: str, styles: str, vocab: Vocabulary, device: str) -> ClampMeasures:
        """Load both; raises UserError for a file of no use, or real styles of other tokens or weights."""
        real = RealStyles.load(styles) if styles else None
        reader = MusicReader.shared(checkpoint, device)
        if real:
            real.require_made_with(reader, styles)
            if real.about.vocabulary != vocabulary_hash(vocab):
                raise UserError(
                    f"{styles} was made through another vocabulary than the policies'; make it anew with: "
                    f"fastsmart style-stats --vocabulary FOLDER_OF_THE_POLICY"
                )
        return ClampMeasures(checkpoint, reader, real)

    @cached_property
    def _real(self) -> Gaussian | None:
        return Gaussian.fit(self.real.vectors) if self.real else None

    def draws(self, prompts: TokenBatch, notes: NoteBatch, vocab: Vocabulary) -> dict[str, Draws]:
        """Each measure with its draws, by name; outputs without notes play no part.

        `between_style_ratio` is there where prompts ask for two styles or more, `frechet_music_distance` where there is
        real music.
        """
        writer = self.real.about.writer if self.real else "note_on"
        vectors = read_in_parts(self.reader, notes, writer, lambda stage, done, total: None)
        played, kept = notes.counts > 0, kept_by_jackknife(prompt_numbers(prompts), SEED)
        style = prompt_styles(prompts, vocab)

        def drawn(metric: Callable[[np.ndarray], float]) -> Draws:
            value = metric(np.flatnonzero(played))
            return jackknife_draws(value, np.array([metric(rows[played[rows]]) for rows in kept]), SEED)

        results = {EFFECTIVE: drawn(lambda rows: _effective(vectors[rows]))}
        if (real := self._real) is not None:
            results[FRECHET] = drawn(lambda rows: _distance(vectors[rows], real))
        if len(set(style[played])) > 1:
            results[BETWEEN] = drawn(lambda rows: fisher_ratio(vectors[rows], style[rows]))
        return results

    def about(self, reward: RewardSettings) -> dict[str, Any]:
        """Conditions of the measures, for evaluation.json."""
        reader = self.reader
        return {
            "checkpoint": self.checkpoint,
            "kind": reader.kind,
            "sha256": reader.sha256,
            "random": reader.random,
            "real": asdict(self.real.about) if self.real else None,
            "trained_on": any(weight for name, weight in reward.terms.items() if name.startswith("clamp_")),
        }


def prompt_styles(prompts: TokenBatch, vocab: Vocabulary) -> np.ndarray:
    """Text of the style token after BOS of each prompt, "" where there is none, str [N]."""
    second = [int(row[1]) if len(row) > 1 else 0 for row in prompts]
    return np.array([t if (t := vocab.tokens[i]).startswith(STYLE_TOKENS) else "" for i in second], object)


def named_files(checkpoint: str, styles: str) -> None:
    """Raise UserError where real styles are named without weights, or are no file."""
    if styles and not checkpoint:
        raise UserError("--clamp-styles needs the weights it was made with; name them with --clamp")
    if styles and not Path(styles).is_file():
        raise UserError(f"no real styles at {styles}; make them with: fastsmart style-stats")


def _effective(vectors: np.ndarray) -> float:
    return vendi_score(cosines(vectors, vectors)) if len(vectors) else float("nan")


def _distance(vectors: np.ndarray, real: Gaussian) -> float:
    return frechet_distance(Gaussian.fit(vectors), real) if len(vectors) > 1 else float("nan")
