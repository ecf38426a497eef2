"""The Audiobox reward against the upstream package: same random weights, same audio, in the published formats.

The published network has 94 M weights and more. Most tests shrink it by putting a small WavLM configuration where
upstream keeps its own; names, layout of the files and every line of ours and upstream's code stay the same.
"""

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_audiobox import SMALL, write_small_audiobox
from token_sources import write_piece

from fastsmart.audio import AudioBatch, render
from fastsmart.notes import read_midi
from fastsmart.reward import Clips, load_reward
from fastsmart.reward.audiobox import make_random_weights

aes = pytest.importorskip("audiobox_aesthetics.model.aes")

pytestmark = [  # upstream's own
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),
]
RATE = 16_000
AXES = ("CE", "CU", "PC", "PQ")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint of a small network, which upstream then takes for the published one."""
    return write_small_audiobox(tmp_path / "checkpoint.pt", monkeypatch)


@pytest.fixture
def full_size(tmp_path: Path) -> Iterator[Path]:
    path = make_random_weights(tmp_path / "checkpoint.pt")
    yield path
    path.unlink()  # 415 MB


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, AudioBatch], np.ndarray]:
    """Ratings [N, 4] by upstream's own predictor.

    It imports torchaudio, to read files and to resample; at 16 kHz, where torchaudio's resampling returns its input,
    a stand-in for that one function is enough. Its layers draw from numpy's global random state, which is put back.
    """
    torchaudio = types.ModuleType("torchaudio")

    def resample(wav: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
        assert orig_freq == new_freq
        return wav

    torchaudio.functional = types.SimpleNamespace(resample=resample)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "audiobox_aesthetics.infer", raising=False)
    from audiobox_aesthetics.infer import AesPredictor

    predictors: dict[Path, AesPredictor] = {}

    def rate(checkpoint: Path, audio: AudioBatch) -> np.ndarray:
        if checkpoint not in predictors:
            with torch.random.fork_rng():
                predictors[checkpoint] = AesPredictor(checkpoint_pth=str(checkpoint))
        clips = [torch.from_numpy(audio.clip(i).copy())[None] for i in range(len(audio))]
        state = np.random.get_state()  # noqa: NPY002
        rows = predictors[checkpoint].forward([{"path": clip, "sample_rate": audio.sample_rate} for clip in clips])
        np.random.set_state(state)  # noqa: NPY002
        return np.array([[row[axis] for axis in AXES] for row in rows])

    return rate


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, soundfont: Path) -> np.ndarray:
    """Half a minute of piano."""
    path = tmp_path_factory.mktemp("pieces") / "piece.mid"
    write_piece(path, 1, bars=24)
    # not from a bank, into which each of its notes would first be rendered 40 s long
    return render(read_midi(path), soundfont, max_seconds=40.0, backend="fluidsynth", workers=1).clip(0)


def audio_of(clips: list[np.ndarray]) -> AudioBatch:
    lengths = np.array([len(clip) for clip in clips], np.int64)
    samples = np.zeros((len(clips), int(lengths.max())), np.float32)
    for row, clip in zip(samples, clips, strict=True):
        row[: len(clip)] = clip
    return AudioBatch(samples, lengths, RATE)


def ours(reward, audio: AudioBatch) -> np.ndarray:
    # this reward never looks at the notes, so any object of that length stands for them
    ratings = reward.rate(Clips(notes=range(len(audio)), audio=audio))  # type: ignore[arg-type]
    return np.stack([ratings[axis] for axis in AXES], axis=1)


def clip(kind: int, seconds: float, piano: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One clip: piano three times in eight, else silence, clipping, an offset, noise, or tones, loud or faint."""
    t = np.arange(round(seconds * RATE)) / RATE
    tones = sum(np.sin(2 * np.pi * hz * t) for hz in rng.uniform(50, 4000, 3)) / 3
    start = rng.integers(len(piano) // 2)
    played = np.resize(piano[start:], len(t))
    made = [
        np.zeros_like(t),
        np.clip(20 * played, -1, 1),
        0.3 + 0.1 * tones,
        rng.uniform(1e-4, 1) * rng.normal(size=len(t)),
        rng.uniform(1e-4, 1) * tones,
        *[rng.uniform(0.01, 1) * played] * 3,
    ]
    return made[kind % len(made)].astype(np.float32)


def some_clips(count: int, longest_s: float, piano: np.ndarray) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    return [clip(i, float(np.exp(rng.uniform(np.log(0.3), np.log(longest_s)))), piano, rng) for i in range(count)]


def test_ratings_agree_with_upstreams_predictor(small: Path, upstream: Callable, rendered: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    edges = [1, 399, 400, 401, 720, 159_679, 159_680, 159_681, 159_999, 160_000, 160_001, 376_000]
    clips = some_clips(12, 37.0, rendered) + [clip(5, n / RATE, rendered, rng) for n in edges]
    audio = audio_of(clips)
    expected = upstream(small, audio)
    assert np.ptp(expected[4:], axis=0).min() > 0.1  # the clips are told apart, so agreement means something
    np.testing.assert_allclose(ours(load_reward("audiobox", checkpoint=small), audio), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_forward_for_gpus_agrees_too(small: Path, upstream: Callable, rendered: np.ndarray, dtype: str) -> None:
    """Run on the CPU, with the torch twins of its kernels."""
    from fastsmart.reward.audiobox import gpu

    audio = audio_of(some_clips(6, 15.0, rendered))
    expected = upstream(small, audio)
    reward = load_reward("audiobox", checkpoint=small, dtype="bfloat16" if dtype == "float32" else dtype)
    if dtype == "float32":
        from fastsmart.reward.audiobox.encoder import encoder_weights
        from fastsmart.reward.audiobox.weights import read_weights

        weights = encoder_weights(read_weights(small).state)
        reward.encoder = gpu.BatchEncoder(weights, torch.device("cpu"), torch.float32, 3, reward.heads)
    np.testing.assert_allclose(ours(reward, audio), expected, atol=2e-5 if dtype == "float32" else 0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_agrees_on_a_gpu(full_size: Path, upstream: Callable, rendered: np.ndarray, dtype: str) -> None:
    """Batches of several sizes, so that graphs are recorded, padded and replayed."""
    audio = audio_of(some_clips(13, 37.0, rendered))
    reward = load_reward("audiobox", checkpoint=full_size, dtype=dtype, device="cuda", batch_size=8)
    expected = upstream(full_size, audio)
    np.testing.assert_allclose(ours(reward, audio), expected, atol=0.02)
    np.testing.assert_allclose(ours(reward, audio_of([audio.clip(5)])), expected[5:6], atol=0.02)


def test_it_agrees_at_full_size(full_size: Path, upstream: Callable, rendered: np.ndarray) -> None:
    audio = audio_of([rendered[:40_000], rendered[:164_000]])
    expected = upstream(full_size, audio)
    np.testing.assert_allclose(ours(load_reward("audiobox", checkpoint=full_size), audio), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_agrees_at_full_size_on_two_hundred_clips(
    full_size: Path, upstream: Callable, rendered: np.ndarray, record_property: Callable
) -> None:
    clips = some_clips(200, 37.0, rendered)
    reward = load_reward("audiobox", checkpoint=full_size)
    pairs = [(upstream(full_size, audio), ours(reward, audio)) for audio in (audio_of([c]) for c in clips)]
    expected, actual = (np.concatenate(column) for column in zip(*pairs, strict=True))
    for axis, error in zip(AXES, np.abs(actual - expected).max(0), strict=True):
        record_property(f"max_abs_difference_{axis}", f"{error:.2e}")
        print(f"{axis} {error:.2e}")
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_upstream_reads_our_safetensors(small: Path, upstream: Callable, rendered: np.ndarray) -> None:
    folder = small.parent / "hub"
    make_random_weights(folder / "model.safetensors", size=SMALL)
    model = aes.AesMultiOutput.from_pretrained(str(folder))
    expected = torch.load(small, weights_only=True)["state_dict"]
    assert {f"model.{key}" for key in model.state_dict()} == set(expected)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"model.{key}"]), key
