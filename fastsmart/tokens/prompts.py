"""Prompts, which the policy is asked to continue, from five sources. Shape letters: P prompts, K tokens of a prompt.

* `procedural`: Bar, a time signature, Position_0 and a tempo, uniformly random: the paper's prompts (section 4).
* `procedural-note`: the same and a first note of random pitch, velocity and duration: the released script's default.
* `first-note`: the same seven tokens, but the pitch belongs to the opening, as time signature and tempo do, and so do a
  velocity and a duration drawn once for it: many openings even in one metre.
* `dataset`: the same four tokens with the first time signature and tempo of random pieces (the paper, section 5.3).
* `bos`: only the token that begins a piece.

Where styles are asked for, BOS and the tokens of a style come before all this; number i asks for the i-th of them, from
the first again after the last. Where `styles.json` gives the metres of the style, the opening is in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.limits import MOST_AT_ONCE, require_kind
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.settings import PromptSettings
from fastsmart.tokens.styles import STYLES_FILE
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary

SPLITS = ("train", "selection", "test")
HELDOUT_SHARE = 8  # one in eight
FIRST_NOTE_SHARE = 4  # one in four for selection, one in four for test
MIN_TO_SPLIT = 16  # openings or pieces; below it the prompts of every split are drawn from all of them
NOTE_KINDS = ("Pitch", "Velocity", "Duration")
LIMITED = {  # what a kind of token is called in the settings, and its unit
    "Tempo": ("tempo", " bpm"),
    "Pitch": ("pitch", ""),
    "Velocity": ("velocity", ""),
    "Duration": ("duration", " beats"),
}
# second number of the seed
TRAIN_STREAM, HELDOUT_STREAM, UNSPLIT_STREAM, ORDER_STREAM, NOTE_STREAM, METRE_STREAM = range(6)


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
    return _any_split(_procedural("procedural", time_signatures, tempo_range, seed), vocab, n)


def procedural_with_note(
    vocab: Vocabulary,
    n: int,
    seed: int = 0,
    time_signatures: Sequence[str] | None = None,
    tempo_range: tuple[float, float] | None = None,
) -> Prompts:
    """n prompts as `procedural` makes them, each with a first note: a uniformly random Pitch, Velocity and Duration."""
    return _any_split(_procedural("procedural-note", time_signatures, tempo_range, seed), vocab, n)


def from_dataset(vocab: Vocabulary, dataset: str | Path, n: int, seed: int = 0) -> Prompts:
    """n prompts of the procedural form with the first time signature and tempo of random pieces of an encoded dataset.

    Raises UserError when the folder holds no dataset, or one of another vocabulary.
    """
    return _any_split(PromptSettings("dataset", dataset=str(dataset), seed=seed), vocab, n)


def bos(vocab: Vocabulary, n: int) -> Prompts:
    """n prompts of nothing but BOS."""
    return _any_split(PromptSettings("bos"), vocab, n)


class PromptSource:
    """The prompts of these settings in the ids of a vocabulary, by number.

    A prompt is a function of the settings, the vocabulary, the split and its number alone, so a run resumes from a
    number. Train prompts are drawn at random with repetition; the other splits go through their openings in turn, so
    that an evaluation repeats none before all have come.

    An opening is a time signature and a tempo, of `first-note` also a note, of `dataset` a piece. Of `first-note`, one
    in four is kept for selection and another one in four for test. Of the other sources one in eight is held out, few
    enough that selection and test share them: prompt i is the same in both. Below 16 openings, and for `bos`, all
    splits draw from the same ones. Two pieces of a dataset can begin in the same time signature and tempo: then it is
    the piece that is held out, not the four tokens.

    size : openings of all splits

    Raises UserError naming the setting that cannot be met.
    """

    def __init__(self, settings: PromptSettings, vocab: Vocabulary) -> None:
        self.vocab, self.seed = vocab, settings.seed
        self.size, self._opening = _openings(settings, vocab)
        self._added = _added_note(settings, vocab)
        self._prefixes = style_prefixes(vocab, settings.styles)
        self._metres = _metres(vocab, settings.styles) if settings.style_metres else {}
        shuffled = _shuffled(self.size, settings.seed)
        self._pools = {split: _of_split(shuffled, settings.source, split) for split in SPLITS}

    def take(self, split: str, start: int, n: int) -> TokenBatch:
        """Prompts number `start` to `start + n - 1` of a split: "train"; "selection", which evaluates a run as it goes
        and chooses its checkpoint; or "test", which no run sees."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        pool, turns = self._pools[split], max(1, len(self._prefixes))
        rows = []
        for number in range(start, start + n):
            random = _random(self.seed, TRAIN_STREAM if split == "train" else HELDOUT_STREAM, number)
            drawn = int(random.integers(len(pool)))
            chosen = drawn if split == "train" else number // turns % len(pool)
            row = self.begun(int(pool[chosen]), random)
            rows.append(self._asking(row, number) if self._prefixes else row)
        return TokenBatch.pack(rows)

    def _asking(self, row: list[int], number: int) -> list[int]:
        """A prompt that asks for the style whose turn it is, in one of the style's metres."""
        turn, random = number % len(self._prefixes), _random(self.seed, METRE_STREAM, number)
        return _after(self._prefixes[turn], _in_metre(row, self._metres.get(turn), random, self.vocab), self.vocab)

    def begun(self, j: int, random: np.random.Generator) -> list[int]:
        """Ids of a prompt that begins with opening j, without a style."""
        return self._opening(j) + [int(random.choice(ids)) for ids in self._added]


