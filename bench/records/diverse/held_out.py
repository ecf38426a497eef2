"""Judge outputs by what no run was trained on: python held_out.py POP909_FOLDER EVALUATION ... --out JSON

Two rewards of clips, both of the 45 validation pieces that pop909-tiny, and the statistics `typicality` is trained
with, have never seen, cut into windows of ten seconds:

* typicality: log-likelihood of a clip's features, nats a feature, under the distribution fitted to those pieces;
* likeness: how well a logistic regression on the five histograms of a clip takes outputs for real pieces. It is told
  by the area under its curve, over outputs and windows it was not fitted to: .5 where it cannot tell them apart, 1
  where it always can. Folds share no opening and no piece. Also on each histogram alone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.stats import rankdata

from fastsmart.music.bootstrap import mean_draws, resample_weights
from fastsmart.music.diversity import prompt_numbers
from fastsmart.music.histograms import histograms
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.policy.pretrain import split_pieces
from fastsmart.reward.registry import STATISTICS_FILE
from fastsmart.reward.typicality import TypicalityStats, fit_typicality, log_likelihood
from fastsmart.study.evaluation import Evaluation
from fastsmart.tokens.dataset import encode_midi
from fastsmart.tokens.decode import decode
from fastsmart.tokens.vocabulary import Vocabulary, load_vocabulary

SHIPPED = Path("fastsmart/policy/shipped/pop909-tiny")
VALID_SHARE, SPLIT_SEED = 0.05, 0  # as pop909-tiny was made
FOLDS, RIDGE = 10, 30.0
LABELS = ("base", "best of 2", "best of 4", "best of 8", "best of 16", "candidate", "unconstrained")


def held_out_pieces(folder: Path, vocab: Vocabulary) -> NoteBatch:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.mid"))
    train, valid = split_pieces(len(files), VALID_SHARE, SPLIT_SEED)
    shipped = TypicalityStats.load(SHIPPED / STATISTICS_FILE)
    assert shipped.pieces == len(train), "not the split that the shipped statistics are of"
    again = fit_typicality(decode([encode_midi(folder / files[p], vocab) for p in train], vocab), "")
    print("the shipped statistics differ from those of this split by", np.abs(again.location - shipped.location).max())
    return decode([encode_midi(folder / files[p], vocab) for p in valid], vocab)


def predicted(x: np.ndarray, real: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Log-odds of being real, by a logistic regression on the other folds, classes weighed alike."""
    found = np.zeros(len(x))
    for k in range(FOLDS):
        fitted = fold != k
        centre, scale = x[fitted].mean(axis=0), x[fitted].std(axis=0) + 1e-3
        z = (x - centre) / scale
        w = logistic_regression(z[fitted], real[fitted])
        found[~fitted] = z[~fitted] @ w[1:] + w[0]
    return found


def logistic_regression(z: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Constant and weights."""
    y = np.where(real, 1.0, -1.0)
    weight = np.where(real, 0.5 / real.sum(), 0.5 / (~real).sum()) * len(real)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = y * (z @ w[1:] + w[0])
        slope = -y * weight / (1 + np.exp(margin))
        value = float((weight * np.logaddexp(0, -margin)).sum() + RIDGE / 2 * (w[1:] ** 2).sum())
        return value, np.concatenate([[slope.sum()], z.T @ slope + RIDGE * w[1:]])

    return minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B").x


def area(score: np.ndarray, real: np.ndarray) -> float:
    rank = rankdata(score)
    return float((rank[real].sum() - real.sum() * (real.sum() + 1) / 2) / (real.sum() * (~real).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("evaluation", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pieces = held_out_pieces(options.pieces, load_vocabulary(SHIPPED))
    stats, windows = fit_typicality(pieces, "POP909, validation split"), cut_windows(pieces)
    of = np.concatenate([np.full(len(cut_windows(pieces.select([p]))), p) for p in range(len(pieces))])
    print(f"{len(pieces)} pieces, {len(windows)} windows; their typicality {log_likelihood(windows, stats).mean():.3f}")
    seeds = {}
    for folder in options.evaluation:
        evaluation = Evaluation.open(folder)
        table = {}
        for label in (name for name in LABELS if name in evaluation.labels):
            outputs = evaluation.outputs(label)
            notes = outputs.notes(evaluation.vocab, evaluation.config.audio.max_seconds)
            opening = prompt_numbers(outputs.prompts)
            likelihood = mean_draws(log_likelihood(notes, stats), resample_weights(opening, 0)).estimate()
            played, heard = histograms(notes), histograms(windows)
            parts = {name: np.concatenate([played[name], heard[name]]) for name in heard}
            parts["all"] = np.concatenate(list(parts.values()), axis=1)
            real = np.arange(len(notes) + len(windows)) >= len(notes)
            fold = np.concatenate([opening % FOLDS, of % FOLDS])
            told_apart = {name: area(predicted(x, real, fold), real) for name, x in parts.items()}
            table[label] = {"typicality": asdict(likelihood), "told_apart": told_apart}
            print(folder.name, label, table[label], flush=True)
        seeds[evaluation.config.train.seed] = table
    options.out.write_text(json.dumps(seeds, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
