"""Prefixes that end with a note, and what they count."""

import numpy as np
import pytest

from fastsmart import UserError, load_policy
from fastsmart.credit.prefixes import _beginnings, note_prefixes, swapped
from fastsmart.music.features import FEATURES, features
from fastsmart.reward.constraints import Constraint
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


def test_beginnings_have_their_own_prompts():
    prompts, completions = TokenBatch.pack([[1, 2], [3], []]), TokenBatch.pack([[4, 5, 6], [7, 8], [9]])
    found = _beginnings(prompts, completions, np.array([1, 0, 2, 1, 0]), np.array([0, 3, 1, 2, 1]))
    assert [row.tolist() for row in found] == [[3], [1, 2, 4, 5, 6], [9], [3, 7, 8], [1, 2, 4]]


def test_what_is_counted_also_stands_behind_the_features(played, shipped):
    """Degrees of constraints, of prefixes as they are and with another pitch."""
    _, prompts, completions, plain = played
    gate = Constraint(key="G major", highest=80)
    given = (prompts, completions, shipped.vocab)
    found = note_prefixes(*given, LONGEST, HEARD_S, gate.degrees)
    here = len(FEATURES)
    np.testing.assert_array_equal(np.delete(found.features, [here, here + 1], axis=1), plain.features)
    p = int(np.flatnonzero((found.tokens >= 20) & (found.features[:, here + 1] == 1.0))[0])
    n = int(found.clip[p])
    place = int(np.isin(completions.row(n)[: found.tokens[p]], shipped.vocab.ids_of("Pitch")).nonzero()[0][-1])
    high = shipped.vocab.id("Pitch_100")
    chosen, places, tokens = np.array([p]), np.array([place]), np.array([high])
    swaps = swapped(*given, found, chosen, places, tokens, HEARD_S, gate.degrees)
    ids = np.concatenate([prompts.row(n), completions.row(n)[: found.tokens[p]]])
    turned = ids.copy()
    turned[len(prompts.row(n)) + place] = high
    for row, table in ((ids, found.features[p]), (turned, swaps[0])):
        degrees = gate.degrees(decode(TokenBatch.pack([row]), shipped.vocab, max_seconds=HEARD_S))
        np.testing.assert_allclose(table[here : here + 2], [degrees["key"][0], degrees["range"][0]])
    assert swaps[0, here + 1] < found.features[p, here + 1]


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


@pytest.mark.parametrize(("asked", "columns"), [(["ragtime", "hymn"], 2), (["hymn", "hymn"], 0)])
def test_where_prompts_ask_for_several_styles_a_prefix_knows_its_own(played, asked, columns):
    policy = load_policy("styles-tiny")
    token = {style: policy.vocab.id(name) for style, name in policy.vocab.styles.styles}
    _, _, completions, plain = played
    prompts = TokenBatch.pack([[1, token[style]] for style in asked for _ in range(3)])
    found = note_prefixes(prompts, completions, policy.vocab, LONGEST, HEARD_S)
    usual = plain.features.shape[1]
    assert found.features.shape[1] == usual + columns
    np.testing.assert_array_equal(found.features[:, :usual], plain.features)
    if columns:
        is_hymn = np.array([asked[clip // 3] == "hymn" for clip in found.clip])
        np.testing.assert_array_equal(found.features[:, usual:], np.column_stack([is_hymn, ~is_hymn]))
        swaps = swapped(
            prompts, completions, policy.vocab, found, np.array([5]), np.array([0]), completions.row(0)[:1], HEARD_S
        )
        np.testing.assert_allclose(swaps[0], found.features[5])
