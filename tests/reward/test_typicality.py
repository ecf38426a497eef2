"""The likelihood of a clip among real pieces: SciPy's density, known parameters, and music that was spoiled."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fastsmart.errors import UserError
from fastsmart.music.covariance import ledoit_wolf
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, load_reward
from fastsmart.reward.typicality import (
    DIMENSIONS,
    FLOOR,
    TypicalityStats,
    _dimensions,
    _fit_student_t,
    fit_typicality,
    log_likelihood,
)


@pytest.fixture(scope="module")
def stats(make_pieces: Callable[..., NoteBatch]) -> TypicalityStats:
    return fit_typicality(make_pieces(30, seed=0), "seeded synthetic pieces")


@pytest.fixture(scope="module")
def clips(make_pieces: Callable[..., NoteBatch]) -> NoteBatch:
    """Clips of pieces the statistics were not fitted to."""
    return cut_windows(make_pieces(10, seed=1))


def test_log_likelihood_is_scipys_density_in_units_of_each_deviation(stats: TypicalityStats, clips: NoteBatch) -> None:
    density = scipy_stats.multivariate_t(stats.location, stats.scatter, df=stats.freedom)
    expected = density.logpdf(_dimensions(clips, 10.0)) + np.log(np.diag(stats.scatter)).sum() / 2
    np.testing.assert_allclose(log_likelihood(clips, stats), expected / len(DIMENSIONS), rtol=1e-9)


def test_fit_finds_the_parameters_its_data_came_from() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, 4)) + 2 * np.eye(4)
    location, scatter = np.array([1.0, -2.0, 0.5, 3.0]), mixing @ mixing.T
    x = scipy_stats.multivariate_t(location, scatter, df=5).rvs(40_000, random_state=rng)
    found_location, found_scatter = _fit_student_t(x, 5.0)
    np.testing.assert_allclose(found_location, location, atol=0.06)
    np.testing.assert_allclose(found_scatter, scatter, rtol=0.05, atol=0.15)


def test_shrinkage_helps_when_windows_are_few_and_vanishes_when_they_are_many() -> None:
    rng = np.random.default_rng(0)
    truth = np.diag(np.linspace(0.5, 1.5, 12))

    def draw(n: int) -> tuple[float, np.ndarray]:
        y = rng.multivariate_normal(np.zeros(12), truth, n)
        y -= y.mean(axis=0)
        covariance = y.T @ y / n
        return ledoit_wolf(y, covariance), covariance

    few, covariance = draw(20)
    shrunk = (1 - few) * covariance + few * np.trace(covariance) / 12 * np.eye(12)
    assert 0.3 < few <= 1
    assert np.linalg.norm(shrunk - truth) < 0.6 * np.linalg.norm(covariance - truth)
    assert draw(20_000)[0] < 0.02


def test_spoiled_music_is_less_typical(stats: TypicalityStats, clips: NoteBatch) -> None:
    rng = np.random.default_rng(0)
    notes = len(clips.pitch)
    sparse = clips.select(range(len(clips)))
    keep = rng.random(notes) < 1 / 3
    index = np.repeat(np.arange(len(clips)), clips.counts)[keep]
    per_note = ("onset_s", "duration_s", "pitch", "velocity", "onset_tick", "duration_tick")
    sparse = replace(
        clips,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(index, minlength=len(clips)))]),
        **{name: getattr(clips, name)[keep] for name in per_note},
    )
    spoiled = {
        "a third of the notes": sparse,
        "random pitches": replace(clips, pitch=rng.integers(36, 97, notes).astype(np.uint8)),
        "one pitch": replace(clips, pitch=np.full(notes, 60, np.uint8)),
        "staccato": replace(clips, duration_tick=np.ones(notes, np.int32), duration_s=clips.duration_s / 6),
        "one loudness": replace(clips, velocity=np.full(notes, 120, np.uint8)),
    }
    real = log_likelihood(clips, stats)
    assert abs(np.median(real) - stats.median_log_likelihood) < 0.3
    for name, notes_of in spoiled.items():
        assert np.quantile(log_likelihood(notes_of, stats), 0.9) < np.quantile(real, 0.1), name


def test_no_notes_have_the_floor_and_the_ceiling_is_the_median_of_real_clips(
    stats: TypicalityStats, clips: NoteBatch, make_notes: Callable[..., NoteBatch]
) -> None:
    odd = make_notes([], [(0, 12, 60, 80)], [(k, 1, 21 + 87 * (k % 2), 1 + 126 * (k % 2)) for k in range(240)])
    nothing, one, wild = load_reward("typicality", statistics=stats)(Clips(odd))
    assert nothing == FLOOR < min(one, wild)
    plain, ceiled = (load_reward("typicality", statistics=stats, ceiling=c)(Clips(clips)) for c in (False, True))
    assert plain.max() > ceiled.max() == np.float32(stats.median_log_likelihood)
    np.testing.assert_array_equal(ceiled, np.minimum(plain, np.float32(stats.median_log_likelihood)))


def test_pieces_that_never_vary_a_feature_still_give_usable_statistics(make_pieces: Callable[..., NoteBatch]) -> None:
    pieces = make_pieces(20, seed=2)
    flat = replace(pieces, velocity=np.full(len(pieces.pitch), 80, np.uint8))
    louder = replace(cut_windows(flat), velocity=np.full(len(cut_windows(flat).pitch), 84, np.uint8))
    assert np.median(log_likelihood(louder, fit_typicality(flat, "flat"))) > FLOOR / 2


def test_statistics_survive_the_way_to_disk(stats: TypicalityStats, clips: NoteBatch, tmp_path: Path) -> None:
    stats.save(tmp_path / "typicality.json")
    loaded = TypicalityStats.load(tmp_path / "typicality.json")
    np.testing.assert_array_equal(log_likelihood(clips, loaded), log_likelihood(clips, stats))
    assert (loaded.provenance, loaded.pieces) == ("seeded synthetic pieces", 30)
    reward = load_reward("typicality", statistics=tmp_path / "typicality.json")
    np.testing.assert_array_equal(reward(Clips(clips)), log_likelihood(clips, stats).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format="something else"), "does not hold statistics"),
        (lambda c: c.update(features=c["features"][:-1]), "other features"),
        (lambda c: c.pop("median_notes"), "median_notes"),
        (lambda c: c.update(freedom="five"), "five"),
        (lambda c: c.update(window_s=-10.0), "no distribution has"),
        (lambda c: c.update(freedom=1e308), "no distribution has"),
        (lambda c: c.update(median_notes="nan"), "no distribution has"),
        (lambda c: c["location"].__setitem__(3, 1e308), "no distribution has"),
        (lambda c: c["scatter"][11].__setitem__(0, 1e11), "no distribution has"),
        (lambda c: c.update(median_notes=float("nan")), "no distribution has"),
        (lambda c: c.update(location=c["location"][1:]), "12 features"),
        (lambda c: c["scatter"][0].pop(), "lacks a number"),
        (lambda c: c["scatter"][3].__setitem__(3, -1.0), "no distribution has"),
    ],
)
def test_statistics_that_are_not_what_they_should_be_are_refused(
    stats: TypicalityStats, tmp_path: Path, change: Callable[[dict], None], says: str
) -> None:
    path = tmp_path / "typicality.json"
    stats.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says) as error:
        load_reward("presence", statistics=path)
    assert str(path) in str(error.value)


def test_files_that_are_no_statistics_are_refused(stats: TypicalityStats, tmp_path: Path) -> None:
    truncated = tmp_path / "typicality.json"
    stats.save(truncated)
    truncated.write_text(truncated.read_text()[:500])
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path in (truncated, binary, tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            TypicalityStats.load(path)
    with pytest.raises(UserError, match="cannot write"):
        stats.save(tmp_path / "no such folder" / "typicality.json")


def test_too_few_pieces_are_refused(make_pieces: Callable[..., NoteBatch]) -> None:
    with pytest.raises(UserError, match=r"at least 50 windows of 10 s, but 2 pieces gave 12"):
        fit_typicality(make_pieces(2, seed=0), "two pieces")
