"""What choosing alone can do: how diverse the first policy's own outputs can be, weighted for a wanted mean reward.

Best of n chooses one output a prompt, by its reward. Here outputs are weighted freely, and of all weights that reach a
mean reward the most diverse are found (`fastsmart.music.reweighting`): without any training, and of the outputs there
are. Nothing that only chooses among them does better, so a policy above these points plays what the first one does not.
The optimum is of these very outputs, which makes it a little better than choosing among new ones would be.

A weighting has a value for a measure that is a mean over pairs of outputs. The Vendi score is none: of few outputs that
weigh much it says how few they are. Shape letters: N outputs, K of them long enough to be compared, R excerpts of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastsmart.machine.text_table import text_table
from fastsmart.music.diversity import prompt_numbers
from fastsmart.music.rarefied import SIZES, Sizes, excerpt_similarities
from fastsmart.music.reweighting import capped_best, most_diverse
from fastsmart.notes import NoteBatch
from fastsmart.study.evaluation import Evaluation, estimate
from fastsmart.study.outputs import Outputs

CAP = 16.0  # an output weighs at most so many times its share, as the best of 16 would
POINTS = 7  # wanted rewards, from the mean of the outputs to the most that the cap allows
FEWEST = 64  # outputs, below which so many times a share is more than a few of them
MEAN_DISTANCE = "rarefied_mean_distance"  # of pitch class, onset and move: 1 - the mean similarity of a pair
CURVE = (
    ("effective outputs", "rarefied_effective_outputs"),
    ("of order 2", "rarefied_effective_outputs_order_2"),
    ("embeddings", "rarefied_effective_embeddings"),
    ("embeddings, order 2", "rarefied_effective_embeddings_order_2"),
)


def reweighting(
    outputs: Outputs, notes: NoteBatch, embedded: Sequence[np.ndarray] | None = None, sizes: Sizes = SIZES
) -> dict[str, list[dict[str, float]]]:
    """Points of the re-weighting frontier by measure, of N outputs with these notes; none of fewer than `FEWEST`.

    embedded : similarities [K, K] of the token excerpts' embeddings, one for each of the R (see `Embedding`)

    A point has the `wanted` mean reward, the `reward` of the weights, the `value` of the measure, and for how many
    equally weighted `outputs` the weights stand. Outputs without a reward, and those too short, are left out.
    """
    reward = next(iter(outputs.scores.values())).total.astype(np.float64)
    opening = prompt_numbers(outputs.prompts)
    excerpts, similar, expected = excerpt_similarities(notes, sizes)
    heard = sizes.token_excerpts(outputs.completions)
    apart = opening[excerpts.of][:, None] != opening[excerpts.of]
    found = {
        "rarefied_effective_outputs_order_2": _sweep(_mean_square(similar), reward[excerpts.of]),
        MEAN_DISTANCE: _sweep(expected, reward[excerpts.of], apart),
    }
    if embedded is not None:
        found["rarefied_effective_embeddings_order_2"] = _sweep(_mean_square(embedded), reward[heard.of])
    return {measure: points for measure, points in found.items() if points}


def _mean_square(similar: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over excerpts of the squared similarity [K, K]: positive semidefinite, as the similarity is (Schur)."""
    return np.mean([np.square(kernel, dtype=np.float64) for kernel in similar], axis=0)


def _sweep(similar: np.ndarray, reward: np.ndarray, apart: np.ndarray | None = None) -> list[dict[str, float]]:
    """The most diverse weights of K outputs at each of `POINTS` mean rewards.

    similar : [K, K], what the weights make small
    apart   : as of `weighted_value`
    """
    kept = np.isfinite(reward)
    similar, reward = similar[np.ix_(kept, kept)], reward[kept]
    apart = None if apart is None else apart[np.ix_(kept, kept)]
    if len(reward) < FEWEST:
        return []
    points = []
    for wanted in np.linspace(reward.mean(), capped_best(reward, CAP) @ reward, POINTS):
        weights = most_diverse(similar, reward, float(wanted), CAP)
        points.append(
            {
                "wanted": float(wanted),
                "reward": float(weights @ reward),
                "value": weighted_value(similar, weights, apart),
                "outputs": float(1 / (weights**2).sum()),
            }
        )
    return points


def weighted_value(similar: np.ndarray, weights: np.ndarray, apart: np.ndarray | None = None) -> float:
    """The diversity of K outputs drawn with these weights, from pairs of different ones.

    similar : [K, K], their similarities, or where `apart` is None these squared
    weights : [K], summing to 1
    apart   : bool [K, K], the pairs whose mean distance is the value; None = all, and the value is the effective number
              of order 2 of K draws, as of `effective_number_2`
    """
    size = len(weights)
    pairs = ~np.eye(size, dtype=bool) if apart is None else apart
    together = np.outer(weights, weights)
    mean = float((similar * together)[pairs].sum() / together[pairs].sum())
    return 1 - mean if apart is not None else 1 / (1 / size + (1 - 1 / size) * mean)


def choosing_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Tables of what an evaluation says about choosing: `caption`, `head` and `rows` of cells; empty where nothing."""
    tables, first = [], evaluation.labels[0]
    if curve := evaluation.record["best_of"]:
        known = [(title, name) for title, name in CURVE if name in curve[0]["diversity"]]
        rows = [
            [f"{p['n']}", f"{p['kl_nats_at_most']:.2f}", _cell(p["reward"])]
            + [_cell(p["diversity"][name]) for _, name in known]
            for p in curve
        ]
        head = ["best of", "KL at most, nats", "reward", *(title for title, _ in known)]
        tables.append({"caption": f"Best of several outputs of {first} for each prompt", "head": head, "rows": rows})
    for measure, points in evaluation.record.get("reweighting", {}).items():
        name = measure.removeprefix("rarefied_").replace("_", " ")
        rows = [[f"{p['reward']:.3f}", f"{p['value']:.3f}", f"{p['outputs']:.0f}"] for p in points]
        caption = f"What choosing alone can do: the most diverse weights of the outputs of {first}, by {name}"
        tables.append({"caption": caption, "head": ["reward", name, "stand for outputs"], "rows": rows})
    return tables


def choosing_text(evaluation: Evaluation) -> str:
    """`choosing_tables` for a terminal."""
    lines = []
    for table in choosing_tables(evaluation):
        lines += ["", table["caption"], text_table([table["head"], *table["rows"]])]
    return "\n".join(lines)


def _cell(tree: Mapping[str, float | None]) -> str:
    e = estimate(tree)
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" if np.isfinite(e.low) else "–"
