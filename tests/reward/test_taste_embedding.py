"""A taste that hears components of what a frozen policy makes of clips, beside features that have a name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_notes import made, melody
from tiny_policy import make_policy

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.reward import Clips
from fastsmart.reward.taste import Taste, TasteReward
from fastsmart.reward.taste_embedding import LONGEST, ClipEmbedding
from fastsmart.reward.taste_features import NOTE_FEATURES, Standard, features
from fastsmart.taste import Choice
from fastsmart.tokens.phrase import encode_notes

CLIPS, C = 40, 3


@pytest.fixture(scope="module")
def tiny(vocab, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    save_policy(make_policy(vocab), folder)
    return str(folder)


@pytest.fixture(scope="module")
def notes() -> NoteBatch:
    return made([melody(seed) for seed in range(CLIPS)])


@pytest.fixture(scope="module")
def embedding(tiny: str, notes: NoteBatch) -> ClipEmbedding:
    return ClipEmbedding.fit(tiny, notes, C)


def test_components_are_principal_ones_of_mean_states(tiny: str, notes: NoteBatch, embedding: ClipEmbedding) -> None:
    policy, states = load_policy(tiny), []
    for i in range(CLIPS):
        ids = [policy.vocab.bos_id, *encode_notes(notes.select([i]), policy.vocab)][:LONGEST]
        with torch.no_grad():
            states.append(policy.model(torch.tensor([ids]))[0].mean(0).double().numpy())
    centred = np.stack(states) - np.mean(states, axis=0)
    variances = np.linalg.eigvalsh(centred.T @ centred / CLIPS)[::-1][:C]
    found = embedding(notes)
    np.testing.assert_allclose(found, centred @ embedding.axes, atol=1e-5)
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.diag(variances), atol=1e-6)


def test_a_clip_has_its_components_whatever_stands_beside_it(notes: NoteBatch, embedding: ClipEmbedding) -> None:
    np.testing.assert_array_equal(embedding(notes.select([7])), embedding(notes)[[7]])


def test_a_clip_without_notes_has_none(embedding: ClipEmbedding) -> None:
    assert np.isnan(embedding(made([[], melody(1)]))).all(axis=1).tolist() == [True, False]


def test_a_policy_with_other_weights_is_not_read(
    vocab, tmp_path: Path, notes: NoteBatch, embedding: ClipEmbedding
) -> None:
    save_policy(make_policy(vocab, seed=1), tmp_path / "other")
    with pytest.raises(UserError, match="has other weights than those the taste was learnt with"):
        ClipEmbedding(str(tmp_path / "other"), embedding.weights, embedding.centre, embedding.axes)(notes)


def test_too_few_clips_are_refused(tiny: str, notes: NoteBatch) -> None:
    with pytest.raises(UserError, match="3 components need more clips with notes than 3"):
        ClipEmbedding.fit(tiny, notes.select([0, 1, 2]), C)


def test_a_taste_finds_what_no_feature_has_a_name_for(
    notes: NoteBatch, embedding: ClipEmbedding, tmp_path: Path
) -> None:
    """A listener who likes the first component alone: it is found, and the reward from the file pays for it."""
    standard = Standard.of(notes, embedding=embedding)
    assert standard.names == (*NOTE_FEATURES, "embedding_1", "embedding_2", "embedding_3")
    table = standard.measure(notes)
    np.testing.assert_array_equal(table[:, : standard.named], features(notes))
    liked = standard(table)[:, standard.named]
    pairs = np.random.default_rng(0).integers(0, CLIPS, (80, 2))
    choices = [
        Choice(f"n{k}", 0.0, "", f"c{a}", f"c{b}", "left" if liked[a] > liked[b] else "right")
        for k, (a, b) in enumerate(pairs)
        if a != b
    ]
    taste = Taste.fit(choices, {f"c{i}": row for i, row in enumerate(table)}, standard)
    assert max(taste.explained(), key=lambda effect: abs(effect.effect)).name == "embedding_1"
    taste.save(tmp_path / "taste.json")
    scores = TasteReward(tmp_path / "taste.json", caution=0.0)(Clips(notes))
    np.testing.assert_allclose(scores, TasteReward(taste, caution=0.0)(Clips(notes)), atol=1e-3)
    assert np.corrcoef(scores, liked)[0, 1] > 0.9


@pytest.mark.parametrize("key", ["centre", "axes", "policy"])
def test_a_damaged_embedding_is_named(key: str, notes: NoteBatch, embedding: ClipEmbedding, tmp_path: Path) -> None:
    path = tmp_path / "standard.json"
    Standard.of(notes, embedding=embedding).save(path)
    tree = json.loads(path.read_text())
    del tree["embedding"][key]
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"standard\.json does not hold features"):
        Standard.load(path)
