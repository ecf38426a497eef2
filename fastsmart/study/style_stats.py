"""The job behind `fastsmart style-stats`: real pieces of several styles as an encoder of music hears them.

Pieces go the way of what a policy plays: through its tokens and back, into windows as long as its clips, and through
one writer. Else the encoder would hear who wrote the file, and not the style.

Shape letters: W windows, S styles.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file
from fastsmart.machine.text_table import text_table
from fastsmart.music.covariance import fisher_ratio
from fastsmart.music.windows import cut_windows
from fastsmart.notes import MIDI_SUFFIXES, NoteBatch
from fastsmart.reward.clamp3.reader import MusicReader
from fastsmart.reward.clamp3.reward import margins
from fastsmart.reward.clamp3.styles import RealStyles, StylesAbout, cosines
from fastsmart.tokens.dataset import encode_folder
from fastsmart.tokens.decode import decode
from fastsmart.tokens.vocabulary import Vocabulary

COPY_SHARE = 0.999  # of pairs of windows of different pieces that are less alike than a copy
READ_TOGETHER = 64  # windows
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StyleStatsSettings:
    """Settings of the windows.

    writer   : of `notes_text`
    window_s : seconds of a window: the length of the policy's clips
    windows  : most windows of one style, taken in turn from its pieces
    split    : of a manifest the rows whose column `split` says so; "" = all
    seed     : of the choice of windows
    """

    writer: str = "note_on"
    window_s: float = 10.0
    windows: int = 500
    split: str = ""
    seed: int = 0


def style_stats(
    source: str | Path,
    reader: MusicReader,
    vocab: Vocabulary,
    settings: StyleStatsSettings,
    progress: Progress = lambda stage, done, total: None,
) -> RealStyles:
    """Vectors of windows of real pieces, with the conditions they were made under.

    source : a folder with one folder of MIDI files a style, or a CSV file with columns `path`, relative to it, and
             `style`

    Raises UserError when there is no style, a style has no piece that can be read, or the CSV lacks a column.
    """
    folder, style_of = styled_files(source, settings.split)
    styles = tuple(sorted(set(style_of.values())))
    with tempfile.TemporaryDirectory() as scratch:
        encoded = encode_folder(
            folder,
            Path(scratch) / "pieces",
            vocab,
            0,
            lambda done, total, _: progress("reading MIDI files", done, total),
        )
        pieces = [(p, styles.index(style_of[name])) for p, name in enumerate(encoded.files) if name in style_of]
        windows = [cut_windows(decode([encoded.piece(p)], vocab), settings.window_s) for p, _ in pieces]
    style = np.repeat([s for _, s in pieces], [len(w) for w in windows])
    piece = np.repeat([p for p, _ in pieces], [len(w) for w in windows])
    for s, name in enumerate(styles):
        if not (style == s).any():
            raise UserError(f"no piece of style {name!r} in {source} could be read; mend its files or leave it out")
    chosen = chosen_windows(style, piece, settings.windows, settings.seed)
    clips = NoteBatch.concat(windows).select(chosen)
    about = StylesAbout(
        reader.kind,
        reader.sha256,
        settings.writer,
        settings.window_s,
        vocabulary_hash(vocab),
        styles,
        f"{Path(source).name}{f', split {settings.split}' if settings.split else ''}",
    )
    vectors = read_in_parts(reader, clips, settings.writer, progress)
    return RealStyles(about, vectors, style[chosen].astype(np.int64), piece[chosen].astype(np.int64))


def read_in_parts(reader: MusicReader, clips: NoteBatch, writer: str, progress: Progress) -> np.ndarray:
    """Vectors of many clips, float32 [N, D]."""
    vectors = np.zeros((len(clips), reader.width), np.float32)
    for first in range(0, len(clips), READ_TOGETHER):
        rows = np.arange(first, min(first + READ_TOGETHER, len(clips)))
        vectors[rows] = reader.read(clips.select(rows), writer)
        progress("reading windows", int(rows[-1]) + 1, len(clips))
    return vectors


def styled_files(source: str | Path, split: str = "") -> tuple[Path, dict[str, str]]:
    """The folder of MIDI files, and the style of each by its path below it; raises UserError as `style_stats`."""
    source = Path(source)
    if source.is_dir():
        if split:
            raise UserError(f"--split reads a column of a manifest, but {source} is a folder; name its CSV file")
        found = [p.relative_to(source) for p in source.rglob("*") if p.suffix.lower() in MIDI_SUFFIXES]
        style_of = {str(path): path.parts[0] for path in found if len(path.parts) > 1}
        if not style_of:
            raise UserError(f"{source} has no folder of MIDI files for each style; make one, or name a CSV file")
        return source, style_of
    try:
        text = read_file(source).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source} as a folder or a CSV file ({error})") from error
    rows = csv.DictReader(io.StringIO(text))
    needed = ["path", "style", *(["split"] if split else [])]
    lacking = [column for column in needed if column not in (rows.fieldnames or ())]
    if lacking:
        raise UserError(f"{source} lacks the column {lacking[0]!r}; its first line names path and style")
    try:
        listed = [row for row in rows if not split or row["split"] == split]
    except csv.Error as error:
        raise UserError(f"{source} is no CSV file ({error})") from error
    style_of = {str(PurePosixPath(row["path"] or "")): row["style"] or "" for row in listed}
    if not style_of or not all(style_of) or not all(style_of.values()):
        raise UserError(f"{source} lists no files{f' of split {split}' if split else ''}, or one without path or style")
    return source.parent, style_of


def chosen_windows(style: np.ndarray, piece: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Numbers of at most `most` windows of each style, sorted: one of each piece in turn, at random within a piece."""
    random = np.random.default_rng(seed).permutation(len(style))
    turn = np.zeros(len(style), np.int64)
    for p in np.unique(piece):
        rows = np.flatnonzero(piece == p)
        turn[rows[np.argsort(random[rows])]] = np.arange(len(rows))
    order = np.lexsort((random, turn))
    kept = [order[style[order] == s][:most] for s in np.unique(style)]
    return np.sort(np.concatenate(kept))


