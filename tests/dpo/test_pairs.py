"""Which completions are chosen and rejected, and in which order their pairs come."""

import numpy as np
import pytest

from fastsmart.dpo.pairs import choose, pairs_of_step, repeated

NONE = np.zeros(10, bool)
TEN = np.array([3.0, 9.0, 1.0, 7.0, 5.0, 0.0, 8.0, 2.0, 6.0, 4.0])


def chosen_and_rejected(reward, keep, refused=NONE, pool=None):
    pool = np.zeros(len(reward), int) if pool is None else pool
    chosen, rejected = choose(np.asarray(reward), pool, refused, keep)
    return set(zip(chosen.tolist(), rejected.tolist(), strict=True))


def test_every_one_of_the_best_is_paired_with_every_one_of_the_worst():
    assert chosen_and_rejected(TEN, 0.2) == {(1, 5), (1, 2), (6, 5), (6, 2)}
    assert chosen_and_rejected(TEN, 0.01) == {(1, 5)}  # at least one of each
    assert len(chosen_and_rejected(TEN, 0.5)) == 25


def test_what_is_refused_is_passed_over_down_to_the_middle_and_may_be_rejected():
    refused = np.isin(np.arange(10), [1, 6, 5])
    assert chosen_and_rejected(TEN, 0.2, refused) == {(3, 5), (3, 2), (8, 5), (8, 2)}
    assert chosen_and_rejected(TEN, 0.2, TEN >= 5) == set()  # nothing of the lower half is ever chosen


def test_completions_are_compared_within_their_pool_alone():
    pool = np.arange(10) % 2
    assert chosen_and_rejected(TEN, 0.2, pool=pool) == {(6, 2), (1, 5)}


def test_what_could_not_be_scored_is_in_no_pair():
    reward = np.where(np.isin(np.arange(10), [1, 5]), np.nan, TEN)
    assert chosen_and_rejected(reward, 0.1) == {(6, 2)}
    assert chosen_and_rejected(np.full(10, np.nan), 0.5) == set()


def test_equal_rewards_make_no_pair():
    assert chosen_and_rejected(np.ones(10), 0.5) == set()
    assert chosen_and_rejected([1.0, 1.0, 0.0], 0.5, NONE[:3]) == {(0, 2)}
    assert chosen_and_rejected([1.0], 0.5, NONE[:1]) == set()


def test_all_pairs_come_before_one_comes_again():
    orders = [pairs_of_step(10, 4, step, (7, 5, 0)) for step in range(5)]
    first, second = np.split(np.concatenate(orders), 2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert pairs_of_step(10, 4, 2, (7, 5, 0)).tolist() == orders[2].tolist()
    assert pairs_of_step(10, 4, 2, (7, 5, 1)).tolist() != orders[2].tolist()
    assert len(pairs_of_step(0, 4, 0, (7,))) == 0
    assert np.bincount(pairs_of_step(3, 8, 0, (7,)), minlength=3).tolist() == pytest.approx([8 / 3] * 3, abs=1)


def test_a_completion_counts_as_repeated_from_the_second_time_in_its_pool():
    pieces = [np.array(ids, np.int32) for ids in ([1, 2], [1, 2], [1, 2, 3], [1, 2])]
    assert repeated(pieces, np.zeros(4, int)).tolist() == [False, True, False, True]
    assert repeated(pieces, np.array([0, 1, 0, 0])).tolist() == [False, False, False, True]
