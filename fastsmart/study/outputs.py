"""What a policy plays on the held-out prompts, and what it is worth on each soundfont. Shape letters: N outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fastsmart.audio import find_soundfont, render
from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.files import os_errors_as_user_errors
from fastsmart.notes import NoteBatch
from fastsmart.policy.device import resolved_dtype
from fastsmart.policy.transformer import Policy
from fastsmart.reward import Clips, RewardBlend, Scores
from fastsmart.run.provenance import statistics_path
from fastsmart.sampling import RandomStream, SamplingSettings, make_engine
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

CLIPS_AT_ONCE = 256  # rendered and scored together: memory for their audio
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outputs:
    """N outputs of a policy, one for each prompt.

    prompts, completions : N sequences each
    scores               : by name of the soundfont, in the order they were asked for; the first is the training one
    """

    prompts: TokenBatch
    completions: TokenBatch
    scores: dict[str, Scores]

    def __len__(self) -> int:
        return len(self.prompts)

    def notes(self, vocab: Vocabulary, max_seconds: float | None = None) -> NoteBatch:
        """The notes of all outputs, whole or up to `max_seconds`."""
        return _decoded(self.prompts, self.completions, vocab, max_seconds)

    def select(self, chosen: np.ndarray) -> Outputs:
        """The outputs of the given numbers, in that order."""
        scores = {name: _rows(s, chosen) for name, s in self.scores.items()}
        return Outputs(_picked(self.prompts, chosen), _picked(self.completions, chosen), scores)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write them as an npz; `fingerprint` says what they depend on. Raises UserError when the disk is full."""
        arrays = {"fingerprint": np.array(fingerprint)}
        for name, batch in (("prompt", self.prompts), ("completion", self.completions)):
            arrays |= {f"{name}_ids": batch.ids, f"{name}_offsets": batch.offsets}
        for font, scores in self.scores.items():
            arrays |= {f"total/{font}": scores.total}
            arrays |= {f"term/{font}/{term}": values for term, values in scores.terms.items()}
        part = path.with_name(f".{path.name}")
        with os_errors_as_user_errors(path):
            with open(part, "wb") as sink:
                np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]
            part.replace(path)

    @staticmethod
    def load(path: Path, fingerprint: str | None = None) -> Outputs | None:
        """Saved outputs, or None where there are none, or with another fingerprint than the one given.

        Raises UserError when the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if fingerprint is not None and str(arrays["fingerprint"]) != fingerprint:
                return None
            prompts, completions = (
                TokenBatch(arrays[f"{name}_ids"], arrays[f"{name}_offsets"]) for name in ("prompt", "completion")
            )
            scores = {}
            for font in (name.removeprefix("total/") for name in arrays if name.startswith("total/")):
                start = f"term/{font}/"
                terms = {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}
                scores[font] = Scores(terms, arrays[f"total/{font}"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from error
        return Outputs(prompts, completions, scores)


class Performer:
    """Has policies play held-out prompts and scores what they play; the rewards are loaded once.

    config     : prompts, sampling, audio and rewards, as of a training run
    soundfonts : names and paths to score on; the first is the one rewards are trained on
    """

    def __init__(self, config: Config, soundfonts: dict[str, Path], device: str = "cpu") -> None:
        self.config, self.soundfonts = config, soundfonts
        self.mix = RewardBlend(config.reward, statistics_path(config), device)
        if not self.mix.needs_audio:  # one column: nothing is heard
            self.soundfonts = {"notes": Path()}

    def play(self, policy: Policy, count: int, progress: Progress) -> Outputs:
        """One output for each of the first `count` prompts of the split "test", which no run has seen."""
        prompts, completions = self._draw(policy, count, 1, RandomStream.EVALUATE, progress)
        return Outputs(prompts, completions, self._scores(policy, prompts, completions, progress))

    def best_of(self, policy: Policy, count: int, n: int, progress: Progress) -> dict[int, Outputs]:
        """For k = 2, 4 ... up to n: the best by the reward of the first k of n further outputs for each prompt."""
        prompts, completions = self._draw(policy, count, n, RandomStream.BEST_OF, progress)
        first = next(iter(self.soundfonts))
        repeated = _picked(prompts, np.repeat(np.arange(count), n))
        scores = {first: self._score(policy, repeated, completions, first, progress)}
        everything = Outputs(repeated, completions, scores)
        total = np.nan_to_num(scores[first].total.reshape(count, n), nan=-np.inf)
        found = {}
        for k in best_of_counts(n):
            best = everything.select(np.arange(count) * n + total[:, :k].argmax(axis=1))
            if k == n:
                others = {
                    font: self._score(policy, best.prompts, best.completions, font, progress)
                    for font in self.soundfonts
                    if font != first
                }
                best = replace(best, scores=best.scores | others)
            found[k] = best
        return found

    def _draw(
        self, policy: Policy, count: int, group: int, stream: int, progress: Progress
    ) -> tuple[TokenBatch, TokenBatch]:
        """Prompts [count] and completions [count x group]."""
        config = self.config
        prompts = make_prompts(config.prompts, policy.vocab, "test", 0, count)
        settings: SamplingSettings = replace(config.sampling, group=group)
        engine = make_engine(settings, policy, dtype=resolved_dtype(config.policy), completions=count * group)
        completions: dict[int, np.ndarray] = {}
        try:
            for completion in engine.stream(prompts, settings, (config.train.seed, stream)):
                completions[completion.index] = completion.ids
                progress("sampling", len(completions), count * group)
        finally:
            engine.close()
        return prompts, TokenBatch.pack([completions[i] for i in range(count * group)])

    def _scores(
        self, policy: Policy, prompts: TokenBatch, completions: TokenBatch, progress: Progress
    ) -> dict[str, Scores]:
        return {font: self._score(policy, prompts, completions, font, progress) for font in self.soundfonts}

    def _score(
        self, policy: Policy, prompts: TokenBatch, completions: TokenBatch, font: str, progress: Progress
    ) -> Scores:
        settings = replace(self.config.audio, soundfont=str(self.soundfonts[font]))
        notes = _decoded(prompts, completions, policy.vocab, settings.max_seconds)
        parts = []
        for start in range(0, len(notes), CLIPS_AT_ONCE):
            part = notes.select(range(start, min(start + CLIPS_AT_ONCE, len(notes))))
            audio = render(part, **asdict(settings)) if self.mix.needs_audio else None
            parts.append(self.mix(Clips(part, audio)))
            progress(f"scoring on {font}", start + len(part), len(notes))
        terms = {name: np.concatenate([p.terms[name] for p in parts]) for name in parts[0].terms}
        return Scores(terms, np.concatenate([p.total for p in parts]))


def best_of_counts(n: int) -> list[int]:
    """2, 4, 8 ... below n, and n."""
    return [k for k in (2**j for j in range(1, n.bit_length())) if k < n] + [n]


def named_soundfonts(paths: list[str]) -> dict[str, Path]:
    """Soundfonts by the stem of their file; raises UserError for one that cannot be used, and for a name used twice."""
    found: dict[str, Path] = {}
    for path in paths:
        font = find_soundfont(path)
        if font.stem in found:
            raise UserError(f"two soundfonts are called {font.stem}: {found[font.stem]} and {font}; rename one")
        found[font.stem] = font
    return found


def _decoded(
    prompts: TokenBatch, completions: TokenBatch, vocab: Vocabulary, max_seconds: float | None = None
) -> NoteBatch:
    whole = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    return decode(TokenBatch.pack(whole), vocab, max_seconds)


def _picked(tokens: TokenBatch, chosen: np.ndarray) -> TokenBatch:
    return TokenBatch.pack([tokens.row(int(i)) for i in chosen])


def _rows(scores: Scores, chosen: np.ndarray) -> Scores:
    return Scores({name: values[chosen] for name, values in scores.terms.items()}, scores.total[chosen])
