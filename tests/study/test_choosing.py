"""What choosing alone can do: equal weights are the outputs themselves, and no weights beat the frontier's."""

from __future__ import annotations

import numpy as np
import pytest
from made_notes import made

from fastsmart.music.bootstrap import resample_weights
from fastsmart.music.rarefied import COMPARED, Sizes, excerpt_similarities, rarefied_diversity
from fastsmart.music.reweighting import capped_best
from fastsmart.reward import Scores
from fastsmart.study import choosing
from fastsmart.study.choosing import CAP, MEAN_DISTANCE, POINTS, reweighting, weighted_value
from fastsmart.study.outputs import Outputs
from fastsmart.tokens.token_batch import TokenBatch

SIZES = Sizes(notes=8, tokens=24)
N = 80
OPENING = np.arange(N) // 2


def some_outputs(seed: int = 0):
    """Outputs of two an opening in several keys, the last too short to compare; rewards that favour the first keys."""
    random = np.random.default_rng(seed)
    key = random.integers(6, size=N)
    clips = []
    for i in range(N):
        notes = 20 if i < N - 1 else 3
        onset = np.cumsum(random.choice([3, 6], notes))
        pitch = 48 + 5 * key[i] + random.choice([0, 2, 4, 5, 7], notes)
        clips.append([(int(a), 2, int(p)) for a, p in zip(onset, pitch, strict=True)])
    reward = (5 - 0.3 * key + random.normal(0, 0.5, N)).astype(np.float32)
    prompts = TokenBatch.pack([[int(o)] for o in OPENING])
    completions = TokenBatch.pack([list(range(60))] * N)
    return Outputs(prompts, completions, {"notes": Scores({"r": reward}, reward)}), made(clips), reward


def test_equal_weights_are_the_outputs_themselves():
    outputs, notes, _ = some_outputs()
    measured = rarefied_diversity(notes, outputs.completions, OPENING, resample_weights(OPENING, 0, 10), sizes=SIZES)
    excerpts, similar, expected = excerpt_similarities(notes, SIZES)
    assert len(excerpts.of) == N - 1
    equal = np.full(N - 1, 1 / (N - 1))
    number = weighted_value(choosing._mean_square(similar), equal)
    assert number == pytest.approx(measured["rarefied_effective_outputs_order_2"].value, rel=1e-5)
    opening = OPENING[excerpts.of]
    distance = weighted_value(expected, equal, opening[:, None] != opening)
    means = [measured[f"rarefied_{name}_distance_across"].value for name in COMPARED]
    assert distance == pytest.approx(np.mean(means), rel=1e-5)


def test_no_other_weights_are_more_diverse_at_their_reward():
    outputs, notes, reward = some_outputs()
    found = reweighting(outputs, notes, sizes=SIZES)
    assert set(found) == {"rarefied_effective_outputs_order_2", MEAN_DISTANCE}
    _, similar, expected = excerpt_similarities(notes, SIZES)
    reward = reward[: N - 1].astype(np.float64)
    spread = reward.std()
    for measure, kernel in ((MEAN_DISTANCE, expected), (next(iter(found)), choosing._mean_square(similar))):
        points = found[measure]
        assert len(points) == POINTS
        assert points[0]["wanted"] == pytest.approx(reward.mean())
        assert points[-1]["reward"] == pytest.approx(capped_best(reward, CAP) @ reward)
        rewards, values = [p["reward"] for p in points], [p["value"] for p in points]
        assert (np.diff(rewards) > -1e-2 * spread).all()
        assert (np.diff(values) < 1e-2 * values[0]).all()  # more reward is paid for
        for point in points:
            assert point["reward"] >= point["wanted"] - 1e-3 * spread
            assert point["outputs"] >= (N - 1) / CAP - 1e-6
        apart = OPENING[: N - 1, None] != OPENING[: N - 1] if measure == MEAN_DISTANCE else None
        for temperature in (0.2, 0.5, 1.0):  # soft best of n
            weights = np.exp(reward / temperature / spread)
            weights /= weights.sum()
            if weights.max() > CAP / (N - 1):
                continue
            enough = [p["value"] for p in points if p["reward"] >= weights @ reward]
            assert max(enough) > 0.97 * weighted_value(kernel, weights, apart)


def test_an_output_without_a_reward_is_not_chosen_and_of_few_outputs_nothing_is_said():
    outputs, notes, reward = some_outputs()
    reward[:20] = np.nan
    assert reweighting(outputs, notes, sizes=SIZES) == {}
    reward[:20] = -100.0
    with_bad = reweighting(outputs, notes, sizes=SIZES)[MEAN_DISTANCE]
    assert with_bad[-1]["reward"] > 4
