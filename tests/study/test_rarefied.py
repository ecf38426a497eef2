"""Diversity at equal size, on sources whose diversity is known, at every length; and on outputs that hold next to
nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_notes import made, melody

from fastsmart.music.bootstrap import Draws, resample_weights
from fastsmart.music.diversity import WHOLE, diversity, vendi_score
from fastsmart.music.ngrams import self_bleu
from fastsmart.music.rarefaction import Excerpts, intersections
from fastsmart.music.rarefied import (
    RAREFIED,
    Sizes,
    effective_number,
    effective_number_2,
    rarefied_diversity,
    vendi_influence,
)
from fastsmart.music.training_set import TrainingSet
from fastsmart.notes import NoteBatch
from fastsmart.study.embedding import Embedding
from fastsmart.tokens.token_batch import TokenBatch

N = 60
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])
NEEDS_PIECES = ("rarefied_new_ngrams", "rarefied_training_distance")
NEEDS_GIVEN = (*NEEDS_PIECES, "rarefied_effective_embeddings", "rarefied_effective_embeddings_order_2")


def independent(random: np.random.Generator, notes: int) -> np.ndarray:
    """Notes that know nothing of each other: (step in ticks, pitch, velocity) each."""
    pitch = (
        48 + 12 * random.integers(0, 3, notes) + random.choice(SCALE, notes, p=[0.3, 0.1, 0.2, 0.1, 0.2, 0.05, 0.05])
    )
    return np.stack([random.choice([3, 3, 6], notes), pitch, random.integers(40, 110, notes)], axis=1)


def wandering(random: np.random.Generator, notes: int) -> np.ndarray:
    """Notes that stay near the one before and drift over the keyboard: a bar is alike, a piece is not."""
    drift = np.empty(notes)
    place = random.normal()
    for k in range(notes):
        place = 0.98 * place + np.sqrt(1 - 0.98**2) * random.normal()  # of unit variance from the first note on
        drift[k] = place
    pitch = np.clip(np.rint(64 + 14 * drift), 21, 108)
    return np.stack([random.choice([3, 3, 6], notes), pitch, np.clip(75 + 25 * drift, 1, 127)], axis=1).astype(int)


def played(source, notes: int, seed: int) -> tuple[NoteBatch, TokenBatch]:
    """N outputs of a source, three tokens a note."""
    random = np.random.default_rng([seed, notes])
    tables = [source(random, notes) for _ in range(N)]
    onsets = [random.integers(48) + np.concatenate([[0], np.cumsum(t[:-1, 0])]) for t in tables]  # anywhere in a bar
    clips = [
        [(int(a), 2, int(p)) for a, p in zip(at, t[:, 1], strict=True)] for at, t in zip(onsets, tables, strict=True)
    ]
    batch = replace(made(clips), velocity=np.concatenate(tables)[:, 2].astype(np.uint8))
    return batch, TokenBatch.pack([(t + np.array([0, 20, 200])).ravel() for t in tables])


def training_set() -> TrainingSet:
    """Pieces of the independent source."""
    from scipy import sparse

    from fastsmart.music.ngrams import figures, ngrams

    notes, tokens = played(independent, 60, 99)
    found = figures(notes)
    keys, row = np.unique(found.key, return_inverse=True)
    pieces = sparse.csr_matrix((np.ones(len(row), np.float32), (row, found.owner)), shape=(len(keys), N))
    pieces.data[:] = 1.0
    return TrainingSet(np.unique(ngrams(tokens, 4).key), keys, pieces)


def measured(source, notes: int, sizes: Sizes, seed: int, training: TrainingSet | None = None) -> dict[str, Draws]:
    batch, tokens = played(source, notes, seed)
    good, opening = np.arange(N) % 2 == 0, np.arange(N) // 3
    return diversity(batch, tokens, opening, resample_weights(opening, 0, 300), training, good=good, sizes=sizes)


def apart(a: Draws, b: Draws) -> float:
    """By how many standard errors two independent measurements differ."""
    error = np.hypot(a.draws.std(), b.draws.std())
    return abs(a.value - b.value) / max(error, 1e-9)


@pytest.mark.parametrize(
    ("source", "lengths", "sizes"),
    [
        (independent, (5, 15, 60, 240), Sizes(notes=5, tokens=15)),
        (independent, (32, 60, 240), Sizes(tokens=96)),
        (wandering, (32, 60, 240), Sizes(tokens=96)),
    ],
    ids=["independent, 5 notes", "independent, 32 notes", "wandering, 32 notes"],
)
def test_one_source_has_one_diversity_at_every_length(source, lengths, sizes):
    training = training_set()
    found = [measured(source, notes, sizes, 1, training) for notes in lengths]
    for name in RAREFIED:
        if "embeddings" in name:
            continue
        distances = [apart(found[0][name], other[name]) for other in found[1:]]
        assert max(distances) < 4, (name, [f[name].value for f in found])
    # and it is no property of the source: seen whole, the same outputs differ beyond any doubt
    for name in ("pitch_class_distance_across", "move_distance_across", "effective_outputs", "self_bleu"):
        assert apart(found[0][name], found[-1][name]) > 8, name


def test_a_narrower_source_is_less_diverse_even_with_fewer_notes():
    """One key against twelve: whole clips of 34 notes would hide it from the effective number."""

    def in_any_key(random: np.random.Generator, notes: int) -> np.ndarray:
        return independent(random, notes) + np.array([0, random.integers(12), 0])

    sizes = Sizes(notes=32, tokens=96)
    wide, narrow = measured(in_any_key, 200, sizes, 2), measured(independent, 34, sizes, 2)
    assert wide["effective_outputs"].value < narrow["effective_outputs"].value
    for name in ("rarefied_effective_outputs", "rarefied_pitch_class_distance_across"):
        assert wide[name].value > narrow[name].value
        assert apart(wide[name], narrow[name]) > 4
    # counted from the tonic, the keys are no diversity
    name = "rarefied_aligned_pitch_class_distance_across"
    assert apart(wide[name], narrow[name]) < 4


def test_register_and_dynamics_are_told_apart():
    low, high, soft = melody(0, 40), [(a, d, p + 24) for a, d, p in melody(0, 40)], melody(0, 40)
    batch = made([low, high, soft])
    velocity = batch.velocity.copy()
    velocity[batch.rows(2)] = 30
    batch = replace(batch, velocity=velocity)
    tokens = TokenBatch.pack([[1] * 200] * 3)
    found = rarefied_diversity(batch, tokens, np.zeros(3, int), resample_weights(3, 0, 20))
    assert found["rarefied_dynamics_distance_within"].value == pytest.approx(2 / 3)  # two pairs of three
    assert 0 < found["rarefied_register_distance_within"].value <= 2 / 3
    assert found["rarefied_register_distance_within"].value > found["rarefied_move_distance_within"].value


def test_equal_outputs_are_equal_and_unlike_ones_unlike():
    same = [melody(0, 32)] * 4
    tokens = TokenBatch.pack([list(range(128))] * 4)
    weights = resample_weights(4, 0, 20)
    found = {n: d.value for n, d in rarefied_diversity(made(same), tokens, np.array([0, 0, 1, 1]), weights).items()}
    assert all(found[name] == pytest.approx(0, abs=1e-6) for name in found if "distance_" in name)
    assert found["rarefied_effective_outputs"] == pytest.approx(1, abs=1e-4)
    assert found["rarefied_effective_outputs_order_2"] == pytest.approx(1, abs=1e-4)
    assert found["rarefied_self_bleu"] == pytest.approx(1)
    assert found["rarefied_own_ngrams"] == 0
    unlike = [[(48 * note + 12 * k, 2, 48 + k + 12 * k * (note % 2)) for note in range(32)] for k in range(3)]
    tokens = TokenBatch.pack([[1000 * k + i for i in range(128)] for k in range(3)])
    prompt = np.array([0, 0, 1])
    found = {
        n: d.value for n, d in rarefied_diversity(made(unlike), tokens, prompt, resample_weights(3, 0, 20)).items()
    }
    for kind in ("pitch_class", "onset", "move"):
        assert found[f"rarefied_{kind}_distance_within"] == pytest.approx(1)
        assert found[f"rarefied_{kind}_distance_across"] == pytest.approx(1)
    assert found["rarefied_effective_outputs"] == pytest.approx(3)
    assert found["rarefied_effective_outputs_order_2"] == pytest.approx(3)
    assert found["rarefied_self_bleu"] == 0
    assert found["rarefied_own_ngrams"] == 1


@pytest.mark.parametrize("notes", [0, 1, 31])
@pytest.mark.parametrize("tokens", [0, 1, 3, 127])
def test_outputs_too_short_to_compare_show_no_diversity(notes: int, tokens: int):
    """Neither equal nor different ones: what could not be seen is not claimed, and nothing is NaN."""
    for clips, ids in (
        ([melody(0, notes)] * N, [list(range(tokens))] * N),
        ([melody(k, notes) for k in range(N)], [[1000 * k + i for i in range(tokens)] for k in range(N)]),
    ):
        found = rarefied_diversity(
            made(clips), TokenBatch.pack(ids), np.arange(N) % 6, resample_weights(N, 0, 20), training=training_set(),
            good=np.ones(N, bool), embedded=[np.zeros((0, 0))] * 4,
        )  # fmt: skip
        assert tuple(found) == RAREFIED
        for name, draws in found.items():
            none = 0.0 if name == "rarefied_effective_good_outputs" else 1.0 if "effective" in name else 0.0
            assert draws.value == (1.0 if name == "rarefied_self_bleu" else none), name
            assert (draws.draws == draws.value).all()


def test_short_outputs_beside_long_ones_change_nothing():
    clips = [melody(k, 40) for k in range(20)]
    ids = [np.random.default_rng(k).integers(0, 30, 150) for k in range(20)]
    weights = np.ones((1, 20), np.float32)
    alone = rarefied_diversity(made(clips), TokenBatch.pack(ids), np.arange(20) % 4, weights)
    beside = rarefied_diversity(
        made([*clips, [], melody(99, 5)]),
        TokenBatch.pack([*ids, [1], [2, 3]]),
        np.arange(22) % 4,
        np.ones((1, 22), np.float32),
    )
    for name in RAREFIED:
        assert beside[name].value == pytest.approx(alone[name].value, nan_ok=True), name


def test_what_is_not_given_is_not_known():
    clips = [melody(k, 40) for k in range(6)]
    ids = [np.random.default_rng(k).integers(0, 30, 150) for k in range(6)]
    found = rarefied_diversity(made(clips), TokenBatch.pack(ids), np.arange(6), resample_weights(6, 0, 20))
    unknown = {name for name, draws in found.items() if np.isnan(draws.value)}
    within = {name for name in RAREFIED if name.endswith("_within")}  # no two outputs of one prompt
    assert unknown == {*NEEDS_GIVEN, "rarefied_effective_good_outputs", *within}


def kernels(size: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        intersections(random.multinomial(16, random.dirichlet(np.full(9, 0.4)), size)).astype(np.float64)
        for _ in range(3)
    ]


def test_influences_are_the_first_variation_of_the_vendi_score():
    kernel = kernels(12)[0]
    influence = vendi_influence(kernel)
    assert np.exp(influence.mean()) == pytest.approx(vendi_score(kernel))

    def entropy(weights: np.ndarray) -> float:
        root = np.sqrt(weights / weights.sum())
        shares = np.linalg.eigvalsh(root[:, None] * kernel * root)
        shares = shares[shares > 1e-15]
        return float(-np.sum(shares * np.log(shares)))

    for i in range(12):
        step = np.zeros(12)
        step[i] = 1e-5
        slope = (entropy(np.ones(12) + step) - entropy(np.ones(12) - step)) / 2e-5
        # the weights are divided by their sum, which takes the mean away
        assert slope == pytest.approx((influence[i] - influence.mean()) / 12, abs=1e-6)


def test_the_interval_of_the_effective_number_is_that_of_new_outputs():
    """The spread of the draws against the spread over 60 sets of outputs really drawn anew."""
    scores, errors = [], []
    for seed in range(60):
        random = np.random.default_rng(seed)
        rows = np.stack([random.multinomial(16, random.dirichlet(np.full(9, 0.4))) for _ in range(80)])
        draws = effective_number([intersections(rows)], np.ones(80, bool), resample_weights(80, seed, 300))
        scores.append(draws.value)
        errors.append(draws.draws.std())
    assert np.mean(errors) == pytest.approx(np.std(scores, ddof=1), rel=0.3)


def test_the_effective_number_of_order_2_is_that_of_the_eigenvalues():
    similar = kernels(12)[:1]
    excerpts = Excerpts.draw(np.array([20] * 12 + [3]), 16)
    found = effective_number_2(similar, excerpts, resample_weights(13, 0, 30))
    shares = np.linalg.eigvalsh(similar[0] / 12)
    assert found.value == pytest.approx(1 / np.sum(shares**2), rel=1e-5)
    assert found.value < vendi_score(similar[0])  # an order above never gives more
    assert ((found.draws > 1) & (found.draws <= 12)).all()


def test_good_outputs_are_counted_alone():
    """Three kinds of which two are good: three effective outputs, two good ones; none good is none."""
    clips = [[(48 * note + 12 * k, 2, 48 + k + 12 * k * (note % 2)) for note in range(32)] for k in range(3)] * 4
    ids = [np.random.default_rng(k).integers(0, 30, 150) for k in range(12)]
    arguments = made(clips), TokenBatch.pack(ids), np.zeros(12, int), resample_weights(12, 0, 30)
    good = np.arange(12) % 3 < 2
    found = rarefied_diversity(*arguments, good=good)
    assert found["rarefied_effective_outputs"].value == pytest.approx(3)
    assert found["rarefied_effective_good_outputs"].value == pytest.approx(2)
    none = rarefied_diversity(*arguments, good=np.zeros(12, bool))["rarefied_effective_good_outputs"]
    assert none.value == 0


def test_embeddings_keep_the_base_as_their_ruler():
    random = np.random.default_rng(0)
    base = random.normal(size=(50, 4, 40)) * np.linspace(3, 0.1, 40)
    embedding = Embedding.fit(base)
    points = (base - embedding.centre) @ embedding.axes
    np.testing.assert_allclose(embedding.axes.T @ embedding.axes, np.eye(32), atol=1e-10)
    kept = ((points**2).sum(), ((base - embedding.centre) ** 2).sum())
    values = np.linalg.svd((base - embedding.centre).reshape(-1, 40), compute_uv=False) ** 2
    assert kept[0] / kept[1] == pytest.approx(values[:32].sum() / values.sum())  # the largest 32 of 40
    similar = embedding.similarities(base)
    at_median = np.median(np.concatenate([k[np.triu_indices(50, 1)] for k in similar]))
    assert at_median == pytest.approx(np.exp(-0.5), rel=1e-6)
    np.testing.assert_array_equal(np.diag(similar[0]), 1)
    narrow = embedding.similarities(base / 4)
    assert narrow[0].mean() > similar[0].mean()  # on the base's scale, not on its own
    np.testing.assert_array_equal(Embedding.fit(base[:1] * 0).similarities(base[:1] * 0)[0], [[1.0]])


def test_the_hidden_states_are_those_of_each_output_alone(vocab):
    import torch
    from tiny_policy import make_policy

    from fastsmart.study.embedding import excerpt_states

    policy = make_policy(vocab)
    random = np.random.default_rng(0)
    prompts = TokenBatch.pack([[21, 400], [1], [21, 401, 3]] * 12)
    completions = TokenBatch.pack([random.integers(22, 400, random.integers(3, 40)) for _ in range(36)])
    excerpts = Excerpts.draw(completions.lengths, 8)
    states = excerpt_states(policy, prompts, completions, excerpts)
    assert 0 < len(excerpts.of) < 36
    for k, i in enumerate(excerpts.of):
        whole = np.concatenate([prompts.row(int(i)), completions.row(int(i))])
        with torch.no_grad():
            alone = policy.hidden(torch.from_numpy(whole.astype(np.int64))[None])[0].double().numpy()
        for r, start in enumerate(excerpts.start[k] + prompts.lengths[i]):
            np.testing.assert_allclose(states[k, r], alone[start : start + 8].mean(axis=0), atol=1e-5)


def test_self_bleu_of_excerpts_is_that_of_outputs_cut_to_them():
    ids = [np.random.default_rng(k).integers(0, 12, 128) for k in range(9)]
    tokens = TokenBatch.pack(ids)
    found = rarefied_diversity(made([melody(k, 40) for k in range(9)]), tokens, np.zeros(9, int), np.ones((1, 9)))
    assert found["rarefied_self_bleu"].value == pytest.approx(self_bleu(tokens).mean())
    assert set(WHOLE).isdisjoint(found)
