"""A judge of styles: which of several styles a clip is in, from its notes.

A multinomial logistic regression on `style_counts`, which velocity, tempo, key and played timing do not change, with
probabilities made honest by isotonic regression on other works. Shape letters: N clips, F features, S styles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file, write_atomic
from fastsmart.music.style_counts import SURE_DIGITS, masked, style_counts
from fastsmart.notes import NoteBatch

JUDGE_FILE = "style-judge.json"  # beside a policy's styles.json
LARGEST_BYTES = 8 * 2**20
PENALTY = 0.02  # of squared weights against the mean loss
LEAST = 1e-4  # probability of a style, so that log-odds stay finite
FOLDS = 5
DIGITS = 5  # of what is written


@dataclass(frozen=True)
class StyleJudge:
    """A fitted judge.

    styles       : S names
    centre, scale: float64 [F] by which features are shifted and divided
    weights, bias: float64 [F, S] and [S] of the logistic regression
    knots        : for each style (probability given, probability found on other works), both rising
    about        : what it was fitted on and how well it found other works, for readers
    """

    styles: tuple[str, ...]
    centre: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    knots: tuple[tuple[np.ndarray, np.ndarray], ...]
    about: dict

    def __call__(self, notes: NoteBatch) -> np.ndarray:
        """Probability of every style for every clip, float64 [N, S]; the same for all of a clip without notes."""
        found = self.of_counts(style_counts(masked(notes)))
        found[notes.counts == 0] = 1 / len(self.styles)
        return found

    def of_counts(self, counts: np.ndarray) -> np.ndarray:
        """`__call__` of what `style_counts` gives, [N, F]."""
        logits = (counts - self.centre) / self.scale @ self.weights + self.bias
        raw = _softmax(logits.round(SURE_DIGITS))
        table = np.stack([np.interp(raw[:, s], *self.knots[s]) for s in range(len(self.styles))], 1)
        table = np.maximum(table, LEAST)
        return table / table.sum(1, keepdims=True)

    def margin(self, notes: NoteBatch, asked: Sequence[str]) -> np.ndarray:
        """Log-odds of the style that each clip was asked for, float64 [N]; NaN where it is none of the judge's."""
        table, number = self(notes), {style: s for s, style in enumerate(self.styles)}
        own = np.array([number.get(style, -1) for style in asked])
        p = table[np.arange(len(table)), own]
        return np.where(own >= 0, np.log(p) - np.log1p(-np.minimum(p, 1 - LEAST)), np.nan)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        tree = {
            "styles": self.styles,
            "about": self.about,
            "centre": _rounded(self.centre),
            "scale": _rounded(self.scale),
            "weights": _rounded(self.weights.T),
            "bias": _rounded(self.bias),
            "knots": [[_rounded(x), _rounded(y)] for x, y in self.knots],
        }
        write_atomic(path, json.dumps(tree) + "\n")


def load_judge(path: Path) -> StyleJudge:
    """A judge that was saved; raises UserError naming the file that is none."""
    try:
        tree = json.loads(read_file(path, LARGEST_BYTES).decode("utf-8"))
        judge = StyleJudge(
            tuple(map(str, tree["styles"])),
            np.array(tree["centre"], np.float64),
            np.array(tree["scale"], np.float64),
            np.array(tree["weights"], np.float64).T,
            np.array(tree["bias"], np.float64),
            tuple((np.array(x, np.float64), np.array(y, np.float64)) for x, y in tree["knots"]),
            dict(tree["about"]),
        )
        shape = (style_counts(NoteBatch.empty(1)).shape[1], len(judge.styles))
        whole = judge.weights.shape == shape and judge.centre.shape == judge.scale.shape == shape[:1]
        whole = whole and judge.bias.shape == shape[1:] and len(judge.knots) == shape[1]
        whole = whole and all(len(x) == len(y) > 0 for x, y in judge.knots)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no judge of styles ({error!r}); fit it again with fastsmart pretrain") from error
    if not whole:
        raise UserError(f"{path} is a judge of other counts than these; fit it again with fastsmart pretrain")
    return judge


