"""Diversity metrics on sets whose diversity is known: all equal, all different, one copied, some silent."""

from __future__ import annotations

import numpy as np
import pytest
import symusic
from made_notes import made, melody

from fastsmart.music.bootstrap import resample_weights
from fastsmart.music.diversity import (
    DIVERSITY,
    NGRAM,
    TrainingSet,
    average_roll,
    diversity,
    prompt_numbers,
    vendi_score,
    whole_diversity,
)
from fastsmart.music.features import features
from fastsmart.music.histograms import histograms, total_variation
from fastsmart.music.ngrams import figures, ngrams, share_not_in
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.decode import decode
from fastsmart.tokens.token_batch import TokenBatch

N = 12


def tokens_of(clips, first: int = 0) -> TokenBatch:
    """Three tokens a note, such that equal clips have equal tokens."""
    return TokenBatch.pack([[first + x for at, length, pitch in clip for x in (at, length, pitch)] for clip in clips])


def measured(clips, prompt=None, training=None) -> dict[str, float]:
    prompt = np.arange(len(clips)) % 3 if prompt is None else prompt
    draws = whole_diversity(made(clips), tokens_of(clips), prompt, resample_weights(len(clips), 0, 50), training)
    return {name: d.value for name, d in draws.items()}


def unlike(k: int) -> list[tuple[int, int, int]]:
    """Three clips, k = 0..2, that share nothing: neither pitch classes nor places in the bar nor moves."""
    return [(48 * note + 12 * k, 2, 48 + k + 12 * k * (note % 2)) for note in range(10)]


def one_pitch_class(k: int) -> list[tuple[int, int, int]]:
    """Clips on pitch class k and at one place in the bar."""
    return [(48 * note + 3 * k, 2, 48 + k) for note in range(10)]


def test_equal_outputs_have_no_diversity():
    found = measured([melody(0)] * N)
    assert all(
        found[f"{kind}_distance_{pairs}"] == 0
        for kind in ("pitch_class", "onset", "move")
        for pairs in ("within", "across")
    )
    assert found["effective_outputs"] == pytest.approx(1)
    assert found["self_bleu"] == pytest.approx(1)
    assert found["own_ngrams"] == 0


def test_outputs_with_nothing_in_common_have_all_diversity():
    clips, prompt = [unlike(k) for k in range(3)], np.array([0, 0, 1])
    shifted = TokenBatch.pack([[1000 * i + x for x in row] for i, row in enumerate(tokens_of(clips))])
    draws = whole_diversity(made(clips), shifted, prompt, resample_weights(3, 0, 50))
    found = {name: d.value for name, d in draws.items()}
    assert all(found[name] == pytest.approx(1) for name in found if "distance_" in name)
    assert found["effective_outputs"] == pytest.approx(3)
    assert found["self_bleu"] == 0
    assert found["own_ngrams"] == 1


def test_one_copy_shows_in_proportion():
    clips, prompt = [unlike(k) for k in range(3)], np.zeros(4, int)
    found = measured([*clips, clips[0]], prompt)
    assert found["pitch_class_distance_within"] == pytest.approx(5 / 6)  # of six pairs one is at distance 0
    assert found["move_distance_within"] == pytest.approx(5 / 6)
    assert np.isnan(found["pitch_class_distance_across"])
    # of the matrix over 4, one eigenvalue is 2/4 and two are 1/4
    assert found["effective_outputs"] == pytest.approx(np.exp(np.log(2) / 2 + np.log(4) / 2))
    assert found["own_ngrams"] == pytest.approx(measured(clips, prompt[:3])["own_ngrams"] / 2)
    assert found["self_bleu"] >= 0.5  # two of four are there word for word


def test_silence_is_like_silence_and_like_nothing_else():
    assert measured([[]] * N)["effective_outputs"] == pytest.approx(1)
    assert measured([[]] * N)["pitch_class_distance_across"] == 0
    clips = [melody(k) for k in range(N - 1)]
    distance = total_variation(histograms(made([*clips, []]))["pitch_class"])
    np.testing.assert_allclose(distance[-1, :-1], 1)
    assert (distance <= 1 + 1e-12).all()


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_is_bounded_on_any_outputs(seed: int):
    random = np.random.default_rng(seed)
    clips = [melody(int(random.integers(6)), int(random.integers(0, 30))) for _ in range(N)]
    for name, value in measured(clips).items():
        low, high = (1, N) if name == "effective_outputs" else (0, 1)
        assert np.isnan(value) or low - 1e-9 <= value <= high + 1e-9, name


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_vendi_score_of_equal_groups_is_their_number(groups: int):
    label = np.arange(12) % groups
    assert vendi_score((label[:, None] == label[None, :]).astype(float)) == pytest.approx(groups)


