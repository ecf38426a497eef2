"""What the policy is asked to continue: four sources of prompts. Shape letters: P prompts, K tokens of a prompt.

* `procedural`: Bar, a time signature, Position_0 and a tempo, uniformly random: the paper's prompts (section 4).
* `procedural-note`: the same and a first note of random pitch, velocity and duration: the released script's default.
* `dataset`: the same four tokens with the first time signature and tempo of random pieces (the paper, section 5.3).
* `bos`: only the token that begins a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

SOURCES = ("procedural", "procedural-note", "dataset", "bos")
SPLITS = ("train", "heldout")
NOTE_KINDS = ("Pitch", "Velocity", "Duration")
HELDOUT_SHARE = 8  # one in eight
MIN_TO_SPLIT = 16  # openings or pieces; below it train and held-out prompts are drawn from all of them


@dataclass(frozen=True)
class PromptSettings:
    """Where the prompts of a run come from; `prompts` in the configuration.

    source         : one of `SOURCES`
    time_signatures: of procedural prompts, such as "3/4"; none means all of the vocabulary
    tempo_min, tempo_max : bpm of procedural prompts, both included; 0 means no limit
    dataset        : folder of an encoded dataset, for source "dataset"
    seed           : of which prompts are held out and in which order all of them come

    Raises UserError for an unknown source or a negative seed; what depends on the vocabulary `make_prompts` checks.
    """

    source: str = "procedural"
    time_signatures: tuple[str, ...] = ()
    tempo_min: float = 0.0
    tempo_max: float = 0.0
    dataset: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UserError(f"prompts.source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        if self.seed < 0:
            raise UserError(f"prompts.seed must be 0 or more, not {self.seed}")


@dataclass(frozen=True)
class Prompts:
    """P prompts and the vocabulary their ids belong to; has the arrays of the `TokenBatch` it holds."""

    tokens: TokenBatch
    vocab: Vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> np.ndarray:
        """Ids of all prompts, one after the other, int32."""
        return self.tokens.ids

    @property
    def offsets(self) -> np.ndarray:
        """Prompt i is `ids[offsets[i]:offsets[i + 1]]`, int64 [P + 1]."""
        return self.tokens.offsets

    def row(self, i: int) -> np.ndarray:
        """Ids of prompt i, int32 [K]."""
        return self.tokens.row(i)

    def text(self, i: int) -> str:
        """Prompt i in a musician's words (see `describe`)."""
        return describe(self.row(i), self.vocab)


def procedural(
    vocab: Vocabulary,
    n: int,
    seed: int = 0,
    time_signatures: Sequence[str] | None = None,
    tempo_range: tuple[float, float] | None = None,
) -> Prompts:
    """n prompts `Bar_None TimeSig_x Position_0 Tempo_y`, uniformly random over the vocabulary or what is asked of it.

    Raises UserError when the vocabulary has no such time signature, or no tempo in the range (bpm, both ends in).
    """
    low, high = tempo_range or (0.0, 0.0)
    settings = PromptSettings("procedural", tuple(time_signatures or ()), low, high, seed=seed)
    return _any_split(settings, vocab, n)


def procedural_with_note(
    vocab: Vocabulary,
    n: int,
    seed: int = 0,
    time_signatures: Sequence[str] | None = None,
    tempo_range: tuple[float, float] | None = None,
) -> Prompts:
    """n prompts as `procedural` makes them, each with a first note: a uniformly random Pitch, Velocity and Duration."""
    low, high = tempo_range or (0.0, 0.0)
    settings = PromptSettings("procedural-note", tuple(time_signatures or ()), low, high, seed=seed)
    return _any_split(settings, vocab, n)


def from_dataset(vocab: Vocabulary, dataset: str | Path, n: int, seed: int = 0) -> Prompts:
    """n prompts of the procedural form with the first time signature and tempo of random pieces of an encoded dataset.

    Raises UserError when the folder holds no dataset, or one of another vocabulary.
    """
    return _any_split(PromptSettings("dataset", dataset=str(dataset), seed=seed), vocab, n)


def bos(vocab: Vocabulary, n: int) -> Prompts:
    """n prompts of nothing but BOS."""
    return _any_split(PromptSettings("bos"), vocab, n)


def make_prompts(settings: PromptSettings, vocab: Vocabulary, split: str, start: int, n: int) -> TokenBatch:
    """Prompts number `start` to `start + n - 1` of a split, "train" or "heldout".

    A prompt is a function of the settings, the vocabulary, the split and its number alone, so a run resumes from a
    number. Train prompts are drawn at random with repetition; held-out prompts go through theirs in turn, so that an
    evaluation repeats none before all have come.

    One opening in eight (procedural: a pair of time signature and tempo; dataset: a piece) is held out and never
    trained on. Below 16 openings, and for `bos`, both splits draw from the same ones. Two pieces of a dataset can
    begin in the same time signature and tempo: then it is the piece that is held out, not the four tokens.

    Raises UserError naming the setting that cannot be met.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    size, opening = _openings(settings, vocab)
    pool = _shuffled(size, settings.seed)
    if size >= MIN_TO_SPLIT:
        heldout = size // HELDOUT_SHARE
        pool = pool[:heldout] if split == "heldout" else pool[heldout:]
    rows = []
    for number in range(start, start + n):
        random = _random(settings.seed, SPLITS.index(split), number)
        drawn = int(random.integers(len(pool)))
        chosen = number % len(pool) if split == "heldout" else drawn
        rows.append(opening(int(pool[chosen])) + _first_note(settings, vocab, random))
    return TokenBatch.pack(rows)


def describe(ids: Sequence[int] | np.ndarray, vocab: Vocabulary) -> str:
    """A prompt in a musician's words, such as `3/4, 96.67 bpm`; a note is given as its tokens, no music as `BOS`."""
    words = []
    for text in (vocab.tokens[i] for i in ids):
        kind, value = text.split("_", 1)
        if kind == "Tempo":
            words.append(f"{float(value):g} bpm")
        elif kind == "TimeSig":
            words.append(value)
        elif kind not in ("Bar", "Position"):
            words.append(kind if value == "None" else text)
    return ", ".join(words)