def vocabulary_hash(vocab: Vocabulary) -> str:
    """SHA-256 of the tokens in the order of their ids."""
    return hashlib.sha256("\n".join(vocab.tokens).encode()).hexdigest()


def copy_threshold(real: RealStyles) -> float:
    """Cosine that only one in a thousand pairs of windows of different pieces exceeds; NaN for a single piece."""
    likeness = cosines(real.vectors, real.vectors)
    apart = real.piece[:, None] > real.piece[None, :]
    return float(np.quantile(likeness[apart], COPY_SHARE)) if apart.any() else float("nan")


def style_table(real: RealStyles) -> str:
    """Table of how well the encoder tells real styles apart; a window is compared with styles without its own piece."""
    likeness = real.likeness_unheard()
    known = np.isfinite(likeness).all(axis=1)
    rows = [["style", "pieces", "windows", "cosine with its own", "margin", "found"]]
    found = []
    for s, name in enumerate(real.about.styles):
        own = likeness[known & (real.style == s)]
        counts = [str(len(np.unique(real.piece[real.style == s]))), str(int((real.style == s).sum()))]
        if not len(own):
            rows.append([name, *counts, "–", "–", "–"])
            continue
        found.append(float((own.argmax(axis=1) == s).mean()))
        margin = _spread(margins(own, np.full(len(own), s))) if real.count > 1 else "–"
        rows.append([name, *counts, _spread(own[:, s]), margin, f"{found[-1]:.0%}"])
    lines = [text_table(rows), "cosines and margins: median [5 %, 95 %] of windows, without the window's own piece"]
    if real.count > 1 and found:
        lines.append(f"found, mean of styles: {np.mean(found):.0%}, by chance {1 / real.count:.0%}")
        lines.append(f"variance between styles over within: {fisher_ratio(real.vectors, real.style):.3f}")
    lines.append(f"one pair in a thousand of windows of different pieces has a cosine above {copy_threshold(real):.4f}")
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"{middle:.4f} [{low:.4f}, {high:.4f}]"
