"""Clips as vectors of an encoder: their covariance, the distance of two sets, how far styles are apart.

Shape letters: N clips, D numbers of a vector, S styles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """Normal distribution of a set of vectors.

    mean       : float64 [D]
    covariance : float64 [D, D], symmetric, positive semidefinite
    """

    mean: np.ndarray
    covariance: np.ndarray

    @staticmethod
    def fit(vectors: np.ndarray) -> Gaussian:
        """Mean and covariance of vectors [N, D], shrunk as far as Ledoit and Wolf (2004) find best; N at least 1."""
        x = np.asarray(vectors, np.float64)
        mean = x.mean(axis=0)
        y = x - mean
        covariance = y.T @ y / len(y)
        by = ledoit_wolf(y, covariance)
        covariance *= 1 - by
        covariance[np.diag_indices_from(covariance)] += by * (y**2).sum() / len(y) / len(mean)
        return Gaussian(mean, covariance)

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance, float64 [D, D]."""
        values, axes = np.linalg.eigh(self.covariance)
        return (axes * np.sqrt(np.maximum(values, 0.0))) @ axes.T


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance (Dowson and Landau 1982): |mean a - mean b|² + tr(A + B - 2 (A^½ B A^½)^½).

    The trace of (A B)^½, as it is usually written, is that of the symmetric root taken here, which needs no complex
    numbers and exists for singular covariances.
    """
    between = a.root @ b.covariance @ a.root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((between + between.T) / 2), 0.0)).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return float(((a.mean - b.mean) ** 2).sum() + spread)


def fisher_ratio(vectors: np.ndarray, style: np.ndarray) -> float:
    """Variance between styles over variance within them; 0 where styles cannot be told apart, NaN below two styles.

    Both are the components of variance of a one-way layout (Searle et al. 1992, section 3.6), summed over the D
    numbers: what the means of styles differ by chance, the more the fewer clips there are, is taken off, so that the
    ratio does not depend on how many there are. It can come out a little below 0.

    vectors : [N, D]
    style   : [N], equal for clips of one style
    """
    number = np.unique(style, return_inverse=True)[1]
    counts = np.bincount(number).astype(np.float64)
    n, styles = len(number), len(counts)
    if styles < 2 or n <= styles:
        return float("nan")
    x = np.asarray(vectors, np.float64)
    means = np.stack([x[number == s].mean(axis=0) for s in range(styles)])
    within = ((x - means[number]) ** 2).sum() / (n - styles)
    between = (counts[:, None] * (means - x.mean(axis=0)) ** 2).sum() / (styles - 1)
    clips_a_style = (n - (counts**2).sum() / n) / (styles - 1)
    return float((between - within) / clips_a_style / within) if within > 0 else float("nan")


def ledoit_wolf(y: np.ndarray, covariance: np.ndarray) -> float:
    """Ledoit and Wolf's shrinkage intensity, 0..1, for centred data y [N, F] (2004, J. Multivariate Anal. 88).

    covariance : of the data, y^T y / N
    """
    n, f = y.shape
    target = np.trace(covariance) / f
    spread = ((covariance - target * np.eye(f)) ** 2).sum()
    error = (((y**2).T @ y**2) / n - covariance**2).sum() / n
    return float(min(error / spread, 1.0)) if spread > 0 else 1.0
