"""Prefixes that end with a note, and what they count."""

import numpy as np
import pytest

from fastsmart import UserError
from fastsmart.credit.prefixes import note_prefixes
from fastsmart.music.features import features
from fastsmart.sampling import sample
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch

LONGEST, HEARD_S = 60, 10.0


@pytest.fixture(scope="module")
def played(shipped):
    rollout = sample(shipped, TokenBatch.pack([[1], [1]]), group=3, max_tokens=LONGEST, seed=3)
    parts = ((rollout.prompt_ids, rollout.prompt_lengths), (rollout.ids, rollout.lengths))
    prompts, completions = (
        TokenBatch.pack([row[:n] for row, n in zip(ids, lengths, strict=True)]) for ids, lengths in parts
    )
    return rollout, prompts, completions, note_prefixes(prompts, completions, shipped.vocab, LONGEST, HEARD_S)


@pytest.fixture(scope="module")
def shipped():
    from fastsmart import load_policy

    return load_policy("pop909-tiny")


def test_every_prefix_ends_with_a_whole_note(played, shipped):
    rollout, _, _, here = played
    for n in range(len(rollout)):
        ids = rollout.ids[n, : rollout.lengths[n]]
        tokens = here.tokens[here.offsets[n] : here.offsets[n + 1]]
        assert tokens[0] == 0
        assert tokens[-1] == len(ids) == rollout.lengths[n]
        ends = [i + 1 for i, token in enumerate(ids) if shipped.vocab.tokens[token].startswith("Duration")]
        assert sorted({0, *ends, len(ids)}) == tokens.tolist()
        assert (here.clip[here.offsets[n] : here.offsets[n + 1]] == n).all()


def test_a_prefix_counts_what_its_notes_have(played, shipped):
    """The features of `music.features` on the prefix decoded by itself, then seconds, tokens and the end."""
    rollout, _, _, here = played
    for p in range(0, len(here.clip), 7):
        n, count = here.clip[p], here.tokens[p]
        ids = np.concatenate([rollout.prompt_ids[n, : rollout.prompt_lengths[n]], rollout.ids[n, :count]])
        notes = decode(TokenBatch.pack([ids]), shipped.vocab, max_seconds=HEARD_S)
        wanted = [np.nan_to_num(values)[0] for values in features(notes).values()]
        np.testing.assert_allclose(here.features[p, : len(wanted)], wanted, rtol=1e-12)
        seconds, all_heard, tokens, ended = here.features[p, len(wanted) :]
        assert 0 <= seconds <= HEARD_S
        assert all_heard == (seconds >= HEARD_S)
        assert tokens == count
        assert ended == (count == rollout.lengths[n] < LONGEST)


def test_steps_add_up_to_what_a_clip_has_changed(played):
    *_, here = played
    values = np.random.default_rng(0).normal(size=len(here.clip))
    change = here.steps(values)
    assert len(change) == len(here.clip) - len(here.offsets) + 1
    first, last = values[here.offsets[:-1]], values[here.offsets[1:] - 1]
    sums = np.bincount(here.clip[here.tokens > 0], change)
    np.testing.assert_allclose(sums, last - first)


def test_a_vocabulary_whose_notes_do_not_end_is_refused(shipped, monkeypatch):
    monkeypatch.setattr(type(shipped.vocab), "ids_of", lambda self, kind: [])
    one = TokenBatch.pack([[1]])
    with pytest.raises(UserError, match="needs notes that end with a token of their duration"):
        note_prefixes(one, one, shipped.vocab, LONGEST, HEARD_S)