def fit_judge(
    train: NoteBatch,
    train_style: Sequence[str],
    other: NoteBatch,
    other_style: Sequence[str],
    about: dict | None = None,
    penalty: float = PENALTY,
) -> StyleJudge:
    """A judge of clips whose styles are known, calibrated on those of `other` works.

    Styles count the same however many clips each has. Raises UserError when there are fewer than two, or `other` lacks
    one.
    """
    styles = tuple(sorted(set(train_style)))
    if len(styles) < 2 or set(other_style) != set(styles):
        raise UserError(
            f"a judge needs clips of at least two styles, and other works of each; it has {', '.join(styles)} and "
            f"{', '.join(sorted(set(other_style)))}"
        )
    y = np.array([styles.index(style) for style in train_style])
    counts = style_counts(masked(train))
    centre, scale = _moments(counts)
    weights, bias = _logistic((counts - centre) / scale, y, len(styles), penalty)
    raw = _softmax((style_counts(masked(other)) - centre) / scale @ weights + bias)
    truth = np.array([styles.index(style) for style in other_style])
    balance = 1 / np.bincount(truth, minlength=len(styles))[truth]
    knots = tuple(isotonic(raw[:, s], truth == s, balance) for s in range(len(styles)))
    return StyleJudge(styles, centre, scale, weights, bias, knots, about or {})


def heard_by_folds(
    notes: NoteBatch, style: Sequence[str], work: Sequence[str], penalty: float = PENALTY, seed: int = 0
) -> list[str]:
    """The style of each clip as the judge of the works of four folds hears those of the fifth, in turn.

    work : of each clip; a fold has about a fifth of the works of every style
    """
    styles = sorted(set(style))
    of, y = np.array(work), np.array([styles.index(s) for s in style])
    counts, fold = style_counts(masked(notes)), np.zeros(len(y), np.int64)
    random = np.random.default_rng(seed)
    for s in range(len(styles)):
        works = random.permutation(np.unique(of[y == s])).tolist()
        for i in np.flatnonzero(y == s):
            fold[i] = works.index(of[i]) % FOLDS
    heard = np.zeros(len(y), np.int64)
    for k in range(FOLDS):
        own, rest = counts[fold == k], counts[fold != k]
        centre, scale = _moments(rest)
        weights, bias = _logistic((rest - centre) / scale, y[fold != k], len(styles), penalty)
        heard[fold == k] = ((own - centre) / scale @ weights + bias).argmax(1)
    return [styles[s] for s in heard]


def _moments(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of features, the latter 1 for one that never changes."""
    scale = counts.std(0)
    return counts.mean(0), np.where(scale > 1e-6, scale, 1.0)


def isotonic(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots of the rising function nearest to y at x by weighted squares, both float64, of few points.

    Between two levels it is linear, so that clips the judge tells apart stay apart.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(x, kind="stable")
    level = isotonic_regression(y[order].astype(np.float64), weights=weight[order]).x
    blocks = np.flatnonzero(np.concatenate([[True], np.diff(level) > 0]))
    sizes = np.diff(np.append(blocks, len(x)))
    middle = np.add.reduceat(x[order], blocks) / sizes
    return np.concatenate([[0.0], middle, [1.0]]), np.concatenate([[0.0], level[blocks], [1.0]])


def _logistic(x: np.ndarray, y: np.ndarray, styles: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [F, S] and bias [S] of least mean loss, each style weighing the same, plus the penalty."""
    from scipy.optimize import minimize

    truth = np.eye(styles)[y]
    weight = (1 / np.bincount(y, minlength=styles) / styles)[y][:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        matrix, bias = flat[:-styles].reshape(-1, styles), flat[-styles:]
        p = _softmax(x @ matrix + bias)
        slope = weight * (p - truth)
        value = -(weight[:, 0] * np.log(p[np.arange(len(y)), y] + 1e-12)).sum() + penalty / 2 * (matrix**2).sum()
        return float(value), np.concatenate([(x.T @ slope + penalty * matrix).ravel(), slope.sum(0)])

    found = minimize(loss, np.zeros((x.shape[1] + 1) * styles), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return found.x[:-styles].reshape(-1, styles), found.x[-styles:]


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _rounded(values: np.ndarray) -> list:
    return values.round(DIGITS).tolist()