def make_prompts(settings: PromptSettings, vocab: Vocabulary, split: str, start: int, n: int) -> TokenBatch:
    """Prompts of a split by number, as `PromptSource.take` gives them."""
    return PromptSource(settings, vocab).take(split, start, n)


def style_prefixes(vocab: Vocabulary, styles: Sequence[str], where: str = "prompts.styles") -> list[list[int]]:
    """Ids that come before the music where these styles are asked for: BOS, the style's and perhaps the composer's.

    Raises UserError, beginning with `where`, for a style that the policy does not know.
    """
    if not styles:
        return []
    if vocab.styles is None:
        raise UserError(
            f"{where} asks for {', '.join(styles)}, and the policy knows no styles (it has no {STYLES_FILE}); "
            "use one that pretrain --styles has made, or leave it out"
        )
    return [[vocab.bos_id, *map(vocab.id, vocab.styles.prefix(style, where))] for style in styles]


def asked_styles(prompts: TokenBatch, vocab: Vocabulary) -> list[str]:
    """The style that each of P prompts asks for; "" where it asks for none."""
    if vocab.styles is None:
        return [""] * len(prompts)
    style_of = {vocab.id(token): style for style, token in vocab.styles.styles}
    return [style_of.get(int(row[1]), "") if len(row) > 1 else "" for row in prompts]


def styled(
    prompts: Prompts, styles: Sequence[str], where: str = "prompts.styles", metres_seed: int | None = None
) -> Prompts:
    """The same prompts, asking for these styles in turn; raises UserError as `style_prefixes` does.

    metres_seed : of the metres that are drawn for the openings, from the styles' own; None = as they are
    """
    prefixes, vocab = style_prefixes(prompts.vocab, styles, where), prompts.vocab
    metres = {} if metres_seed is None else _metres(vocab, styles)
    rows = []
    for i, row in enumerate(prompts.tokens):
        random = _random(metres_seed or 0, METRE_STREAM, i)
        opening = _in_metre(row.tolist(), metres.get(i % len(prefixes)), random, vocab)
        rows.append(_after(prefixes[i % len(prefixes)], opening, vocab))
    return Prompts(TokenBatch.pack(rows), vocab)


