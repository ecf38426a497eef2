"""Outputs of a policy on the held-out prompts, and their scores on each soundfont. Shape letters: N outputs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from fastsmart.audio import find_soundfont
from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_file, file_hash
from fastsmart.notagen.engine import SheetPolicy
from fastsmart.notes import NoteBatch
from fastsmart.policy.device import resolved_dtype
from fastsmart.policy.transformer import Policy
from fastsmart.reward import RewardBlend, Scores
from fastsmart.run.provenance import judge_path, statistics_path
from fastsmart.sampling import Completion, Engine, RandomStream, SamplingSettings
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.trainer.rollout_pipeline import Progress
from fastsmart.trainer.rollout_worker import RolloutWorker

Playable = Policy | SheetPolicy  # what has a vocabulary, a device, and a way to be sampled from
CLIPS_AT_ONCE = 256  # played together: memory for their audio
LARGEST_BYTES = 4 * 2**30  # of what a policy played, unpacked: a million outputs of a thousand tokens


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
        with atomic_file(path) as part, open(part, "wb") as sink:
            np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: Path, fingerprint: str | None = None) -> Outputs | None:
        """Saved outputs, or None where there are none, or with another fingerprint than the one given.

        Raises UserError when the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            _require_size(path)
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
        except Exception as error:  # numpy, zipfile and zlib name a damaged byte in a dozen ways
            raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from error
        return Outputs(prompts, completions, scores)


def _require_size(path: Path) -> None:
    """Raises ValueError for an archive that would grow beyond reason when it is unpacked."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > LARGEST_BYTES:
            raise ValueError(f"it unpacks to more than {LARGEST_BYTES / 2**30:g} GiB")


class Player:
    """Has policies play held-out prompts and scores what they play, by the rollout worker of a training run.

    config     : prompts, sampling, audio and rewards, as of a training run
    soundfonts : names and paths to score on; the first is the one rewards are trained on

    needs_audio : whether any reward listens; if not there is one column of scores, "notes"

    Raises UserError where a reward cannot be used.
    """

    def __init__(self, config: Config, soundfonts: dict[str, Path], device: str = "cpu") -> None:
        self.config, self.statistics = config, statistics_path(config)
        reward = RewardBlend(config.reward, self.statistics, device, judge_path(config))
        self.needs_audio = reward.needs_audio
        self.reward = reward if device == "cpu" else None  # on a GPU each worker records graphs of its own
        self.soundfonts = soundfonts if self.needs_audio else {"notes": Path()}

    def play(self, policy: Playable, count: int, progress: Progress) -> Outputs:
        """One output for each of the first `count` prompts of the split "test", which no run has seen."""
        return self._on_others(policy, self._play(policy, count, 1, RandomStream.EVALUATE, progress), progress)

    def best_of(self, policy: Playable, count: int, n: int, progress: Progress) -> dict[int, Outputs]:
        """For k = 2, 4 ... up to n: the best by the reward of the first k of n further outputs for each prompt."""
        everything = self._play(policy, count, n, RandomStream.BEST_OF, progress)
        first = next(iter(self.soundfonts))
        total = np.nan_to_num(everything.scores[first].total.reshape(count, n), nan=-np.inf)
        found = {k: everything.select(np.arange(count) * n + total[:, :k].argmax(axis=1)) for k in best_of_counts(n)}
        return found | {n: self._on_others(policy, found[n], progress)}

    def _play(self, policy: Playable, count: int, group: int, stream: RandomStream, progress: Progress) -> Outputs:
        """`group` outputs for each prompt, with scores on the first soundfont."""
        font = next(iter(self.soundfonts))
        prompts: list[np.ndarray] = []
        completions: list[np.ndarray] = []
        scores: list[Scores] = []

        def told(stage: str, done: int, _: int) -> None:
            if stage == "sample":
                progress("sampling", len(completions) + done, count * group)

        with self._worker(policy, font, count, group) as worker:
            for scored in worker.generate_split("test", count, group, stream, told):
                rollout = scored.rollout
                for i in range(len(rollout)):
                    prompts.append(rollout.prompt_ids[i, : rollout.prompt_lengths[i]])
                    completions.append(rollout.ids[i, : rollout.lengths[i]])
                scores.append(scored.scores)
                progress(f"scoring on {font}", len(completions), count * group)
        return Outputs(TokenBatch.pack(prompts), TokenBatch.pack(completions), {font: Scores.concat(scores)})

    def _on_others(self, policy: Playable, outputs: Outputs, progress: Progress) -> Outputs:
        """The same outputs, one for each prompt, with scores on the other soundfonts too."""
        found = dict(outputs.scores)
        for font in [name for name in self.soundfonts if name not in found]:
            scores: list[Scores] = []
            with self._worker(policy, font, len(outputs), 1, Replay(outputs.completions)) as worker:
                for scored in worker.generate_split("test", len(outputs), 1, RandomStream.EVALUATE):
                    scores.append(scored.scores)
                    progress(f"scoring on {font}", sum(map(len, scores)), len(outputs))
            found[font] = Scores.concat(scores)
        return replace(outputs, scores=found)

    def _worker(
        self, policy: Playable, font: str, count: int, group: int, engine: Engine | None = None
    ) -> RolloutWorker:
        """A rollout worker that renders on this soundfont and holds some `CLIPS_AT_ONCE` clips, or one group."""
        config, audio = self.config, self.config.audio
        clips = max(group, min(count * group, CLIPS_AT_ONCE))
        config = replace(
            config,
            audio=replace(audio, soundfont=str(self.soundfonts[font])) if self.needs_audio else audio,
            train=replace(config.train, prompts=-(-clips // config.sampling.group)),
        )
        dtype = resolved_dtype(config.policy)
        if isinstance(policy, SheetPolicy):
            engine = engine or policy.engine()
        known = cast(Policy, policy)  # with an engine given, only the vocabulary and the device are asked for
        return RolloutWorker(config, known, self.statistics, dtype, reward=self.reward, engine=engine)


class Replay:
    """An engine that yields completions drawn before, so that they are scored again: with another soundfont."""

    version = 0

    def __init__(self, completions: TokenBatch) -> None:
        self.completions = completions

    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        for i in range(first, first + len(prompts) * settings.group):
            ids = self.completions.row(i)
            yield Completion(i, ids, np.zeros(len(ids), np.float32), self.version)

    def load(self, policy: Playable, version: int) -> None:
        self.version = version

    def first_difference(self, policy: Policy) -> str | None:
        return None

    def close(self) -> None: ...


def best_of_counts(n: int) -> list[int]:
    """2, 4, 8 ... below n, and n."""
    return [k for k in (2**j for j in range(1, n.bit_length())) if k < n] + [n]


def named_soundfonts(paths: list[str]) -> dict[str, Path]:
    """Soundfonts by the stem of their file.

    Raises UserError for one that cannot be used, for a name used twice, and for one under two names, as links of a
    distribution may have it: its second column would say nothing.
    """
    found: dict[str, Path] = {}
    hashes: dict[str, Path] = {}
    for path in paths:
        font = find_soundfont(path)
        if font.stem in found:
            raise UserError(f"two soundfonts are called {font.stem}: {found[font.stem]} and {font}; rename one")
        found[font.stem] = font
        same = hashes.setdefault(file_hash(font) if len(paths) > 1 else "", font)
        if same is not font:
            raise UserError(f"{font} is the soundfont {same} under another name; name one that sounds different")
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
