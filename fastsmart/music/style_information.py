"""How much of the style that was asked for is heard: confusion, recall, and mutual information in bits.

Shape letters: N clips, S styles, U units (works or openings, whose clips are alike and are drawn together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastsmart.music.bootstrap import RESAMPLES, Draws

SEED = 0


@dataclass(frozen=True)
class HeardStyles:
    """Clips of known style as a judge hears them.

    styles      : S names
    confusion   : float64 [S, S], share of the clips asked for in style i that are heard as style j; a row sums to 1
    recall      : of each style its share heard as itself
    balanced    : the mean of these
    information : bits between the style asked for and the style heard, each style asked for equally often; corrected
                  for the bias of few units by their jackknife (Efron and Tibshirani 1993, section 10.5)
    clips, units : N and U

    Numbers have their resamples, which are the same units for everything that was made with one seed.
    """

    styles: tuple[str, ...]
    confusion: np.ndarray
    recall: dict[str, Draws]
    balanced: Draws
    information: Draws
    clips: int
    units: int


def heard_styles(
    styles: Sequence[str], asked: Sequence[str], heard: Sequence[str], unit: Sequence, seed: int = SEED
) -> HeardStyles:
    """Confusion of clips asked for in one style and heard as another, with bootstrap intervals over units.

    unit : of each clip; a unit's clips may be of several styles, as an opening's are

    Units are drawn within each set of styles that they have clips of, so that no style is left without. Raises
    ValueError when a style was never asked for.
    """
    number = {style: s for s, style in enumerate(styles)}
    if missing := [style for style in styles if style not in set(asked)]:
        raise ValueError(f"no clip was asked for in {', '.join(missing)}")
    units = np.unique([str(u) for u in unit], return_inverse=True)[1]
    tables = np.zeros((int(units.max()) + 1, len(styles), len(styles)))
    rows, columns = (np.array([number[style] for style in of]) for of in (asked, heard))
    np.add.at(tables, (units, rows, columns), 1.0)
    weights = _draws(tables, seed)
    totals = np.einsum("bu,uij->bij", weights, tables)
    whole, drawn = totals[0], totals[1:]
    recalls = _rows(drawn)[:, np.arange(len(styles)), np.arange(len(styles))]
    own = np.diag(_rows(whole[None])[0])
    return HeardStyles(
        tuple(styles),
        _rows(whole[None])[0],
        {style: Draws(float(own[s]), recalls[:, s]) for style, s in number.items()},
        Draws(float(own.mean()), recalls.mean(1)),
        _information(tables, whole, drawn),
        len(units),
        len(tables),
    )


def bits(table: np.ndarray) -> np.ndarray:
    """Mutual information in bits of confusions [..., S, S], each style asked for equally often; not corrected."""
    joint = _rows(table) / table.shape[-1]
    marginal = joint.sum(-2, keepdims=True) / table.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log2(joint / marginal), 0.0)
    return terms.sum((-2, -1))


def _information(tables: np.ndarray, whole: np.ndarray, drawn: np.ndarray) -> Draws:
    """Bits less their bias, with the spread that resampled bits have around their mean."""
    plain, n = float(bits(whole)), len(tables)
    without = bits(whole - tables)
    bias = (n - 1) * (float(without.mean()) - plain)
    value = max(plain - bias, 0.0)
    resampled = bits(drawn)
    return Draws(value, np.maximum(value + resampled - resampled.mean(), 0.0))


def _draws(tables: np.ndarray, seed: int) -> np.ndarray:
    """Count of each unit in each resample, float64 [B + 1, U]; row 0 is one of each."""
    random = np.random.default_rng(seed)
    kinds = np.unique(tables.sum(2) > 0, axis=0, return_inverse=True)[1].ravel()
    weights = np.ones((RESAMPLES + 1, len(tables)))
    for kind in range(int(kinds.max()) + 1):
        own = np.flatnonzero(kinds == kind)
        weights[1:, own] = random.multinomial(len(own), np.full(len(own), 1 / len(own)), RESAMPLES)
    return weights


def _rows(table: np.ndarray) -> np.ndarray:
    """Rows as shares; an empty row stays empty."""
    return table / np.maximum(table.sum(-1, keepdims=True), 1e-12)