def _metres(vocab: Vocabulary, styles: Sequence[str]) -> dict[int, dict[int, float]]:
    """Shares of each asked style's metres by their tokens' ids, by the style's place; styles without are left out."""
    known = dict(vocab.styles.metres) if vocab.styles else {}
    asked = [known.get(style.partition("/")[0], ()) for style in styles]
    tables = [{vocab.id(f"TimeSig_{metre}"): share for metre, share in shares} for shares in asked]
    return {turn: table for turn, table in enumerate(tables) if table}


def _in_metre(
    row: list[int], metres: dict[int, float] | None, random: np.random.Generator, vocab: Vocabulary
) -> list[int]:
    """A prompt whose time signature, where it has one, is drawn from these metres."""
    at = next((k for k, token in enumerate(row) if vocab.tokens[token].startswith("TimeSig_")), None)
    if not metres or at is None:
        return row
    shares = np.array(list(metres.values()))
    return [*row[:at], int(random.choice(list(metres), p=shares / shares.sum())), *row[at + 1 :]]


def _after(prefix: list[int], row: list[int], vocab: Vocabulary) -> list[int]:
    """A prompt after the ids of a style, which begin with BOS."""
    return prefix + (row[1:] if prefix and row[:1] == [vocab.bos_id] else row)


def describe(ids: Sequence[int] | np.ndarray, vocab: Vocabulary) -> str:
    """A prompt in a musician's words, such as `3/4, 96.67 bpm`; a note is given as its tokens, no music as `BOS`."""
    words = []
    texts = [vocab.tokens[i] for i in ids]
    if vocab.styles and any(map(vocab.styles.name_of, texts)):
        texts = [text for text in texts if text != "BOS_None"]
    for text in texts:
        kind, value = text.split("_", 1)
        if vocab.styles and (name := vocab.styles.name_of(text)):
            words.append(name)
        elif kind == "Tempo":
            words.append(f"{float(value):g} bpm")
        elif kind == "TimeSig":
            words.append(value)
        elif kind not in ("Bar", "Position"):
            words.append(kind if value == "None" else text)
    return ", ".join(words)


def _procedural(
    source: str, time_signatures: Sequence[str] | None, tempo_range: tuple[float, float] | None, seed: int
) -> PromptSettings:
    """Settings from arguments of Python; raises TypeError naming one that is of another kind."""
    require_kind(seed, int, "seed", "a whole number")
    require_kind(time_signatures, (list, tuple, type(None)), "time_signatures", 'a list such as ["3/4"], or None')
    for signature in time_signatures or ():
        require_kind(signature, str, "time_signatures", 'a list such as ["3/4"], or None')
    require_kind(tempo_range, (list, tuple, type(None)), "tempo_range", "two numbers, or None")
    low, high = (0.0, 0.0) if tempo_range is None else tempo_range if len(tempo_range) == 2 else (None, None)
    for bpm in (low, high):
        require_kind(bpm, (int, float), "tempo_range", "two numbers, or None")
    return PromptSettings(source, tuple(time_signatures or ()), low, high, seed=seed)


def _any_split(settings: PromptSettings, vocab: Vocabulary, n: int) -> Prompts:
    """n random prompts with nothing held out; raises UserError for a number of them that cannot be meant, TypeError
    naming an argument that is of another kind."""
    require_kind(vocab, Vocabulary, "vocab", "a vocabulary, such as that of a policy, policy.vocab")
    require_kind(n, int, "n", "a whole number")
    if not 1 <= n <= MOST_AT_ONCE:
        raise UserError(f"{n} prompts were asked for; ask for 1 to {MOST_AT_ONCE:,}")
    source, random = PromptSource(settings, vocab), _random(settings.seed, UNSPLIT_STREAM)
    rows = [source.begun(int(random.integers(source.size)), random) for _ in range(n)]
    return Prompts(TokenBatch.pack(rows), vocab)


