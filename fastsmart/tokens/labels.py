"""Style, composer and split of every piece of a dataset. Shape letter: P pieces.

They come from CSV manifests with the columns `path` (relative to the manifest's folder) and `style`, and perhaps
`composer`, `split` (train, valid or test) and `work` (the same for pieces of one work); or from folders whose pieces
are all of one style.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.styles import NAMED_TOKENS, Styles

Row = tuple[str, str, str, str]  # style, composer, split, work
SPLITS = ("train", "valid", "test")
LARGEST_BYTES = 64 * 2**20  # of a manifest
UNKNOWN = ("", "", "", "")
FEWEST_PIECES = 8  # in training that give a composer a token


@dataclass(frozen=True)
class Labels:
    """What is known of the P pieces of a dataset.

    style, composer, split : P texts each; "" = not known, and a piece without style has no split either
    work                   : P texts, equal for pieces of one work; a piece whose work is not known is one
    """

    style: tuple[str, ...]
    composer: tuple[str, ...]
    split: tuple[str, ...]
    work: tuple[str, ...]

    def pieces(self, split: str, style: str = "") -> np.ndarray:
        """Numbers of the pieces of a split, of one style or of all, int64."""
        chosen = [
            p
            for p, (of, own) in enumerate(zip(self.split, self.style, strict=True))
            if of == split and style in ("", own)
        ]
        return np.array(chosen, np.int64)

    def named(self) -> Styles:
        """Tokens for all styles, by their names' order, and for the composers with most pieces in training."""
        styles = sorted(set(self.style) - {""})
        if len(styles) > len(NAMED_TOKENS):
            raise UserError(
                f"the manifests name {len(styles)} styles, and the vocabulary has tokens for {len(NAMED_TOKENS)}"
            )
        count = Counter(
            (composer, style)
            for style, composer, split in zip(self.style, self.composer, self.split, strict=True)
            if split == "train" and composer
        )
        known: dict[str, str] = {}
        for (composer, style), pieces in sorted(count.items(), key=lambda item: (-item[1], item[0])):
            if pieces >= FEWEST_PIECES:
                known.setdefault(composer, style)
        free = NAMED_TOKENS[len(styles) :]
        return Styles(
            tuple(zip(styles, NAMED_TOKENS, strict=False)),
            tuple((composer, token, style) for (composer, style), token in zip(known.items(), free, strict=False)),
        )


def metres_of(labels: Labels, dataset: TokenDataset) -> tuple[tuple[str, tuple[tuple[str, float], ...]], ...]:
    """Shares of a style's training pieces by the metre they begin in, as `Styles.metres` has them."""
    named = dict(zip(dataset.vocab.ids_of("TimeSig"), dataset.vocab.values_of("TimeSig"), strict=True))
    found: list[tuple[str, tuple[tuple[str, float], ...]]] = []
    for style in sorted(set(labels.style) - {""}):
        begin = (
            next((named[i] for i in dataset.piece(int(p)) if i in named), "") for p in labels.pieces("train", style)
        )
        count = Counter(metre for metre in begin if metre)
        if count:
            shares = tuple((metre, round(n / count.total(), 4)) for metre, n in count.most_common())
            found.append((style, tuple((metre, share) for metre, share in shares if share > 0)))
    return tuple(found)


def read_labels(manifests: Sequence[str], files: Sequence[str], source: str, share: float, seed: int) -> Labels:
    """Labels of a dataset's pieces.

    manifests   : CSV files, or `STYLE=FOLDER`; the first that names a piece decides
    files       : P names of MIDI files below the folder `source`
    share, seed : of a folder's pieces, or of a manifest's without splits, the share that is held out, drawn by the
                  seed; every second of these is for test

    Raises UserError naming the manifest and line that cannot be read, a style that has no piece in one of the
    splits, or that fewer than two styles were named.
    """
    number = {str(Path(source, name).resolve()): p for p, name in enumerate(files)}
    rows: list[Row] = [UNKNOWN] * len(files)
    for manifest in manifests:
        name, equals, folder = manifest.partition("=")
        found = _folder(name, Path(folder), number) if equals else _manifest(Path(manifest), number)
        if not found:
            raise UserError(f"--styles {manifest} names none of the pieces below {source}")
        if not any(split for _, _, split, _ in found.values()):
            found = _split(found, share, seed)
        for p, row in found.items():
            rows[p] = row if rows[p] == UNKNOWN else rows[p]
    style, composer, split, work = zip(*rows, strict=True)
    labels = Labels(style, composer, split, tuple(name or file for name, file in zip(work, files, strict=True)))
    styles = sorted({*style} - {""})
    if len(styles) < 2:
        raise UserError(f"--styles names {', '.join(styles) or 'no style'}; name at least two styles, or leave it out")
    for name in styles:
        for part in SPLITS:
            if not len(labels.pieces(part, name)):
                raise UserError(f"--styles: {name} has no piece in the split {part!r}; add pieces of it")
    return labels


def _folder(style: str, folder: Path, number: dict[str, int]) -> dict[int, Row]:
    if not style or not folder.is_dir():
        raise UserError(f"--styles {style}={folder}: write it as STYLE=FOLDER, a folder of MIDI files that is there")
    below = folder.resolve()
    return {p: (style, "", "", "") for path, p in number.items() if below in Path(path).parents}


def _manifest(path: Path, number: dict[str, int]) -> dict[int, Row]:
    try:
        text = read_file(path, LARGEST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --styles {path}: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = {"path", "style"} - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"--styles {path} has no column {' and no column '.join(sorted(missing))} in its first line")
    found: dict[int, Row] = {}
    try:
        for row in reader:
            style, composer, split, work = (str(row.get(key) or "") for key in ("style", "composer", "split", "work"))
            if not style or "/" in style:
                raise UserError(f"--styles {path}, line {reader.line_num}: {style!r} is no name of a style")
            if split not in ("", *SPLITS):
                raise UserError(
                    f"--styles {path}, line {reader.line_num}: the split {split!r} must be one of {', '.join(SPLITS)}"
                )
            p = number.get(str((path.parent / str(row["path"])).resolve()))
            if p is not None:
                found[p] = (style, composer, split, work)
    except csv.Error as error:
        raise UserError(f"--styles {path}, line {reader.line_num}: {error}") from error
    return found


def _split(found: dict[int, Row], share: float, seed: int) -> dict[int, Row]:
    """The same pieces with splits, as `pretrain.split_pieces` holds them out."""
    pieces = sorted(found)
    order = np.random.default_rng([seed, 2]).permutation(len(pieces))
    held = max(round(len(pieces) * share), 2)  # one each
    split = dict.fromkeys(pieces, "train")
    for rank, k in enumerate(np.sort(order[:held])):
        split[pieces[int(k)]] = "test" if rank % 2 else "valid"
    return {p: (style, composer, split[p], work) for p, (style, composer, _, work) in found.items()}
