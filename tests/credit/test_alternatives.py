"""Other tokens a note could have had: which tokens have any, how they are drawn, and what is counted with them."""

import numpy as np
import pytest

from fastsmart.credit.alternatives import KINDS, choices, drawn, token_kinds
from fastsmart.credit.prefixes import note_ends, note_prefixes, swapped
from fastsmart.policy.hf_format import load_policy
from fastsmart.sampling import sample
from fastsmart.tokens.token_batch import TokenBatch

LONGEST, HEARD_S = 60, 10.0


@pytest.fixture(scope="module")
def vocab():
    return load_policy("pop909-tiny").vocab


@pytest.fixture(scope="module")
def rollout():
    return sample(load_policy("pop909-tiny"), TokenBatch.pack([[1], [1]]), group=3, max_tokens=LONGEST, seed=5)


def test_every_token_of_a_whole_note_but_those_of_time_is_a_choice(rollout, vocab):
    found = choices(rollout.ids, rollout.lengths, note_ends(vocab), token_kinds(vocab))
    expected = []
    for n in range(len(rollout)):
        names = [vocab.tokens[token] for token in rollout.ids[n, : rollout.lengths[n]]]
        ends = [i + 1 for i, name in enumerate(names) if name.startswith("Duration_")]
        for place, name in enumerate(names):
            if name.split("_")[0] in KINDS and ends and place < ends[-1]:
                expected.append((n, place, next(end for end in ends if end > place)))
    assert expected
    assert list(zip(found.clip, found.place, found.end, strict=True)) == expected


def test_alternatives_are_of_the_same_kind_and_come_as_often_as_the_policy_draws_them(vocab):
    random = np.random.default_rng(0)
    kinds = token_kinds(vocab)
    token = np.array([vocab.ids_of("Pitch")[3], vocab.ids_of("Velocity")[0]])
    logits = random.normal(size=(2, len(vocab))) * 2
    found = drawn(logits, token, kinds, random.random((2, 40_000)))
    for row, kind in enumerate(("Pitch", "Velocity")):
        ids = np.array(vocab.ids_of(kind))
        chance = np.exp(logits[row, ids]) / np.exp(logits[row, ids]).sum()
        counts = np.bincount(found[row], minlength=len(vocab))
        assert counts.sum() == counts[ids].sum()
        np.testing.assert_allclose(counts[ids] / 40_000, chance, atol=4 * np.sqrt(0.25 / 40_000))


def test_the_least_and_the_largest_number_draw_tokens_of_the_kind(vocab):
    logits, token = np.zeros((1, len(vocab))), np.array([vocab.ids_of("Pitch")[0]])
    ends = drawn(logits, token, token_kinds(vocab), np.array([[0.0, np.nextafter(1.0, 0.0)]]))
    assert ends.tolist() == [[vocab.ids_of("Pitch")[0], vocab.ids_of("Pitch")[-1]]]


def test_with_another_token_a_prefix_counts_what_it_would_have_counted_had_that_been_played(rollout, vocab):
    prompts, completions = (
        TokenBatch.pack([row[:n] for row, n in zip(ids, lengths, strict=True)])
        for ids, lengths in ((rollout.prompt_ids, rollout.prompt_lengths), (rollout.ids, rollout.lengths))
    )
    here = note_prefixes(prompts, completions, vocab, LONGEST, HEARD_S)
    found = choices(rollout.ids, rollout.lengths, note_ends(vocab), token_kinds(vocab))
    random, kinds = np.random.default_rng(1), token_kinds(vocab)
    for j in random.choice(len(found), 12, replace=False):
        clip, place, end = found.clip[j], found.place[j], found.end[j]
        other = random.choice(np.flatnonzero(kinds == kinds[rollout.ids[clip, place]]))
        prefix = np.flatnonzero((here.clip == clip) & (here.tokens == end))
        features = swapped(prompts, completions, vocab, here, prefix, np.array([place]), np.array([other]), HEARD_S)
        played = completions.row(int(clip)).copy()
        played[place] = other
        alone = note_prefixes(
            TokenBatch.pack([prompts.row(int(clip))]), TokenBatch.pack([played]), vocab, LONGEST, HEARD_S
        )
        wanted = alone.features[np.flatnonzero(alone.tokens == end)[0]]
        np.testing.assert_allclose(features[0], wanted, rtol=1e-12)