def _of_split(pool: np.ndarray, source: str, split: str) -> np.ndarray:
    """The openings of a split, out of all in the order of the seed."""
    if len(pool) < MIN_TO_SPLIT:
        return pool
    if source != "first-note":
        heldout = len(pool) // HELDOUT_SHARE
        return pool[heldout:] if split == "train" else pool[:heldout]
    share = len(pool) // FIRST_NOTE_SHARE
    return {"test": pool[:share], "selection": pool[share : 2 * share], "train": pool[2 * share :]}[split]


def _openings(settings: PromptSettings, vocab: Vocabulary) -> tuple[int, Callable[[int], list[int]]]:
    """Number of openings that a source has, and a function that gives the tokens of opening j."""
    if settings.source == "bos":
        return 1, lambda j: [vocab.bos_id]
    if not vocab.ids_of("TimeSig") or not vocab.ids_of("Tempo"):
        raise UserError(
            f"prompts.source {settings.source!r} needs TimeSig and Tempo tokens, which the vocabulary lacks; use 'bos'"
        )
    if settings.source == "dataset":
        dataset = _dataset(settings.dataset, vocab)
        return len(dataset), lambda j: _opening(vocab, *_first_time(dataset, j))
    signatures, tempi = _time_signatures(settings, vocab), _within(settings, vocab, "Tempo")
    metres = len(signatures) * len(tempi)

    def in_time(j: int) -> list[int]:
        return _opening(vocab, signatures[j // len(tempi)], tempi[j % len(tempi)])

    if settings.source != "first-note":
        return metres, in_time
    pitches, velocities, durations = (_within(settings, vocab, kind) for kind in NOTE_KINDS)

    def with_note(j: int) -> list[int]:
        random = _random(settings.seed, NOTE_STREAM, j)
        touch = [int(random.choice(velocities)), int(random.choice(durations))]
        return [*in_time(j // len(pitches)), pitches[j % len(pitches)], *touch]

    return metres * len(pitches), with_note


def _opening(vocab: Vocabulary, time_signature: int, tempo: int) -> list[int]:
    return [vocab.id("Bar_None"), time_signature, vocab.id("Position_0"), tempo]


def _added_note(settings: PromptSettings, vocab: Vocabulary) -> list[list[int]]:
    """Ids from which `procedural-note` draws the note that it adds to an opening, a list for each token of the note."""
    return [_within(settings, vocab, kind) for kind in NOTE_KINDS] if settings.source == "procedural-note" else []


def _time_signatures(settings: PromptSettings, vocab: Vocabulary) -> list[int]:
    known = dict(zip(vocab.values_of("TimeSig"), vocab.ids_of("TimeSig"), strict=True))
    for wanted in settings.time_signatures:
        if wanted not in known:
            raise UserError(f"prompts.time_signatures: no {wanted!r} in the vocabulary; it has {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(settings.time_signatures) or known]


def _within(settings: PromptSettings, vocab: Vocabulary, kind: str) -> list[int]:
    """Ids of the tokens of a kind between its two limits; raises UserError naming the limits where there is none."""
    key, unit = LIMITED[kind]
    low, high = getattr(settings, f"{key}_min"), getattr(settings, f"{key}_max")
    values = [_number(value) for value in vocab.values_of(kind)]
    chosen = [i for i, x in zip(vocab.ids_of(kind), values, strict=True) if low <= x <= (high or float("inf"))]
    if not chosen:
        shown = [f"{x:g}" for x in values]
        if len(shown) > 12:
            shown[3:-3] = ["..."]
        raise UserError(
            f"prompts.{key}_min {low:g} and prompts.{key}_max {high:g} leave no {key}; the vocabulary has "
            f"{', '.join(shown)}{unit}"
        )
    return chosen


def _number(value: str) -> float:
    """Number behind the underscore of a token; of a duration such as `1.6.12`, a beat and six twelfths, in beats."""
    beats, _, part = value.partition(".")
    steps, _, resolution = part.partition(".")
    return int(beats) + int(steps) / int(resolution) if resolution else float(value)


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
    return _random(seed, ORDER_STREAM).permutation(size)


def _random(seed: int, *key: int) -> np.random.Generator:
    """An independent stream for every key, the same on every machine."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
