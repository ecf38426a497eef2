"""Training rows that begin with a style, from pieces of many sources. Shape letters: B rows, T tokens of a row.

Sources differ in more than style: a score has one velocity, guessed tempi and exact onsets, a recording has a pianist's
hands. A policy would learn the source in place of the style, so rows of all styles get their velocities and tempi from
one distribution, and all pieces are put on one grid (`fastsmart.tokens.grid`) before rows are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fastsmart.policy.crops import Cropper, CropSettings
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.grid import on_grid
from fastsmart.tokens.labels import Labels
from fastsmart.tokens.styles import Styles


@dataclass(frozen=True)
class StyleSettings:
    """Settings of rows with styles."""

    temperature: float = 0.5
    """Power of a style's tokens, and within it of a composer's, to which their share of the rows is proportional."""
    style_dropped: float = 0.15
    """Share of rows without style, so that the policy also plays without one."""
    composer_kept: float = 0.5
    """Share of the rows with style whose composer, where it has a token, is named too."""
    tempo_factor: float = 1.5
    """Tempi of a row are multiplied by a factor between its inverse and this one, uniform in the logarithm."""
    loudness: tuple[float, float] = (60.0, 100.0)
    """Velocities between which the middle of a row lies."""
    top_note: float = 8.0
    """Velocity that the highest note of a chord has more than the others."""
    phrase_spread: float = 8.0
    """Standard deviation of the velocity's slow walk."""
    note_spread: float = 3.0
    """Standard deviation of one note's velocity around that."""


_SLOW = 0.9  # of the walk's deviation at one onset that is left at the next