def test_distances_within_prompts_and_across_tell_the_two_kinds_of_sameness_apart():
    prompt = np.repeat(np.arange(3), 4)
    same_within = measured([one_pitch_class(p) for p in prompt], prompt)
    assert same_within["pitch_class_distance_within"] == 0
    assert same_within["pitch_class_distance_across"] == 1
    same_across = measured([one_pitch_class(i % 4) for i in range(N)], prompt)
    assert same_across["pitch_class_distance_within"] == 1
    assert same_across["pitch_class_distance_across"] == pytest.approx(3 / 4)


def test_onsets_are_counted_in_the_bar_of_the_meter():
    clip = [(k * 36, 2, 60) for k in range(8)]  # every three beats
    assert histograms(made([clip], (3, 4)))["onset"][0, 0] == 1
    assert histograms(made([clip], (4, 4)))["onset"][0, [0, 4, 8, 12]].tolist() == [0.25] * 4


def test_figures_are_those_of_the_features(vocab):
    random = np.random.default_rng(0)
    garbage = [random.integers(0, len(vocab), 400) for _ in range(10)]
    notes = decode(garbage, vocab)
    found = figures(notes)
    distinct = [len(np.unique(found.key[found.owner == i])) for i in range(len(notes))]
    assert distinct == features(notes)["figures"].tolist()


def test_a_copied_passage_is_found_in_any_key(vocab):
    """Pieces of music-like tokens; an output that takes 20 notes of one of them, a fifth higher."""

    def piece(shift: int = 0, seed: int = 0, notes: int = 60) -> list[int]:
        own = np.random.default_rng(seed)
        ids = [vocab.id("Bar_None"), vocab.id("TimeSig_4/4")]
        for k in range(notes):
            ids += [vocab.id("Bar_None")] if k and k % 8 == 0 else []
            pitch = int(own.integers(40, 80)) + shift
            ids += [
                vocab.id(t) for t in (f"Position_{6 * (k % 8)}", f"Pitch_{pitch}", "Velocity_79", "Duration_0.6.12")
            ]
        return ids

    pieces = [piece(seed=s) for s in range(5)]
    offsets = np.cumsum([0, *map(len, pieces)])
    dataset = TokenDataset(np.concatenate(pieces).astype(np.uint16), offsets, ("x",) * 5, (), vocab, "")
    training = TrainingSet.of(dataset)
    copied, fresh = piece(shift=7, seed=2, notes=20), piece(seed=99, notes=20)
    notes = decode([copied, fresh], vocab)
    distance = training.distance(figures(notes))
    assert distance[0] == 0
    assert distance[1] > 0.9
    new = share_not_in(ngrams(TokenBatch.pack([pieces[2][:80], fresh]), NGRAM), training.ngrams)
    assert new[0] == 0
    assert new[1] > 0.2


def test_average_roll_is_that_of_symusic():
    clips = [melody(k, 40) for k in range(6)] + [melody(9, 4)]
    roll, outputs = average_roll(made(clips))
    expected = []
    for clip in clips[:6]:
        score = symusic.Score(12)
        track = symusic.Track()
        track.notes.extend([symusic.Note(at, length, pitch, 80) for at, length, pitch in clip])
        score.tracks.append(track)
        frames = score.pianoroll(modes=["frame"], pitch_range=(0, 128), encode_velocity=False)[0, 0]
        expected.append(frames[:, : 12 * 16])
    assert outputs == 6
    np.testing.assert_allclose(roll, np.mean(expected, axis=0))


def test_prompt_numbers_are_equal_for_equal_prompts():
    assert prompt_numbers(TokenBatch.pack([[1, 2], [3], [1, 2], [1, 2, 3]])).tolist() == [0, 1, 0, 2]


def test_names_are_those_announced():
    clips = [melody(k) for k in range(3)]
    found = diversity(made(clips), tokens_of(clips), np.zeros(3, int), resample_weights(3, 0, 50))
    assert tuple(found) == DIVERSITY
