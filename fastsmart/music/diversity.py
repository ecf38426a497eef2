"""How different a policy's outputs are from each other and from what it was trained on.

All metrics are bounded (0..1 unless said), and all but self-BLEU are larger for more diversity. An output without
notes counts as an output like any other: equal to another without notes, and wholly different from one with notes.

* `pitch_class_distance`, `onset_distance`, `move_distance`: total variation distance (0..1) between the histograms of
  two outputs, of the twelve pitch classes, of the sixteenths of the bar on which notes begin, and of the moves from
  note to note (interval, and step in sixteenths); mean over pairs of outputs of the same prompt (`_within`) and of
  different prompts (`_across`). Pairwise distances within a set as in Yang and Lerch (2020), "On the evaluation of
  generative models in music", Neural Computing and Applications 32.
* `effective_outputs`: the effective number of distinct outputs, 1 (all equal) to N (nothing in common), by the Vendi
  score (Friedman and Dieng 2023, TMLR): the exponential of the entropy of the eigenvalues of the similarity matrix. The
  similarity of two outputs is 1 - the mean of their three distances: histogram intersection, which is positive
  semidefinite (Barla et al. 2003).
* `self_bleu`: BLEU-4 of each output's tokens against all other outputs (Zhu et al. 2018, "Texygen"), 0..1. Larger
  means less diversity.
* `own_ngrams`: share of an output's token 4-grams that no other output has, 0..1.
* `new_ngrams`: share of an output's token 4-grams that the training pieces lack, 0..1 (novelty as in McCoy et al. 2023,
  "How much do language models copy from their training data?", TACL 11).
* `training_distance`: 1 - the largest share of an output's four-note figures found together in a single training piece,
  0..1; 0 for a passage copied from a piece, in whatever key or tempo.

The last two need the training pieces. Shape letters: N outputs, P training pieces, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastsmart.music.bootstrap import JACKKNIFE_GROUPS, Draws, jackknife_draws, mean_draws, pair_draws
from fastsmart.music.ngrams import (
    Windows,
    figures,
    ngrams,
    self_bleu,
    share_not_in,
    share_of_own,
)
from fastsmart.notes import NoteBatch
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch

if TYPE_CHECKING:
    from scipy import sparse

NGRAM = 4  # tokens, about one note
BAR_SIXTEENTHS = 32  # bins of the onset histogram; a longer bar goes on in the last
LONGEST_STEP = 16  # sixteenths, of a move; a longer one counts as this
WIDEST = 24  # semitones, of a move; a wider one counts as this
ROLL_TICKS = 12  # of a beat, in average piano rolls
ROLL_BEATS = 16
DIVERSITY = (
    "pitch_class_distance_within",
    "pitch_class_distance_across",
    "onset_distance_within",
    "onset_distance_across",
    "move_distance_within",
    "move_distance_across",
    "effective_outputs",
    "self_bleu",
    "own_ngrams",
    "new_ngrams",
    "training_distance",
)
LESS_IS_MORE = ("self_bleu",)  # of DIVERSITY: the smaller, the more diverse


@dataclass(frozen=True)
class TrainingSet:
    """What outputs are compared with to see whether they were copied.

    ngrams  : sorted distinct keys of its token 4-grams, uint64
    figures : sorted distinct keys of its four-note figures, uint64 [F]
    pieces  : which piece has which figure, float32 0/1 [F, P], sparse
    """

    ngrams: np.ndarray
    figures: np.ndarray
    pieces: sparse.csr_matrix

    @staticmethod
    def of(dataset: TokenDataset) -> TrainingSet:
        """The n-grams and figures of an encoded dataset."""
        tokens = TokenBatch(np.asarray(dataset.ids, np.int32), dataset.offsets)
        found = figures(decode(tokens, dataset.vocab))
        keys, row = np.unique(found.key, return_inverse=True)
        from scipy import sparse  # not above: training, which measures distances only, does without

        ones = np.ones(len(row), np.float32)
        pieces = sparse.csr_matrix((ones, (row, found.owner)), shape=(len(keys), len(dataset)))
        pieces.data[:] = 1.0  # how often is of no interest
        return TrainingSet(np.unique(ngrams(tokens, NGRAM).key), keys, pieces)

    def distance(self, windows: Windows) -> np.ndarray:
        """`training_distance` of each output from its figures, float64 [N]; NaN for an output without figures."""
        from scipy import sparse

        at = np.minimum(np.searchsorted(self.figures, windows.key), len(self.figures) - 1)
        known = self.figures[at] == windows.key
        ones = np.ones(known.sum(), np.float32)
        shape = (windows.count, len(self.figures))
        found = sparse.csr_matrix((ones, (windows.owner[known], at[known])), shape=shape) @ self.pieces
        with np.errstate(invalid="ignore"):
            return 1.0 - found.max(axis=1).toarray()[:, 0] / windows.totals


def diversity(
    notes: NoteBatch,
    completions: TokenBatch,
    prompt: np.ndarray,
    weights: np.ndarray,
    training: TrainingSet | None = None,
    seed: int = 0,
) -> dict[str, Draws]:
    """Every metric of `DIVERSITY`, on the outputs and on each resample of them.

    notes, completions : of N outputs; completions without their prompts, which all policies share
    prompt             : int [N], equal for outputs of equal prompts
    weights            : of `resample_weights`
    training           : without it the two metrics that need it are NaN
    """
    same = prompt[:, None] == prompt[None, :]
    np.fill_diagonal(same, False)
    other = prompt[:, None] != prompt[None, :]
    results = {}
    distances = {name: total_variation(rows) for name, rows in histograms(notes).items()}
    for name, distance in distances.items():
        results[f"{name}_distance_within"] = pair_draws(distance, same, weights)
        results[f"{name}_distance_across"] = pair_draws(distance, other, weights)
    kernel = 1.0 - np.mean(list(distances.values()), axis=0)
    without = np.array([vendi_score(kernel[np.ix_(kept, kept)]) for kept in _kept(len(notes), seed)])
    results["effective_outputs"] = jackknife_draws(vendi_score(kernel), without, seed, len(weights) - 1)
    grams = ngrams(completions, NGRAM)
    results["self_bleu"] = mean_draws(self_bleu(completions), weights)
    results["own_ngrams"] = mean_draws(share_of_own(grams), weights)
    unknown = np.full(len(notes), np.nan)
    results["new_ngrams"] = mean_draws(share_not_in(grams, training.ngrams) if training else unknown, weights)
    results["training_distance"] = mean_draws(training.distance(figures(notes)) if training else unknown, weights)
    return results


def spread(played: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The three distances of `histograms` of N clips, each over all pairs; those of a single clip are 0."""
    return {
        f"{name}_distance": float(total_variation(rows).sum() / max(len(rows) * (len(rows) - 1), 1))
        for name, rows in played.items()
    }