class StyleCropper(Cropper):
    """Cuts rows as `Cropper` does, balanced over styles and composers, each after BOS and the token of its style."""

    def __init__(
        self,
        dataset: TokenDataset,
        labels: Labels,
        styles: Styles,
        pieces: np.ndarray,
        settings: CropSettings,
        style_settings: StyleSettings,
    ) -> None:
        super().__init__(dataset, pieces, settings)
        vocab = dataset.vocab
        self.style_settings = style_settings
        self.velocities, self.tempi = vocab.ids_of("Velocity"), np.array(vocab.ids_of("Tempo"))
        self.loudness = np.array([float(v) for v in vocab.values_of("Velocity")])
        self.bpm = np.array([float(v) for v in vocab.values_of("Tempo")])
        self.opens_onset = self.is_position | (np.arange(len(vocab)) == vocab.id("Bar_None"))
        piece = np.searchsorted(dataset.offsets, self.start, side="right") - 1
        self.style = np.array(labels.style)[piece]
        composer = np.array([f"{labels.style[p]}/{labels.composer[p]}" for p in range(len(labels.style))])[piece]
        tokens = {name: vocab.id(text) for name, text in styles.styles}
        self.tokens = {style: [vocab.bos_id, tokens[style]] for style in sorted(set(self.style.tolist()))}
        composers = {f"{style}/{name}": vocab.id(text) for name, text, style in styles.composers}
        self.named = {name: composers[name] for name in set(composer.tolist()) & set(composers)}
        self.groups: dict[str, list[tuple[str, np.ndarray]]] = {}
        self.share: dict[str, np.ndarray] = {}
        sizes = []
        for style in self.tokens:
            own = sorted(set(composer[self.style == style].tolist()))
            self.groups[style] = [(name, np.flatnonzero(composer == name)) for name in own]
            self.share[style] = self._shares([len(rows) for _, rows in self.groups[style]])
            sizes.append(sum(len(rows) for _, rows in self.groups[style]))
        self.style_share = self._shares(sizes)

    def _shares(self, sizes: list[int]) -> np.ndarray:
        weights = np.array(sizes, np.float64) ** self.style_settings.temperature
        return weights / weights.sum()

    def rows(self, rng: np.random.Generator, count: int, augment: bool = True) -> np.ndarray:
        """`count` random rows, int64 [B, T + 1], of random styles; without `augment` no style is dropped and nothing
        transposed, but velocities and tempi are drawn as ever."""
        styles = [str(style) for style in rng.choice(list(self.tokens), size=count, p=self.style_share)]
        return np.stack([self._styled(style, rng, augment) for style in styles])

    def rows_of(self, style: str, rng: np.random.Generator, count: int, augment: bool = False) -> np.ndarray:
        """`count` rows of one style as it is asked for, int64 [B, T + 1]; without `augment` as `rows` has them."""
        return np.stack([self._styled(style, rng, augment) for _ in range(count)])

    def touched_piece(self, p: int, rng: np.random.Generator) -> np.ndarray:
        """A whole piece with velocities and tempi as rows have them, ids [T]."""
        return self._in_tempo(self._touched(self.dataset.piece(p).astype(np.int64), rng), rng)

    def _styled(self, style: str, rng: np.random.Generator, augment: bool) -> np.ndarray:
        settings, length = self.style_settings, self.settings.length + 1
        composer, bars = self.groups[style][int(rng.choice(len(self.share[style]), p=self.share[style]))]
        ids = self._row(int(bars[rng.integers(len(bars))]), length)
        ids = self._transposed(ids, rng) if augment else ids
        ids = self._in_tempo(self._touched(ids, rng), rng)
        prefix = list(self.tokens[style])
        if augment and rng.random() < settings.style_dropped:
            prefix = [self.bos] if rng.random() < self.settings.bos_share else []
        elif augment and composer in self.named and rng.random() < settings.composer_kept:
            prefix.append(self.named[composer])
        ids = np.concatenate([prefix, ids]).astype(np.int64)[:length]
        return np.concatenate([ids, np.full(length - len(ids), self.pad, np.int64)])

    def _touched(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A row with velocities of its own: a slow walk around a level, louder on the highest note of an onset."""
        settings = self.style_settings
        at = np.flatnonzero((ids >= self.velocities[0]) & (ids <= self.velocities[-1]))
        if not len(at):
            return ids
        onset = np.cumsum(self.opens_onset[ids])[at]
        level, walk = rng.uniform(*settings.loudness), np.empty(int(onset.max()) + 1)
        steps = rng.normal(0.0, settings.phrase_spread, len(walk))
        steps[1:] *= (1 - _SLOW**2) ** 0.5
        walk[0] = steps[0]
        for k in range(1, len(walk)):
            walk[k] = _SLOW * walk[k - 1] + steps[k]
        top = np.append(np.diff(onset) != 0, True)  # notes of an onset rise
        loudness = level + walk[onset] + settings.top_note * top + rng.normal(0.0, settings.note_spread, len(at))
        out = ids.copy()
        out[at] = self.velocities[0] + np.abs(loudness[:, None] - self.loudness).argmin(1)
        return out

    def _in_tempo(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A row as much faster or slower as its tempi, in their proportions, can be."""
        factor = self.style_settings.tempo_factor ** rng.uniform(-1.0, 1.0)
        at = np.flatnonzero(self.is_tempo[ids])
        bpm = self.bpm[ids[at] - self.tempi[0]] * factor
        out = ids.copy()
        out[at] = self.tempi[np.abs(bpm[:, None] - self.bpm).argmin(1)]
        return out


def style_cropper(
    dataset: TokenDataset, labels: Labels, split: str, settings: CropSettings, style_settings: StyleSettings
) -> StyleCropper:
    """The cropper of the pieces of a split, of a dataset whose vocabulary knows its styles."""
    styles = dataset.vocab.styles
    if styles is None:
        raise ValueError("the dataset's vocabulary knows no styles; use `evened` first")
    return StyleCropper(dataset, labels, styles, labels.pieces(split), settings, style_settings)


def evened(dataset: TokenDataset, styles: Styles) -> TokenDataset:
    """A dataset with all pieces on one grid, in memory, its vocabulary knowing the styles."""
    pieces = [on_grid(dataset.piece(p), dataset.vocab) for p in range(len(dataset))]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in pieces])]).astype(np.int64)
    vocab = replace(dataset.vocab, styles=styles)
    return replace(dataset, ids=np.concatenate(pieces), offsets=offsets, vocab=vocab)
