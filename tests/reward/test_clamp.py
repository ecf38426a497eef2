"""CLaMP rewards and their encoder on small files in the published form, against transformers' own networks."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_notes import made, melody
from small_clamp import SMALL, WORDS, bert_vector, kind, small, write_small_clamp, write_with_text

from fastsmart.errors import UserError
from fastsmart.notes import NoteBatch
from fastsmart.reward import Clips, RewardBlend, RewardSettings, load_reward
from fastsmart.reward.clamp3 import MusicReader, RealStyles, StylesAbout
from fastsmart.reward.clamp3.architecture import KINDS, Size, music_shapes
from fastsmart.reward.clamp3.encoder import BatchEncoder, Segment
from fastsmart.reward.clamp3.mtf import notes_text, patches
from fastsmart.reward.clamp3.reward import margins
from fastsmart.reward.clamp3.weights import random_state, read_weights

transformers = pytest.importorskip("transformers")
NAMES = [kind.name for kind in KINDS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTSMART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def clips() -> NoteBatch:
    return made([melody(seed, notes=n) for seed, n in enumerate((24, 3, 60, 24, 150))])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_small_clamp(tmp_path / "clamp2.pth")


def tables(notes: NoteBatch) -> list[np.ndarray]:
    return [patches(notes_text(notes, i)) for i in range(len(notes))]


# The networks


def test_the_published_shapes_have_the_published_number_of_parameters() -> None:
    def count(name: str) -> int:
        return sum(int(np.prod(shape)) for shape in music_shapes(kind(name), Size()).values())

    assert count("M3") == 92_334_336  # as the training logs of M3 and CLaMP 3 have it
    assert count("CLaMP 2") == count("CLaMP 3") == 92_334_336 + 768 * 768 + 768
    assert len(music_shapes(kind("M3"), Size())) == 201


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_bert(name: str, tmp_path: Path, clips: NoteBatch) -> None:
    reader = MusicReader(write_small_clamp(tmp_path / "weights.pth", name))
    assert (reader.kind, reader.random) == (name, True)
    state = random_state(kind(name), small(name), 0)
    expected = torch.stack([bert_vector(state, kind(name), small(name), table) for table in tables(clips)]).numpy()
    np.testing.assert_allclose(reader.read(clips), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[3]).max() > 0.01  # other music, another vector


@pytest.mark.parametrize("name", NAMES)
def test_long_pieces_are_averaged_over_segments(name: str, tmp_path: Path) -> None:
    reader = MusicReader(write_small_clamp(tmp_path / "weights.pth", name))
    rng = np.random.default_rng(0)
    table = rng.integers(1, 128, (1100, 64)).astype(np.uint8)
    state, size = random_state(kind(name), small(name), 0), small(name)
    whole = [bert_vector(state, kind(name), size, table[at : at + 512]).numpy() for at in (0, 512)]
    if name == "M3":
        last = hidden_states(reader, table[-512:])[-76:].mean(0)
    else:
        last = bert_vector(state, kind(name), size, table[-512:]).numpy()
    expected = np.average([*whole, last], axis=0, weights=[512, 512, 76])
    np.testing.assert_allclose(reader.read_patches([table])[0], expected, atol=1e-5)
    exactly_two = np.average(whole, axis=0)
    np.testing.assert_allclose(reader.read_patches([table[:1024]])[0], exactly_two, atol=1e-5)


def hidden_states(reader: MusicReader, table: np.ndarray) -> np.ndarray:
    """Of M3, the hidden state of each patch: differences of sums over the last patches."""
    means = reader.encoder([Segment(table, n) for n in range(1, len(table) + 1)][:76]).numpy()
    sums = means.astype(np.float64) * np.arange(1, 77)[:, None]
    return np.diff(sums, axis=0, prepend=0.0)[::-1]


@pytest.mark.parametrize("name", NAMES)
def test_batches_give_what_single_segments_do(name: str, tmp_path: Path, clips: NoteBatch) -> None:
    weights = read_weights(write_small_clamp(tmp_path / "weights.pth", name))
    reader = MusicReader(tmp_path / "weights.pth")
    single = reader.read(clips)
    reader.encoder = BatchEncoder(weights, torch.device("cpu"), torch.float32)
    np.testing.assert_allclose(reader.read_patches(tables(clips)), single, atol=1e-5)
    reader.encoder = BatchEncoder(weights, torch.device("cpu"), torch.float16)
    half = reader.read_patches(tables(clips))
    cosine = (half * single).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(single, axis=1)
    assert cosine.min() > 0.9999


def test_a_clip_s_vector_does_not_depend_on_its_neighbours(checkpoint: Path, clips: NoteBatch) -> None:
    reader = MusicReader(checkpoint)
    together = reader.read(clips)
    for i in range(len(clips)):
        np.testing.assert_array_equal(reader.read(clips.select([i]))[0], together[i])
    assert reader.read(clips.select([])).shape == (0, SMALL.out)


# The files


def test_a_file_is_read_once_and_then_from_the_cache(checkpoint: Path, own_cache: Path) -> None:
    first = read_weights(checkpoint)
    (kept,) = (own_cache / "clamp").iterdir()
    assert kept.suffix == ".safetensors"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:-1000] + bytes(1000))
    stamp = kept.stat().st_mtime_ns
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_weights(checkpoint)  # another time of change, another file
    checkpoint.write_bytes(content)
    again = read_weights(checkpoint)
    assert again.sha256 == first.sha256
    third = read_weights(checkpoint)
    assert third.state.keys() == first.state.keys()
    assert all(torch.equal(third.state[name], first.state[name]) for name in first.state)
    assert (third.kind, third.size, third.sha256, third.random) == (first.kind, first.size, first.sha256, True)
    assert kept.stat().st_mtime_ns == stamp
    for file in (own_cache / "clamp").iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    assert read_weights(checkpoint).sha256 == first.sha256  # a damaged cache is made anew


def test_without_a_cache_it_works_too(checkpoint: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert read_weights(checkpoint).kind.name == "CLaMP 2"


def test_other_files_are_refused_in_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    def refused(match: str, path: Path = tmp_path / "other.pth") -> None:
        with pytest.raises(UserError, match=match) as error:
            read_weights(path)
        assert "\n" not in str(error.value)

    refused("no weights of CLaMP at", tmp_path / "nowhere.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes()[:-2000])
    refused("not a complete checkpoint")
    other.write_bytes(b"")
    refused("not a complete checkpoint")
    other.write_bytes(pickle.dumps({"model": shutil.rmtree}))
    refused("nothing in it was run")
    torch.save([1, 2], other)
    refused("lacks 'model'")
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, other)
    refused("another model than M3, CLaMP 2 or CLaMP 3")
    content = torch.load(checkpoint, weights_only=True)
    name = "music_model.base.encoder.layer.1.output.dense.bias"

    def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        model = dict(content["model"])
        change(model)
        torch.save({"model": model}, other)

    changed(lambda model: model.pop(name))
    refused(f"{name} is missing")
    changed(lambda model: model.update({name: torch.zeros(7)}))
    refused(f"{name} has the shape")
    changed(lambda model: model.update({name: torch.full((128,), torch.nan)}))
    refused("not finite")
    changed(lambda model: model.update({"music_model.extra": torch.zeros(1)}))
    refused("music_model.extra is unknown")
    changed(lambda model: [model.pop(key) for key in list(model) if "layer" in key])
    refused("no whole checkpoint of CLaMP 2")


def test_what_older_transformers_saved_besides_is_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["music_model.base.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(content, tmp_path / "other.pth")
    assert read_weights(tmp_path / "other.pth").sha256 == read_weights(checkpoint).sha256


# The rewards


@pytest.fixture
def styles(checkpoint: Path, tmp_path: Path) -> Path:
    """Two styles: slow and low, fast and high; two pieces each, three windows a piece."""
    reader, rng = MusicReader(checkpoint), np.random.default_rng(0)
    windows = []
    for style in (0, 1):
        for _ in range(6):
            step, low = (12, 40) if style == 0 else (3, 70)
            windows.append([(i * step, step, int(low + rng.integers(12))) for i in range(24)])
    about = StylesAbout(reader.kind, reader.sha256, "note_on", 10.0, "", ("low", "high"), "made")
    style, piece = np.repeat([0, 1], 6), np.repeat([0, 1, 2, 3], 3)
    RealStyles(about, reader.read(made(windows)), style, piece).save(tmp_path / "styles.safetensors")
    return tmp_path / "styles.safetensors"


def test_rewards_are_cosines_with_centroids(checkpoint: Path, styles: Path, clips: NoteBatch) -> None:
    terms = {"clamp_score": 1.0, "clamp_style": 1.0}
    settings = RewardSettings(terms, clamp_checkpoint=str(checkpoint), clamp_styles=str(styles), clamp_style="high")
    blend = RewardBlend(settings)
    assert not blend.needs_audio
    scores = blend(Clips(clips)).terms
    real, vectors = RealStyles.load(styles), MusicReader(checkpoint).read(clips).astype(np.float64)
    centroids = [real.vectors[real.style == s].astype(np.float64).mean(0) for s in (0, 1)]
    low, high = (vectors @ c / np.linalg.norm(vectors, axis=1) / np.linalg.norm(c) for c in centroids)
    np.testing.assert_allclose(scores["clamp_score"], high, atol=1e-6)
    np.testing.assert_allclose(scores["clamp_style"], high - low, atol=1e-6)
    assert blend.rewards["clamp_score"].reader is blend.rewards["clamp_style"].reader  # loaded once


def test_the_style_a_clip_was_asked_for_is_the_one_that_is_wanted(
    checkpoint: Path, styles: Path, clips: NoteBatch
) -> None:
    asked = Clips(clips)
    object.__setattr__(asked, "asked", ("low", "high", "", "low", ""))
    for name in ("clamp_score", "clamp_style"):
        options = {"checkpoint": checkpoint, "styles": styles}
        low, high = (load_reward(name, **options, style=style)(Clips(clips)) for style in ("low", "high"))
        mixed = load_reward(name, **options, style="high")(asked)
        np.testing.assert_array_equal(mixed, np.where([True, False, False, True, False], low, high))


def test_real_windows_are_likest_their_own_style(styles: Path) -> None:
    real = RealStyles.load(styles)
    unheard = real.likeness_unheard()
    assert (unheard.argmax(axis=1) == real.style).all()
    by_hand = real.vectors[3:6].astype(np.float64).mean(0)
    cosine = real.vectors[0] @ by_hand / np.linalg.norm(real.vectors[0]) / np.linalg.norm(by_hand)
    assert unheard[0, 0] == pytest.approx(cosine, abs=1e-6)
    one_piece = RealStyles(real.about, real.vectors, real.style, real.style)
    assert np.isnan(one_piece.likeness_unheard()[:6, 0]).all()


def test_margins_take_off_the_mean_or_the_largest_of_the_others() -> None:
    likeness, wanted = np.array([[0.9, 0.5, 0.7], [0.9, 0.5, 0.7]]), np.array([0, 1])
    np.testing.assert_allclose(margins(likeness, wanted), [0.3, -0.3])
    np.testing.assert_allclose(margins(likeness, wanted, "max"), [0.2, -0.4])


def test_a_ceiling_holds_what_is_more_like_the_style_than_real_pieces(checkpoint: Path, styles: Path) -> None:
    real = RealStyles.load(styles)
    free, held = (
        load_reward("clamp_style", checkpoint=checkpoint, styles=styles, style="high", ceiling=ceiling)
        for ceiling in (False, True)
    )
    median = np.median(margins(real.likeness_unheard(), real.style)[real.style == 1])
    notes = made([[(i * 3, 3, 70 + i % 12) for i in range(24)], melody(0)])
    values = free(Clips(notes))
    np.testing.assert_allclose(held(Clips(notes)), np.minimum(values, median), atol=1e-6)
    assert (values > median).any()


def test_a_clip_without_notes_has_the_lowest_value(checkpoint: Path, styles: Path, tmp_path: Path) -> None:
    notes = made([[], melody(0)])
    write_with_text(tmp_path / "clamp3.pth", tmp_path / "xlmr")
    rewards = {
        -1.0: load_reward("clamp_score", checkpoint=checkpoint, styles=styles, style="low"),
        -2.0: load_reward("clamp_style", checkpoint=checkpoint, styles=styles, style="low"),
    }
    for lowest, reward in rewards.items():
        empty, played = reward(Clips(notes))
        assert empty == lowest < played
    text = load_reward(
        "clamp_text", checkpoint=tmp_path / "clamp3.pth", prompt="a calm nocturne", text_model=tmp_path / "xlmr"
    )
    assert text(Clips(notes))[0] == -1.0
    assert all("Hacked" in (type(reward).__doc__ or "") for reward in (*rewards.values(), text))


@pytest.mark.parametrize("name", ["CLaMP 2", "CLaMP 3"])
def test_likeness_to_a_text_is_the_cosine_of_both_encoders(name: str, tmp_path: Path, clips: NoteBatch) -> None:
    network = write_with_text(tmp_path / "weights.pth", tmp_path / "xlmr", name)
    settings = RewardSettings(
        {"clamp_text": 1.0},
        clamp_checkpoint=str(tmp_path / "weights.pth"),
        clamp_prompt="a calm\nnocturne for piano",
        clamp_text_model=str(tmp_path / "xlmr"),
    )
    scores = RewardBlend(settings)(Clips(clips)).terms["clamp_text"]
    model = torch.load(tmp_path / "weights.pth", weights_only=True)["model"]
    ids = [0, *(WORDS.index(word) for word in ["a", "calm", "nocturne", "for", "piano"]), 2]
    with torch.inference_mode():
        mean = network(torch.tensor([ids])).last_hidden_state.mean(1)
        text = (mean @ model["text_proj.weight"].T + model["text_proj.bias"])[0].numpy()
    music = MusicReader(tmp_path / "weights.pth").read(clips)
    expected = music @ text / np.linalg.norm(music, axis=1) / np.linalg.norm(text)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_what_rewards_lack_is_said_in_one_sentence(
    checkpoint: Path, styles: Path, tmp_path: Path, clips: NoteBatch
) -> None:
    def refused(match: str, name: str, **options: object) -> None:
        with pytest.raises(UserError, match=match):
            load_reward(name, **options)

    style = {"checkpoint": checkpoint, "styles": styles, "style": "low"}
    refused("no style 'jazz'.*low, high", "clamp_style", **(style | {"style": "jazz"}))
    with pytest.raises(UserError, match=r"names no style.*low, high"):
        load_reward("clamp_score", **(style | {"style": ""}))(Clips(clips))
    refused("names no weights", "clamp_score", **(style | {"checkpoint": ""}))
    refused("fastsmart style-stats", "clamp_score", **(style | {"styles": tmp_path / "none"}))
    refused("does not hold real styles", "clamp_score", **(style | {"styles": checkpoint}))
    other = write_small_clamp(tmp_path / "other.pth", seed=1)
    refused("made with other weights", "clamp_style", **(style | {"checkpoint": other}))
    real = RealStyles.load(styles)
    about = StylesAbout(**{**vars(real.about), "styles": ("low",)})
    low = real.style == 0
    RealStyles(about, real.vectors[low], real.style[low], real.piece[low]).save(tmp_path / "one.safetensors")
    refused("holds one", "clamp_style", **(style | {"styles": tmp_path / "one.safetensors"}))
    m3 = write_small_clamp(tmp_path / "m3.pth", "M3")
    refused(r"no encoder of text \(M3\)", "clamp_text", checkpoint=m3, prompt="calm", text_model=tmp_path)
    refused("needs a text", "clamp_text", checkpoint=checkpoint, prompt=" ")
    write_with_text(tmp_path / "text.pth", tmp_path / "xlmr")
    write_with_text(tmp_path / "wider.pth", tmp_path / "wide", width=128)
    refused("does not fit", "clamp_text", checkpoint=tmp_path / "text.pth", prompt="calm", text_model=tmp_path / "wide")


def test_settings_refuse_what_is_no_choice() -> None:
    with pytest.raises(UserError, match="clamp_others"):
        RewardSettings(clamp_others="all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="clamp_writer"):
        RewardSettings(clamp_writer="off")  # type: ignore[arg-type]


@pytest.mark.slow
def test_vectors_of_the_published_shape_are_those_of_bert(tmp_path: Path, clips: NoteBatch) -> None:
    reader = MusicReader("random")
    state = random_state(kind("CLaMP 2"), Size(), 0)
    expected = torch.stack([bert_vector(state, kind("CLaMP 2"), Size(), table) for table in tables(clips)]).numpy()
    np.testing.assert_allclose(reader.read(clips), expected, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_hears_what_a_cpu_does(clips: NoteBatch) -> None:
    slow, fast = (MusicReader("random", device).read(clips).astype(np.float64) for device in ("cpu", "cuda"))
    cosine = (slow * fast).sum(1) / np.linalg.norm(slow, axis=1) / np.linalg.norm(fast, axis=1)
    assert cosine.min() > 0.999