def histograms(notes: NoteBatch) -> dict[str, np.ndarray]:
    """What the distances are between: `pitch_class`, `onset` and `move`, float64 [N, bins] each."""
    return {
        "pitch_class": pitch_class_histograms(notes),
        "onset": onset_histograms(notes),
        "move": move_histograms(notes),
    }


def pitch_class_histograms(notes: NoteBatch) -> np.ndarray:
    """Share of notes on each pitch class, float64 [N, 13]; the last bin is 1 for an output without notes."""
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    return _histograms(clip, notes.pitch.astype(np.int64) % 12, 12, len(notes))


def onset_histograms(notes: NoteBatch) -> np.ndarray:
    """Share of notes that begin on each sixteenth of the bar, float64 [N, 33]; the last bin is 1 without notes.

    The bar is that of the piece's first time signature, 4/4 where it has none.
    """
    bar = np.full(len(notes), 4 * notes.ticks_per_beat)
    has = np.diff(notes.meter_offsets) > 0
    numerator, denominator = notes.meter[notes.meter_offsets[:-1][has]].T
    bar[has] = np.maximum(4 * notes.ticks_per_beat * numerator // denominator, 1)
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    sixteenth = notes.onset_tick % bar[clip] * 4 // notes.ticks_per_beat
    return _histograms(clip, np.minimum(sixteenth, BAR_SIXTEENTHS - 1), BAR_SIXTEENTHS, len(notes))


def move_histograms(notes: NoteBatch) -> np.ndarray:
    """Share of each move from a note to the next, float64 [N, 834]; the last bin is 1 for a clip without a move.

    Notes go from left to right, then from low to high. A move is an interval, two octaves at most, and a step in
    sixteenths, a bar of 4/4 at most: the same in every key and at every tempo.
    """
    clip = np.repeat(np.arange(len(notes)), notes.counts)
    order = np.lexsort((notes.pitch, notes.onset_tick, clip))
    sixteenths = (notes.onset_tick[order].astype(np.int64) * 8 // notes.ticks_per_beat + 1) // 2
    step = np.minimum(np.diff(sixteenths), LONGEST_STEP)
    interval = np.clip(np.diff(notes.pitch[order].astype(np.int64)), -WIDEST, WIDEST)
    inside = np.diff(clip) == 0
    intervals = 2 * WIDEST + 1
    return _histograms(
        clip[1:][inside], (step * intervals + interval + WIDEST)[inside], (LONGEST_STEP + 1) * intervals, len(notes)
    )


def total_variation(rows: np.ndarray) -> np.ndarray:
    """Half the L1 distance of every two rows, float64 [N, N]: the share of notes that would have to move."""
    return np.stack([np.abs(rows - row).sum(axis=1) / 2 for row in rows])


def vendi_score(kernel: np.ndarray) -> float:
    """exp of the Shannon entropy of the eigenvalues of kernel / N (Friedman and Dieng 2023, definition 3.1), 1..N.

    kernel : [N, N], positive semidefinite with ones on the diagonal
    """
    shares = np.linalg.eigvalsh(kernel / len(kernel))
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def average_roll(notes: NoteBatch) -> tuple[np.ndarray, int]:
    """The paper's average piano roll: share of outputs that sound each pitch, float64 [128, 192], and how many outputs.

    The first 16 beats, in twelfths of a beat, of the outputs that last as long; notes are on from onset to end,
    whatever their velocity. A note shorter than a twelfth is on for one.
    """
    per_beat, steps = notes.ticks_per_beat, ROLL_TICKS * ROLL_BEATS
    on = notes.onset_tick.astype(np.int64) * ROLL_TICKS // per_beat
    off = (notes.onset_tick.astype(np.int64) + notes.duration_tick) * ROLL_TICKS // per_beat
    off = np.maximum(off, on + 1)
    roll, outputs = np.zeros((128, steps)), 0
    for i in range(len(notes)):
        rows = notes.rows(i)
        if off[rows].max(initial=0) < steps:
            continue
        one = np.zeros((128, steps), bool)
        for pitch, start, stop in zip(notes.pitch[rows], on[rows], off[rows], strict=True):
            one[pitch, start:stop] = True
        roll += one
        outputs += 1
    return roll / max(outputs, 1), outputs


def prompt_numbers(prompts: TokenBatch) -> np.ndarray:
    """A number for each prompt, int64 [N], equal for equal ones."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in prompts], np.int64)


def _histograms(clip: np.ndarray, value: np.ndarray, bins: int, clips: int) -> np.ndarray:
    """Share of each value in each clip, float64 [clips, bins + 1]; a clip without values has 1 in the last bin."""
    counts = np.bincount(clip * (bins + 1) + value, minlength=clips * (bins + 1)).astype(np.float64)
    table = counts.reshape(clips, bins + 1)
    table[table.sum(axis=1) == 0, bins] = 1.0
    return table / table.sum(axis=1, keepdims=True)


def _kept(n: int, seed: int) -> Iterator[np.ndarray]:
    """For each group of the jackknife, the prompts that are not in it."""
    groups = np.array_split(np.random.default_rng(seed).permutation(n), min(JACKKNIFE_GROUPS, n))
    return (np.setdiff1d(np.arange(n), group) for group in groups if len(group) < n)
