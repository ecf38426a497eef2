"""The blend: names, weights, settings, the training signal, and what is not imported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastsmart.audio.batch import AudioBatch
from fastsmart.errors import UserError
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.reward import REWARDS, Clips, RewardBlend, RewardSettings, load_reward, register
from fastsmart.reward.base import Surroundings
from fastsmart.reward.typicality import fit_typicality


@pytest.fixture(scope="module")
def notes(make_pieces: Callable[..., NoteBatch]) -> NoteBatch:
    return cut_windows(make_pieces(2, seed=0)).select(range(8))


@pytest.fixture(scope="module")
def statistics(make_pieces: Callable[..., NoteBatch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "typicality.json"
    fit_typicality(make_pieces(20, seed=1), "synthetic").save(path)
    return path


def noise(clips: int) -> AudioBatch:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(clips, 64_000)).astype(np.float32) * np.linspace(0.3, 0.01, 64_000, dtype=np.float32)
    return AudioBatch(samples, np.full(clips, 64_000), 16_000)


def test_every_reward_goes_by_its_name(statistics: Path) -> None:
    for name in REWARDS:
        if name in ("audiobox", "pam", "style_margin", "taste") or name.startswith(("clap_", "clamp_")):
            continue  # they need files; tests of their own
        needs = {"presence": {"statistics": statistics}, "typicality": {"statistics": statistics}}
        reward = load_reward(name, **needs.get(name, {"cadence": True} if name == "constraint" else {}))
        assert reward.name == name
        assert "Hacked" in (type(reward).__doc__ or "")


def test_the_mix_reports_every_term_and_the_weighted_sum(notes: NoteBatch, statistics: Path) -> None:
    weights = {"consonance": 4.0, "typicality": 1.0, "presence": 0.5, "variety": 0.0}
    mix = RewardBlend(RewardSettings(terms=weights), statistics)
    clips = Clips(notes, noise(len(notes)))
    scores = mix(clips)
    assert mix.needs_audio
    assert list(scores.terms) == list(weights)
    terms = {name: load_reward(name, **({} if name in ("consonance", "variety") else {"statistics": statistics}))(clips)
             for name in weights}  # fmt: skip
    for name, values in terms.items():
        np.testing.assert_array_equal(scores.terms[name], values)
    expected = 4 * terms["consonance"] + terms["typicality"] + 0.5 * terms["presence"]
    np.testing.assert_allclose(scores.total, expected, rtol=1e-6)
    assert scores.total.dtype == np.float32


def test_a_clip_that_could_not_be_rendered_has_no_total_but_keeps_its_other_terms(notes: NoteBatch) -> None:
    audio = noise(len(notes))
    audio.samples[2] = np.nan
    weights = {"consonance": 1.0, "scale_consistency": 1.0, "brightness": 0.0}
    scores = RewardBlend(RewardSettings(terms=weights))(Clips(notes, audio))
    np.testing.assert_array_equal(np.isnan(scores.total), np.arange(len(notes)) == 2)
    assert np.isfinite(scores.terms["scale_consistency"]).all()
    unweighted = RewardBlend(RewardSettings(terms=weights | {"consonance": 0.0}))(Clips(notes, audio))
    assert np.isfinite(unweighted.total).all()


def test_symbolic_terms_need_no_audio_and_audio_terms_say_so(notes: NoteBatch) -> None:
    mix = RewardBlend(RewardSettings(terms={"scale_consistency": 1.0, "polyphony_rate": 2.0}))
    assert not mix.needs_audio
    assert len(mix(Clips(notes))) == len(notes)
    with pytest.raises(UserError, match="consonance listens to audio"):
        RewardBlend(RewardSettings(terms={"consonance": 1.0}))(Clips(notes))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"terms": {"consonence": 1.0}}, r"reward\.terms\.consonence: .*did you mean consonance\?"),
        ({"terms": {"zzz": 1.0}}, r"reward\.terms\.zzz: .*there are audiobox, brightness"),
        ({"terms": {"consonance": -1.0}}, r"reward\.terms\.consonance is -1\.0"),
        ({"terms": {"consonance": float("nan")}}, r"reward\.terms\.consonance is nan"),
        ({"terms": {"consonance": "much"}}, r"reward\.terms\.consonance is 'much'"),
        ({"terms": {"consonance": True}}, r"reward\.terms\.consonance is True"),
        ({"normalize": "batch"}, r"reward\.normalize is 'batch'"),
        ({"audiobox_axes": {"XX": 1.0}}, r"reward\.audiobox_axes\.XX"),
        ({"audiobox_axes": {"CE": -1.0}}, r"reward\.audiobox_axes\.CE is -1\.0"),
        ({"audiobox_axes": {"CE": 0.0}}, r"reward\.audiobox_axes weighs no axis"),
        ({"audiobox_batch": 0}, r"reward\.audiobox_batch is 0"),
        ({"audiobox_dtype": "int4"}, r"reward\.audiobox_dtype is 'int4'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_key(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        RewardSettings(**settings)


def test_a_mix_of_nothing_or_without_its_statistics_is_refused() -> None:
    for terms in ({}, {"consonance": 0.0}):
        with pytest.raises(UserError, match=r"reward\.terms weighs no reward"):
            RewardBlend(RewardSettings(terms=terms))
    with pytest.raises(UserError, match=r"reward\.terms\.presence .*reward\.typicality"):
        RewardBlend(RewardSettings(terms={"presence": 1.0}))


def test_an_unknown_reward_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no reward is called 'audiobx'; did you mean audiobox\?"):
        load_reward("audiobx")


def test_notes_and_audio_of_different_clips_do_not_mix(notes: NoteBatch) -> None:
    with pytest.raises(ValueError, match="8 clips of notes but 3 of audio"):
        Clips(notes, noise(3))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import fastsmart.reward", ("torch", "numba", "scipy", "mido", "soundfile")),
        ("from fastsmart.reward import load_reward; load_reward('scale_consistency')", ("torch", "soundfile")),
        ("from fastsmart.reward import load_reward; load_reward('consonance')", ("torch",)),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_asked_for(code: str, absent: tuple[str, ...]) -> None:
    check = f"{code}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reward_with_options_makes_itself_from_the_settings(
    notes: NoteBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsmart.reward.registry._REGISTERED", {})

    @register
    class Shifted:
        name = "shifted"
        needs_audio = False

        def __init__(self, shift: float, device: str) -> None:
            self.shift, self.device = shift, device

        @classmethod
        def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> "Shifted":
            return cls(settings.audiobox_axes["PC"], surroundings.device)

        def __call__(self, clips: Clips) -> np.ndarray:
            return np.full(len(clips), self.shift, np.float32)

    settings = RewardSettings(terms={"shifted": 2.0}, audiobox_axes={"PC": 0.25})
    blend = RewardBlend(settings, device="cuda:3")
    assert blend.rewards["shifted"].device == "cuda:3"  # type: ignore[attr-defined]
    np.testing.assert_array_equal(blend(Clips(notes)).total, np.full(len(notes), 0.5))
