"""Diversity at equal size: every metric on excerpts of 32 notes or 128 tokens, so that playing more or less is no help.

What each metric means, and what is done with outputs that are too short, is said in `fastsmart.music.diversity`.

Shape letters: N outputs, K of them long enough, R excerpts of each, B bins, D numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastsmart.music.bootstrap import Draws, mean_draws, pair_draws
from fastsmart.music.histograms import BINS, aligned_to_tonic, note_bins
from fastsmart.music.ngrams import Windows, figures, ngrams, self_bleu, share_not_in, share_of_own
from fastsmart.music.rarefaction import Excerpts, bin_counts, expected_similarity, intersections
from fastsmart.music.training_set import NGRAM, TrainingSet
from fastsmart.notes import NoteBatch
from fastsmart.tokens.token_batch import TokenBatch

NOTES = 32  # of an excerpt: half a clip of the demo, of whose 1,000 base clips 956 have as many
TOKENS = 4 * NOTES  # of an excerpt of tokens: a note of the demo takes 4.06
FIGURE_NOTES = 4
HISTOGRAMS = ("pitch_class", "aligned_pitch_class", "onset", "move", "register", "dynamics")
COMPARED = ("pitch_class", "onset", "move")  # what the similarity of the effective numbers is the mean of
RAREFIED = (
    *(f"rarefied_{name}_distance_{pairs}" for name in HISTOGRAMS for pairs in ("within", "across")),
    "rarefied_effective_outputs",
    "rarefied_effective_outputs_order_2",
    "rarefied_effective_good_outputs",
    "rarefied_effective_embeddings",
    "rarefied_effective_embeddings_order_2",
    "rarefied_self_bleu",
    "rarefied_own_ngrams",
    "rarefied_new_ngrams",
    "rarefied_training_distance",
)


@dataclass(frozen=True)
class Sizes:
    """Size of the excerpts that are compared: notes and tokens of an excerpt, and the seed of where excerpts start."""

    notes: int = NOTES
    tokens: int = TOKENS
    seed: int = 0

    def note_excerpts(self, notes: NoteBatch) -> Excerpts:
        """Excerpts of the outputs with enough notes."""
        return Excerpts.draw(notes.counts, self.notes, seed=self.seed)

    def token_excerpts(self, completions: TokenBatch) -> Excerpts:
        """Excerpts of the outputs with enough tokens."""
        return Excerpts.draw(completions.lengths, self.tokens, seed=self.seed)


SIZES = Sizes()


def rarefied_diversity(
    notes: NoteBatch,
    completions: TokenBatch,
    prompt: np.ndarray,
    weights: np.ndarray,
    *,
    training: TrainingSet | None = None,
    good: np.ndarray | None = None,
    embedded: Sequence[np.ndarray] | None = None,
    sizes: Sizes = SIZES,
) -> dict[str, Draws]:
    """Every metric of `RAREFIED`, on the outputs and on each resample of them.

    notes, completions : of N outputs; completions without their prompts, which all policies share
    prompt             : int [N], equal for outputs of equal prompts
    weights            : of `resample_weights`
    training           : without it the two metrics that need it are NaN
    good               : bool [N], which outputs are worth having; without it the metric that needs it is NaN
    embedded           : similarities float32 [K, K] of the token excerpts' embeddings, one matrix for each of the R
                         (see `fastsmart.study.embedding`); without them the two metrics that need them are NaN
    """
    excerpts = sizes.note_excerpts(notes)
    counts = _counts(notes, excerpts)
    results = _distances(counts, excerpts, prompt, weights)
    similar = _similarities(counts, excerpts)
    results["rarefied_effective_outputs"] = effective_number(similar, excerpts.known, weights)
    results["rarefied_effective_outputs_order_2"] = effective_number_2(similar, excerpts, weights, prompt)
    unknown = Draws(float("nan"), np.full(len(weights) - 1, np.nan))
    chosen = excerpts.known if good is None else excerpts.known & good
    among = np.ix_(chosen[excerpts.of], chosen[excerpts.of])
    results["rarefied_effective_good_outputs"] = (
        unknown if good is None else effective_number([k[among] for k in similar], chosen, weights, of_none=0.0)
    )
    heard = sizes.token_excerpts(completions)
    number = number_2 = unknown
    if embedded is not None:
        number = effective_number(embedded, heard.known, weights)
        number_2 = effective_number_2(embedded, heard, weights, prompt)
    results["rarefied_effective_embeddings"] = number
    results["rarefied_effective_embeddings_order_2"] = number_2
    return results | _texts(notes, completions, excerpts, heard, weights, training)


def effective_number(
    similar: Sequence[np.ndarray], compared: np.ndarray, weights: np.ndarray, of_none: float = 1.0
) -> Draws:
    """The Vendi score of outputs seen through excerpts: the geometric mean over the R excerpts, 1..K.

    similar  : [K, K] for each of the R excerpts
    compared : bool [N], which outputs the K are
    of_none  : the value where K is 0

    Draws are resampled means of the influences of `vendi_influence`, whose mean the logarithm of the score is. The
    score of resampled outputs itself would be lower than that of new ones, for an output drawn twice is nothing new.
    """
    if not compared.any():
        return Draws(of_none, np.full(len(weights) - 1, of_none))
    influence = np.full(len(compared), np.nan)
    influence[compared] = np.mean([vendi_influence(kernel) for kernel in similar], axis=0)
    mean = mean_draws(influence, weights)
    return Draws(float(np.exp(mean.value)), np.exp(mean.draws))


def vendi_influence(kernel: np.ndarray) -> np.ndarray:
    """Contribution of each output to the logarithm of the Vendi score, float64 [K]; their mean is that logarithm.

    kernel : [K, K], positive semidefinite with ones on the diagonal

    The first variation of the entropy of the eigenvalues l_m of kernel / K, with eigenvectors V, in the weight of
    output i: -K sum_m l_m V_im² ln l_m.
    """
    size = len(kernel)
    shares, vectors = np.linalg.eigh(np.asarray(kernel, np.float64) / size)
    kept = shares > 0
    return -size * (vectors[:, kept] ** 2 @ (shares[kept] * np.log(shares[kept])))


def effective_number_2(
    similar: Sequence[np.ndarray], excerpts: Excerpts, weights: np.ndarray, opening: np.ndarray | None = None
) -> Draws:
    """The effective number of order 2, 1 / mean k_ij² over all pairs, an output's with itself too, 1..K.

    That is the inverse of the sum of the squared eigenvalues of kernel / K (Jalali et al. 2023, NeurIPS, "RKE").

    similar : [K, K] for each of the R excerpts of the K outputs
    opening : of each output, as the weights were drawn by; None: each output has one of its own
    """
    size = len(excerpts.of)
    if size < 2:
        return Draws(1.0, np.ones(len(weights) - 1))
    squares = np.mean([np.square(kernel, dtype=np.float32) for kernel in similar], axis=0)
    pairs = excerpts.known[:, None] & excerpts.known
    np.fill_diagonal(pairs, False)
    mean = pair_draws(excerpts.per_pair(squares, 0.0), pairs, weights, opening)
    own, others = 1.0 / size, 1.0 - 1.0 / size  # shares of the pairs that are an output's with itself, and of the rest
    return Draws(1.0 / (own + others * mean.value), 1.0 / (own + others * mean.draws))


def excerpt_similarities(notes: NoteBatch, sizes: Sizes = SIZES) -> tuple[Excerpts, list[np.ndarray], np.ndarray]:
    """The excerpts of N outputs, and two similarities of the K outputs that have any.

    The first, [K, K] for each of the R excerpts, is that of the effective numbers; of the second, [K, K], one minus the
    mean over pairs is the mean distance of `COMPARED`.
    """
    excerpts = sizes.note_excerpts(notes)
    counts = _counts(notes, excerpts)
    expected = np.stack([expected_similarity(counts[name]) for name in COMPARED]).mean(axis=0)
    return excerpts, _similarities(counts, excerpts), expected


def _similarities(counts: dict[str, np.ndarray], excerpts: Excerpts) -> list[np.ndarray]:
    """Mean intersection of the histograms of `COMPARED`, [K, K] for each of the R excerpts."""
    return [
        np.mean([intersections(counts[name][:, r]) for name in COMPARED], axis=0)
        for r in range(excerpts.start.shape[1])
    ]


def _counts(notes: NoteBatch, excerpts: Excerpts) -> dict[str, np.ndarray]:
    """Counts [K, R, B] by name of `HISTOGRAMS`; an excerpt has one move less than notes."""
    bins = note_bins(notes)
    counts = {}
    for name in BINS:
        rows = excerpts.rows(notes.offsets, excerpts.size - (name == "move"))
        counts[name] = bin_counts(bins[name][rows], BINS[name])
    counts["aligned_pitch_class"] = aligned_to_tonic(counts["pitch_class"])
    return counts


def _distances(
    counts: dict[str, np.ndarray], excerpts: Excerpts, prompt: np.ndarray, weights: np.ndarray
) -> dict[str, Draws]:
    same = prompt[:, None] == prompt
    np.fill_diagonal(same, False)
    pairs = {"within": same, "across": prompt[:, None] != prompt}
    known = excerpts.known[:, None] & excerpts.known
    results = {}
    for name in HISTOGRAMS:
        distance = excerpts.per_pair(1.0 - expected_similarity(counts[name]), 0.0)
        for kind, chosen in pairs.items():
            both = chosen & known
            seen = pair_draws(distance, both, weights, prompt)
            if chosen.any() and not both.any():  # outputs too short to tell apart count as equal
                seen = Draws(0.0, np.zeros(len(weights) - 1))
            results[f"rarefied_{name}_distance_{kind}"] = seen
    return results


def _texts(
    notes: NoteBatch,
    completions: TokenBatch,
    excerpts: Excerpts,
    heard: Excerpts,
    weights: np.ndarray,
    training: TrainingSet | None,
) -> dict[str, Draws]:
    """The metrics of tokens and of figures, each a mean over excerpts and outputs."""
    replicates = range(heard.start.shape[1])
    ids = completions.ids[heard.rows(completions.offsets)]
    grams = [_windows(ngrams(completions, NGRAM), heard, r) for r in replicates]
    found = {
        "self_bleu": (heard, [self_bleu(TokenBatch.pack(ids[:, r])) for r in replicates], 1.0),
        "own_ngrams": (heard, [share_of_own(windows) for windows in grams], 0.0),
    }
    unknown = Draws(float("nan"), np.full(len(weights) - 1, np.nan))
    results = {}
    if training is not None:
        played = figures(notes)
        cut = [_windows(played, excerpts, r) for r in replicates]
        found["new_ngrams"] = (heard, [share_not_in(windows, training.ngrams) for windows in grams], 0.0)
        found["training_distance"] = (excerpts, [training.distance(windows) for windows in cut], 0.0)
    for name in ("self_bleu", "own_ngrams", "new_ngrams", "training_distance"):
        if name not in found:
            results[f"rarefied_{name}"] = unknown
            continue
        where, values, of_none = found[name]
        against_others = name in ("self_bleu", "own_ngrams")
        if len(where.of) < (2 if against_others else 1):
            results[f"rarefied_{name}"] = Draws(of_none, np.full(len(weights) - 1, of_none))
        else:
            results[f"rarefied_{name}"] = mean_draws(where.per_sequence(np.stack(values, axis=1)), weights)
    return results


def _windows(windows: Windows, excerpts: Excerpts, replicate: int) -> Windows:
    """The windows inside one excerpt of each of the K sequences, of windows of all N."""
    offsets = np.concatenate([[0], np.cumsum(windows.totals)])
    items = excerpts.size - (FIGURE_NOTES - 1)
    rows = excerpts.rows(offsets, items)[:, replicate]
    return Windows(windows.key[rows].ravel(), np.repeat(np.arange(len(rows)), items), len(rows))
