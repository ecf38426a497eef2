"""The best checkpoint is the one with most reward of those that keep the floor of diversity."""

from __future__ import annotations

import numpy as np
import pytest
from made_notes import made, melody
from tiny_policy import make_policy

from fastsmart.music.bootstrap import resample_weights
from fastsmart.music.histograms import BINS
from fastsmart.music.rarefied import rarefied_diversity
from fastsmart.policy.checkpoints import Checkpoints, Snapshot, best_of
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.evaluate import held_out_distance

LOG = {10: (6.0, 0.97), 20: (6.5, 0.93), 30: (6.9, 0.85), 40: (7.0, 0.60)}  # reward up, diversity down


@pytest.mark.parametrize(("floor", "best"), [(0.0, 40), (0.6, 40), (0.9, 20), (0.95, 10), (0.99, None)])
def test_the_feasible_one_with_most_reward_is_the_best(floor, best):
    assert best_of(LOG, floor) == best


def test_what_is_not_known_passes_and_what_has_no_reward_does_not():
    assert best_of({1: (5.0, None), 2: (4.0, 1.0)}, 0.9) == 1  # of a run begun without the measure
    assert best_of({1: (float("nan"), 1.0), 2: (4.0, 0.95)}, 0.9) == 2
    assert best_of({1: (5.0, float("nan"))}, 0.9) is None
    assert best_of({}, 0.9) is None


def test_the_link_points_to_it_and_it_stays(vocab, tmp_path):
    policy = make_policy(vocab)
    optimizer = make_optimizer(policy, 1e-3, (0.9, 0.999), 0.0)
    for floor, best in ((0.9, "step-000020"), (0.0, "step-000040")):
        checkpoints = Checkpoints(tmp_path / str(floor), keep=1, floor=floor)
        for step, (reward, kept) in LOG.items():
            record = {"held_out_reward": reward, "held_out_diversity_kept": kept}
            checkpoints.write(Snapshot.of(step, policy, optimizer, record))
        assert (tmp_path / str(floor) / "best").resolve().name == best
        assert checkpoints.best()[0].name == best
        assert {path.name for path in checkpoints.all()} == {best, "step-000040"}


def test_the_distance_is_the_mean_of_the_rarefied_ones_between_prompts_or_within_a_single_one():
    notes, tokens = made([melody(seed, 40) for seed in range(6)]), TokenBatch.pack([[1] * 200] * 6)
    for prompt, pairs in ((np.arange(6) // 2, "across"), (np.zeros(6, int), "within")):
        found = rarefied_diversity(notes, tokens, prompt, resample_weights(6, 0, 5))
        diversity = {name: draws.value for name, draws in found.items() if np.isfinite(draws.value)}
        expected = np.mean([found[f"rarefied_{name}_distance_{pairs}"].value for name in BINS])
        assert held_out_distance(diversity) == pytest.approx(expected)
        assert expected > 0
    assert held_out_distance({"pitch_class_distance": 0.5}) is None
