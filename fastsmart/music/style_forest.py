"""A second judge of styles, of another family, which no training sees: a random forest on other counts of the notes.

Breiman (2001), "Random Forests": each tree is grown on a resample of the clips, and each split chosen among a few
features. Shape letters: N clips, F features, S styles, K nodes of all trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_file
from fastsmart.music.style_counts import masked, pair_counts
from fastsmart.notes import NoteBatch

FOREST_FILE = "style-forest.npz"  # beside a policy's styles.json
TREES = 80
FEWEST = 4  # clips of a leaf
LEVELS = 16  # thresholds that a feature is tried at, quantiles of the clips
DEEPEST = 16


@dataclass(frozen=True)
class StyleForest:
    """A grown forest.

    styles    : S names
    roots     : int64 [trees], first nodes
    feature   : int32 [K] that a node splits by, -1 at a leaf
    threshold : float32 [K], features above it go right
    left      : int32 [K], the node for the others; the right one is next to it
    share     : float32 [K, S] of the styles at a leaf
    """

    styles: tuple[str, ...]
    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    share: np.ndarray

    def __call__(self, notes: NoteBatch) -> np.ndarray:
        """Probability of every style for every clip, float64 [N, S]; the same for all of a clip without notes."""
        x = pair_counts(masked(notes)).astype(np.float32)
        node = np.repeat(self.roots[None], len(x), 0)
        rows = np.arange(len(x))[:, None]
        for _ in range(DEEPEST):
            feature = self.feature[node]
            right = x[rows, np.maximum(feature, 0)] > self.threshold[node]
            node = np.where(feature >= 0, self.left[node] + right, node)
        found = self.share[node].mean(1, dtype=np.float64)
        found[notes.counts == 0] = 1 / len(self.styles)
        return found

    def save(self, path: Path) -> None:
        """Write it as npz."""
        with atomic_file(path) as part, open(part, "wb") as sink:
            np.savez_compressed(
                sink,
                styles=np.array(self.styles),
                roots=self.roots,
                feature=self.feature,
                threshold=self.threshold,
                left=self.left,
                share=self.share.astype(np.float16),
            )


def load_forest(path: Path) -> StyleForest:
    """A forest that was saved; raises UserError naming the file that is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            a = {name: file[name] for name in file.files}
        forest = StyleForest(
            tuple(map(str, a["styles"])),
            a["roots"].astype(np.int64),
            a["feature"].astype(np.int32),
            a["threshold"].astype(np.float32),
            a["left"].astype(np.int32),
            a["share"].astype(np.float32),
        )
        forest(NoteBatch.empty(1))
    except Exception as error:  # numpy, zipfile and zlib name a damaged byte in a dozen ways
        raise UserError(f"{path} is no forest of styles ({error!r}); fit it again with fastsmart pretrain") from error
    return forest


def grow_forest(notes: NoteBatch, style: Sequence[str], seed: int = 0, trees: int = TREES) -> StyleForest:
    """A forest of clips whose styles are known; styles count the same however many clips each has."""
    styles = tuple(sorted(set(style)))
    y = np.array([styles.index(s) for s in style])
    x = pair_counts(masked(notes)).astype(np.float32)
    cuts = np.quantile(x, np.linspace(0, 1, LEVELS + 2)[1:-1], axis=0).astype(np.float32)  # [levels, F]
    level = (x[:, None] > cuts[None]).sum(1).astype(np.uint8)  # [N, F]: thresholds below each value
    weight = 1 / np.bincount(y)[y] / len(styles)
    nodes: list[tuple[int, float, int, np.ndarray]] = []
    roots = []
    for tree in range(trees):
        random = np.random.default_rng([seed, tree])
        drawn = random.choice(len(y), len(y), p=weight)
        roots.append(len(nodes))
        _grow(nodes, level, y, drawn, cuts, len(styles), random)
    feature, threshold, left, share = zip(*nodes, strict=True)
    return StyleForest(
        styles,
        np.array(roots, np.int64),
        np.array(feature, np.int32),
        np.array(threshold, np.float32),
        np.array(left, np.int32),
        np.array(share, np.float32),
    )


def _grow(
    nodes: list[tuple[int, float, int, np.ndarray]],
    level: np.ndarray,
    y: np.ndarray,
    drawn: np.ndarray,
    cuts: np.ndarray,
    styles: int,
    random: np.random.Generator,
) -> None:
    """Append the nodes of one tree on the clips `drawn`."""
    nodes.append((-1, 0.0, 0, np.bincount(y[drawn], minlength=styles) / len(drawn)))
    waiting = [(len(nodes) - 1, drawn, 0)]
    tried = max(int(level.shape[1] ** 0.5), 1)
    while waiting:
        at, rows, depth = waiting.pop()
        share = nodes[at][3]
        if len(rows) < 2 * FEWEST or depth == DEEPEST - 1 or share.max() == 1.0:
            continue
        features = random.choice(level.shape[1], tried, replace=False)
        feature, cut = _best_split(level[rows][:, features], y[rows], styles)
        if feature < 0:
            continue
        feature = int(features[feature])
        right = level[rows, feature] > cut
        nodes[at] = (feature, float(cuts[cut, feature]), len(nodes), share)
        for side, own in enumerate((rows[~right], rows[right])):
            nodes.append((-1, 0.0, 0, np.bincount(y[own], minlength=styles) / len(own)))
            waiting.append((nodes[at][2] + side, own, depth + 1))


def _best_split(level: np.ndarray, y: np.ndarray, styles: int) -> tuple[int, int]:
    """Column and threshold of least Gini impurity, (-1, 0) where none leaves `FEWEST` clips on both sides."""
    columns = level.shape[1]
    bins = (np.arange(columns) * (LEVELS + 1) + level) * styles + y[:, None]
    table = np.bincount(bins.ravel(), minlength=columns * (LEVELS + 1) * styles)
    table = table.reshape(columns, LEVELS + 1, styles).cumsum(1)
    below, above = table[:, :-1], table[:, -1:] - table[:, :-1]
    n, m = below.sum(2), above.sum(2)
    purity = (below**2).sum(2) / np.maximum(n, 1) + (above**2).sum(2) / np.maximum(m, 1)
    purity = np.where((n >= FEWEST) & (m >= FEWEST), purity, -1.0)
    best = int(purity.argmax())
    if purity.flat[best] < 0:
        return -1, 0
    return best // LEVELS, best % LEVELS
