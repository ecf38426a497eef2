"""Pieces that grow part by part, and who is served first."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from tiny_policy import eager_to_end, make_policy

from fastsmart.errors import UserError
from fastsmart.live.player import PART, PARTS, Player
from fastsmart.tokens.prompts import procedural


@pytest.fixture
def prompts(vocab) -> list[np.ndarray]:
    return list(procedural(vocab, 3, 0, ["4/4"]).tokens)


def test_a_piece_grows_and_what_was_told_of_it_stays(policy, prompts):
    told = list(Player(policy).play(prompts, 100, (1,), urgent=True))
    assert len(told[0][0]) - len(prompts[0]) <= PARTS[0]
    for before, after in pairwise(told):
        for i in range(3):
            np.testing.assert_array_equal(after[i][: len(before[i])], before[i])
    assert all(len(piece) - len(prompts[i]) <= 100 for i, piece in enumerate(told[-1]))


def test_the_same_seed_plays_the_same_and_another_does_not(policy, prompts):
    player = Player(policy)
    once, again, other = (list(player.play(prompts, 60, (seed,)))[-1] for seed in (1, 1, 2))
    assert [p.tolist() for p in once] == [p.tolist() for p in again]
    assert [p.tolist() for p in once] != [p.tolist() for p in other]


def test_a_piece_that_has_ended_does_not_grow(vocab, prompts):
    last = list(Player(eager_to_end(vocab)).play(prompts, 400, (1,)))[-1]
    ended = [piece for piece in last if piece[-1] == vocab.eos_id]
    assert ended
    assert all((piece[:-1] != vocab.eos_id).all() for piece in last)


def test_a_prompt_that_leaves_no_room_is_refused(vocab, prompts):
    player = Player(make_policy(vocab, max_positions=64))
    with pytest.raises(UserError, match="the policy holds 64"):
        list(player.play(prompts, 200, (1,)))


def test_newer_weights_play_the_next_piece(vocab, policy, prompts):
    player, newer = Player(policy), make_policy(vocab, seed=5)
    before = list(player.play(prompts, PART, (1,)))[-1]
    player.load(newer, 3)
    assert player.version == 3
    after = list(player.play(prompts, PART, (1,)))[-1]
    fresh = list(Player(newer).play(prompts, PART, (1,)))[-1]
    assert [p.tolist() for p in after] == [p.tolist() for p in fresh]
    assert [p.tolist() for p in after] != [p.tolist() for p in before]


def test_who_waits_for_a_note_goes_before_who_fills_the_shelf(policy, prompts):
    """Two threads fill the shelf; between two parts of the one in a hurry, each of them has one more at most."""
    player, filled, go, stop = Player(policy), [], threading.Event(), threading.Event()

    def fill(seed: int) -> None:
        for _ in player.play(prompts, 40 * PART, (seed,)):
            filled.append(seed)
            go.set()
            if stop.is_set():
                return

    threads = [threading.Thread(target=fill, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    assert go.wait(60)
    before = len(filled)
    told = list(player.play(prompts, sum(PARTS[:2]), (3,), urgent=True))
    between = len(filled) - before
    stop.set()
    for thread in threads:
        thread.join()
    assert len(told) == 2
    assert between <= 2 * (len(told) + 1)
