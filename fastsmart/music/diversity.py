"""How different a policy's outputs are from each other and from what it was trained on.

All metrics are bounded (0..1 unless said), and all but self-BLEU are larger for more diversity.

AT EQUAL SIZE (`rarefied_...`): the metrics to conclude from. Short clips differ by the accident of having few notes, so
a policy that plays less would look more diverse. Each output is therefore seen through excerpts of 32 consecutive notes
(128 consecutive tokens where tokens are compared), four at random places; see `fastsmart.music.rarefaction`. An output
with fewer is compared with nothing and left out; the shares "outputs of fewer than 32 notes" and "... 128 tokens" say
how many these are. Where fewer than two are left, the value is that of outputs that are all equal: nothing was seen to
differ. NaN stands only where a question has no answer: distances "within" without two outputs of one prompt, or
"across" without two prompts; and metrics that need what was not given (training pieces, rewards, a base policy).

* `rarefied_NAME_distance_within`, `..._across`: total variation distance (0..1) between the histograms of two outputs,
  the mean over pairs of outputs of the same prompt, and of different prompts. Pairwise distances within a set as in
  Yang and Lerch (2020), "On the evaluation of generative models in music", Neural Computing and Applications 32. NAME
  is `pitch_class` (twelve), `onset` (the sixteenths of the bar on which notes begin), `move` (interval and step in
  sixteenths from note to note), `register` (six semitones each), `dynamics` (sixteen velocities each) and
  `aligned_pitch_class`: pitch classes counted from the tonic that fits best, hence what is left when transposing does
  not count as diversity.
* `rarefied_effective_outputs`: the effective number of distinct outputs, 1 (all equal) to N (nothing in common), by the
  Vendi score (Friedman and Dieng 2023, TMLR): the exponential of the entropy of the eigenvalues of the similarity
  matrix. The similarity of two excerpts is 1 - the mean of their pitch-class, onset and move distances: histogram
  intersection, which is positive semidefinite (Barla et al. 2003).
* `rarefied_effective_outputs_order_2`: the same of order 2, 1 / mean squared similarity. From a thousand outputs it can
  be told what it would be for endlessly many, which the Vendi score, growing with N, cannot (Ospanov and Farnia 2025,
  arXiv 2410.21719).
* `rarefied_effective_good_outputs`: `rarefied_effective_outputs` among the outputs with at least the median reward of
  the first policy, on the first soundfont; 0 when there is none (after Shypula et al. 2025, arXiv 2504.12522). It grows
  with the number of such outputs: read it beside the number over all, never instead.
* `rarefied_effective_embeddings`, `..._order_2`: the two effective numbers on features that nothing trains on: hidden
  states of the first policy, whose weights stay as they are; see `fastsmart.study.embedding`.
* `rarefied_self_bleu`: BLEU-4 of each output's excerpt against those of all other outputs (Zhu et al. 2018, "Texygen"),
  0..1. Larger means less diversity.
* `rarefied_own_ngrams`: share of an output's token 4-grams that no other output has, 0..1.
* `rarefied_new_ngrams`: share of an output's token 4-grams that the training pieces lack, 0..1 (novelty as in McCoy et
  al. 2023, "How much do language models copy from their training data?", TACL 11).
* `rarefied_training_distance`: 1 - the largest share of an output's four-note figures found together in a single
  training piece, 0..1; 0 for a passage copied from a piece, in whatever key or tempo.

OF WHOLE OUTPUTS: the same under the names without `rarefied_`, over everything each output holds. These depend on how
much that is and serve to read earlier tables only. An output without notes is equal to another without notes and wholly
different from one with notes. Token metrics follow their definitions to the letter: self-BLEU is 0 for fewer than four
tokens, and outputs without a 4-gram or figure are left out of the other three, which are NaN when none is left.

The last two of each list need the training pieces.

BY AN ENCODER OF MUSIC, of whole outputs with notes, where the weights of M3, CLaMP 2 or CLaMP 3 are given; independent
of a reward that is not of that family:

* `clamp_effective_outputs`: the Vendi score with the cosine of two outputs' vectors as their similarity.
* `frechet_music_distance`: squared Fréchet distance of the outputs' vectors to those of windows of real pieces
  (Retkowski et al. 2024, arXiv 2412.07948), covariances shrunk as in Ledoit and Wolf (2004); from 0 up, and smaller is
  nearer. It depends on how many outputs there are: compare it at equal numbers only.
* `between_style_ratio`: variance of the vectors between the styles that prompts ask for over that within them; 0 where
  styles have blended into one, see `fastsmart.music.covariance.fisher_ratio`.

Shape letters: N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastsmart.music.bootstrap import Draws, jackknife_draws, kept_by_jackknife, mean_draws, pair_draws
from fastsmart.music.histograms import histograms
from fastsmart.music.ngrams import figures, ngrams, self_bleu, share_not_in, share_of_own
from fastsmart.music.rarefied import RAREFIED, SIZES, Sizes, rarefied_diversity
from fastsmart.music.training_set import NGRAM, TrainingSet
from fastsmart.notes import NoteBatch
from fastsmart.tokens.token_batch import TokenBatch

ROLL_TICKS = 12  # of a beat, in average piano rolls
ROLL_BEATS = 16
WHOLE = (
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
DIVERSITY = RAREFIED + WHOLE
# the smaller, the more diverse, or the nearer to real music
LESS_IS_MORE = ("rarefied_self_bleu", "self_bleu", "frechet_music_distance")


def diversity(
    notes: NoteBatch,
    completions: TokenBatch,
    prompt: np.ndarray,
    weights: np.ndarray,
    training: TrainingSet | None = None,
    seed: int = 0,
    *,
    good: np.ndarray | None = None,
    embedded: Sequence[np.ndarray] | None = None,
    sizes: Sizes = SIZES,
) -> dict[str, Draws]:
    """Every metric of `DIVERSITY`, on the outputs and on each resample of them.

    Arguments as of `rarefied_diversity`.
    """
    rarefied = rarefied_diversity(
        notes, completions, prompt, weights, training=training, good=good, embedded=embedded, sizes=sizes
    )
    return rarefied | whole_diversity(notes, completions, prompt, weights, training, seed)


def whole_diversity(
    notes: NoteBatch,
    completions: TokenBatch,
    prompt: np.ndarray,
    weights: np.ndarray,
    training: TrainingSet | None = None,
    seed: int = 0,
) -> dict[str, Draws]:
    """Every metric of `WHOLE`; arguments as of `diversity`."""
    from scipy.spatial.distance import cdist

    same = prompt[:, None] == prompt[None, :]
    np.fill_diagonal(same, False)
    other = prompt[:, None] != prompt[None, :]
    results = {}
    played = histograms(notes)
    distances = {name: cdist(rows := played[name], rows, "cityblock") / 2 for name in ("pitch_class", "onset", "move")}
    for name, distance in distances.items():
        results[f"{name}_distance_within"] = pair_draws(distance, same, weights, prompt)
        results[f"{name}_distance_across"] = pair_draws(distance, other, weights, prompt)
    kernel = 1.0 - np.mean(list(distances.values()), axis=0)
    without = np.array([vendi_score(kernel[np.ix_(kept, kept)]) for kept in kept_by_jackknife(prompt, seed)])
    results["effective_outputs"] = jackknife_draws(vendi_score(kernel), without, seed, len(weights) - 1)
    grams = ngrams(completions, NGRAM)
    results["self_bleu"] = mean_draws(self_bleu(completions), weights)
    results["own_ngrams"] = mean_draws(share_of_own(grams), weights)
    unknown = np.full(len(notes), np.nan)
    results["new_ngrams"] = mean_draws(share_not_in(grams, training.ngrams) if training else unknown, weights)
    results["training_distance"] = mean_draws(training.distance(figures(notes)) if training else unknown, weights)
    return results


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
