"""Excerpts and what they have in common, against every pair of excerpts by SciPy and against Hurlbert's formula."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from fastsmart.music.rarefaction import Excerpts, bin_counts, expected_similarity, intersections

BINS = 7


def counts_of(lengths: list[int], size: int, excerpts: int, seed: int = 0) -> tuple[Excerpts, np.ndarray, np.ndarray]:
    """Excerpts of random sequences, their counts, and their items."""
    random = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths])
    items = random.integers(0, BINS, offsets[-1])
    drawn = Excerpts.draw(np.array(lengths), size, excerpts, seed)
    cut = items[drawn.rows(offsets)]
    return drawn, bin_counts(cut, BINS), cut


def test_excerpts_are_consecutive_inside_their_sequence_and_start_anywhere():
    lengths = np.array([4, 5, 9, 0, 300])
    drawn = Excerpts.draw(lengths, 5, 2000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = drawn.rows(offsets)
    assert drawn.of.tolist() == [1, 2, 4]
    assert drawn.known.tolist() == [False, True, True, False, True]
    assert (np.diff(rows, axis=-1) == 1).all()
    for sequence, places in zip(drawn.of, rows, strict=True):
        assert places.min() >= offsets[sequence]
        assert places.max() < offsets[sequence + 1]
    starts = np.bincount(drawn.start[1], minlength=5)  # 9 - 5 + 1 = 5 places
    assert stats.chisquare(starts).pvalue > 0.001
    assert len(starts) == 5


def test_counts_are_numpys():
    _, counts, cut = counts_of([9, 12, 30], 8, 3)
    for k in range(3):
        for r in range(3):
            assert counts[k, r].tolist() == np.bincount(cut[k, r], minlength=BINS).tolist()


@pytest.mark.parametrize("size", [1, 5, 8])
def test_expected_similarity_is_the_mean_over_every_pair_of_excerpts(size: int):
    _, counts, _ = counts_of([8, 12, 30, 9], size, 6)
    found = expected_similarity(counts)
    for i in range(4):
        for j in range(4):
            distances = cdist(counts[i], counts[j], "cityblock") / (2 * size)
            assert found[i, j] == pytest.approx(1 - distances.mean(), rel=1e-5)


def test_intersections_are_a_kernel():
    _, counts, _ = counts_of([20] * 60, 12, 1)
    kernel = intersections(counts[:, 0])
    np.testing.assert_allclose(kernel, 1 - cdist(counts[:, 0], counts[:, 0], "cityblock") / 24, rtol=1e-5)
    np.testing.assert_allclose(np.diag(kernel), 1)
    assert np.linalg.eigvalsh(kernel.astype(np.float64)).min() > -1e-6


def test_items_in_random_order_are_rarefied_as_hurlbert_says():
    """E[bins seen among k of n] = sum over bins of 1 - C(n - c, k) / C(n, k), the hypergeometric chance of any."""
    random = np.random.default_rng(2)
    held, size = np.array([1, 2, 4, 13, 20]), 8
    shuffled = np.concatenate([random.permutation(np.repeat(np.arange(5), held)) for _ in range(1500)])
    lengths = np.full(1500, held.sum())
    drawn = Excerpts.draw(lengths, size, 1)
    counts = bin_counts(shuffled[drawn.rows(np.concatenate([[0], np.cumsum(lengths)]))], 5)[:, 0]
    richness = (counts > 0).sum(axis=1)
    expected = stats.hypergeom.sf(0, held.sum(), held, size).sum()
    assert abs(richness.mean() - expected) < 4 * richness.std() / np.sqrt(len(richness))
    # and so two such clips have in common what two hypergeometric draws have
    threshold = np.arange(size)[:, None]
    alike = (stats.hypergeom.sf(threshold, held.sum(), held, size) ** 2).sum() / size
    pairs = expected_similarity(counts[:, None])[np.triu_indices(1500, 1)]
    assert pairs.mean() == pytest.approx(alike, abs=0.01)


def test_a_sequence_keeps_its_excerpts_whatever_the_others_are():
    alone, beside = (Excerpts.draw(np.array([40, other]), 8, 4, 3) for other in (2, 90))
    assert alone.start[0].tolist() == beside.start[0].tolist()


def test_nothing_long_enough_is_no_excerpt():
    drawn, counts, _ = counts_of([1, 2], 5, 3)
    assert counts.shape == (0, 3, BINS)
    assert expected_similarity(counts).shape == (0, 0)
    assert np.isnan(drawn.per_sequence(np.zeros((0, 3)))).all()