def _any_split(settings: PromptSettings, vocab: Vocabulary, n: int) -> Prompts:
    """n random prompts with nothing held out."""
    size, opening = _openings(settings, vocab)
    random = _random(settings.seed, len(SPLITS))
    rows = [opening(int(random.integers(size))) + _first_note(settings, vocab, random) for _ in range(n)]
    return Prompts(TokenBatch.pack(rows), vocab)


def _openings(settings: PromptSettings, vocab: Vocabulary) -> tuple[int, Callable[[int], list[int]]]:
    """How many openings a source has, and the tokens of opening j."""
    if settings.source == "bos":
        return 1, lambda j: [vocab.bos_id]
    if not vocab.ids_of("TimeSig") or not vocab.ids_of("Tempo"):
        raise UserError(
            f"prompts.source {settings.source!r} needs TimeSig and Tempo tokens, which the vocabulary lacks; use 'bos'"
        )
    if settings.source == "dataset":
        dataset = _dataset(settings.dataset, vocab)
        return len(dataset), lambda j: _opening(vocab, *_first_time(dataset, j))
    signatures, tempi = _time_signatures(settings, vocab), _tempi(settings, vocab)
    return len(signatures) * len(tempi), lambda j: _opening(vocab, signatures[j // len(tempi)], tempi[j % len(tempi)])


def _opening(vocab: Vocabulary, time_signature: int, tempo: int) -> list[int]:
    return [vocab.id("Bar_None"), time_signature, vocab.id("Position_0"), tempo]


def _first_note(settings: PromptSettings, vocab: Vocabulary, random: np.random.Generator) -> list[int]:
    if settings.source != "procedural-note":
        return []
    choices = [vocab.ids_of(kind) for kind in NOTE_KINDS]
    return [ids[random.integers(len(ids))] for ids in choices]


def _time_signatures(settings: PromptSettings, vocab: Vocabulary) -> list[int]:
    known = dict(zip(vocab.values_of("TimeSig"), vocab.ids_of("TimeSig"), strict=True))
    for wanted in settings.time_signatures:
        if wanted not in known:
            raise UserError(f"prompts.time_signatures: no {wanted!r} in the vocabulary; it has {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(settings.time_signatures) or known]


def _tempi(settings: PromptSettings, vocab: Vocabulary) -> list[int]:
    low, high = settings.tempo_min, settings.tempo_max or float("inf")
    bpm = [float(value) for value in vocab.values_of("Tempo")]
    chosen = [i for i, value in zip(vocab.ids_of("Tempo"), bpm, strict=True) if low <= value <= high]
    if not chosen:
        raise UserError(
            f"prompts.tempo_min {low:g} and prompts.tempo_max {high:g} leave no tempo; the vocabulary has "
            f"{', '.join(f'{value:g}' for value in bpm)} bpm"
        )
    return chosen


def _dataset(folder: str, vocab: Vocabulary) -> TokenDataset:
    if not folder:
        raise UserError("prompts.dataset is empty; prompts.source 'dataset' needs the folder of an encoded dataset")
    path = Path(folder)
    dataset = _open(folder, path.stat().st_mtime_ns if path.exists() else 0)
    if dataset.vocab.tokens != vocab.tokens:
        raise UserError(
            f"prompts.dataset {folder} was encoded with another vocabulary than the policy's; encode it again"
        )
    return dataset


@lru_cache(maxsize=2)
def _open(folder: str, modified_ns: int) -> TokenDataset:
    """Opened once a process, not once a step; again when the folder was replaced."""
    return TokenDataset.open(folder)


def _first_time(dataset: TokenDataset, p: int) -> tuple[int, int]:
    """Ids of the first TimeSig and the first Tempo token of piece p."""
    piece = dataset.piece(p)
    first = []
    for kind in ("TimeSig", "Tempo"):
        at = np.flatnonzero(np.isin(piece, dataset.vocab.ids_of(kind)))
        if len(at) == 0:
            raise UserError(f"prompts.dataset: {dataset.files[p]} has no {kind} token; encode the dataset again")
        first.append(int(piece[at[0]]))
    return first[0], first[1]


@lru_cache(maxsize=8)
def _shuffled(size: int, seed: int) -> np.ndarray:
    return _random(seed, len(SPLITS) + 1).permutation(size)


def _random(seed: int, *key: int) -> np.random.Generator:
    """An independent stream for every key, the same on every machine."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
