"""CLAP rewards on a small ClapModel with random weights, saved and loaded as a published one is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastsmart.audio.batch import AudioBatch
from fastsmart.errors import UserError
from fastsmart.reward import Clips, RewardBlend, RewardSettings, load_reward

transformers = pytest.importorskip("transformers")
RATE = 48_000
PROMPTS = ("calm solo piano", "loud rock band")


def make_model(folder: Path, fusion: bool) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *" ".join(PROMPTS).split(),
        "the",
        "sound",
        "is",
        "clear",
        "noisy",
        "clean",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    text = ClapTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
        projection_dim=16,
    )
    audio = ClapAudioConfig(
        hidden_size=32 * 2,
        patch_embeds_hidden_size=8,
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
        projection_dim=16,
        enable_fusion=fusion,
    )
    torch.manual_seed(0)
    model = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=16))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    truncation = "fusion" if fusion else "rand_trunc"
    ClapFeatureExtractor(truncation=truncation).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["unfused", "fused"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("clap"), request.param)


def clips(*seconds: float, rate: int = RATE) -> Clips:
    rng = np.random.default_rng(0)
    lengths = np.array([round(s * rate) for s in seconds], np.int64)
    samples = np.zeros((len(seconds), int(lengths.max())), np.float32)
    for k, length in enumerate(lengths):
        t = np.arange(length) / rate
        samples[k, :length] = 0.3 * np.sin(2 * np.pi * 200 * 2**k * t) + 0.02 * rng.normal(size=length)
    return Clips(range(len(seconds)), AudioBatch(samples, lengths, rate))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def by_transformers(model: Path) -> np.ndarray:
    """Cosines of clips of 1, 2 and 3 s with the prompts as transformers' own forward gives them, [3, 2]."""
    loaded = transformers.ClapModel.from_pretrained(model).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(model)(list(PROMPTS), padding=True, return_tensors="pt")
    extractor = transformers.ClapFeatureExtractor.from_pretrained(model)
    audio = clips(1.0, 2.0, 3.0).audio
    cosines = []
    for i in range(3):
        features = extractor(audio.clip(i), sampling_rate=RATE, return_tensors="pt")
        with torch.no_grad():
            out = loaded(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                input_features=features["input_features"].float(),
                is_longer=torch.zeros(1, 1, dtype=torch.bool),
            )
        cosines.append((out.logits_per_audio[0] / loaded.logit_scale_a.exp()).detach().numpy())
    return np.array(cosines)


def test_similarity_is_transformers_cosine(model: Path, by_transformers: np.ndarray) -> None:
    for k, prompt in enumerate(PROMPTS):
        values = load_reward("clap_similarity", model=model, prompt=prompt)(clips(1.0, 2.0, 3.0))
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, by_transformers[:, k], atol=1e-5)
    assert np.ptp(by_transformers) > 1e-3


def test_classes_and_pairs_are_softmaxes_of_it(model: Path, by_transformers: np.ndarray) -> None:
    logits = by_transformers / 0.07  # CLAP's initial temperature
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    batch = clips(1.0, 2.0, 3.0)
    for k, prompt in enumerate(PROMPTS):
        values = load_reward("clap_class", model=model, classes=PROMPTS, wanted=prompt)(batch)
        np.testing.assert_allclose(values, expected[:, k], atol=1e-4)
    both = load_reward("pam", model=model, pairs=[PROMPTS, PROMPTS[::-1]])(batch)
    np.testing.assert_allclose(both, 0.5, atol=1e-6)  # the mean of p and 1 - p
    np.testing.assert_allclose(load_reward("pam", model=model, pairs=[PROMPTS])(batch), expected[:, 0], atol=1e-4)


def test_long_clips_are_heard_whole_and_without_chance(model: Path) -> None:
    """transformers' extractor would cut ten seconds out of a longer clip at random."""
    reward = load_reward("clap_similarity", model=model, prompt=PROMPTS[0])
    long = clips(14.0)
    first, last = (
        Clips(range(1), AudioBatch(part[None], np.array([len(part)]), RATE))  # type: ignore[arg-type]
        for part in np.split(long.audio.clip(0), [480_000])
    )
    expected = (10 * reward(first) + 4 * reward(last)) / 14
    np.testing.assert_allclose(reward(long), expected, atol=1e-6)
    np.testing.assert_array_equal(reward(long), reward(long))


def test_odd_clips_and_other_rates(model: Path) -> None:
    batch = clips(0.5, 0.0, 0.5, 1 / RATE)
    batch.audio.samples[2, 5] = np.nan
    values = load_reward("clap_similarity", model=model, prompt=PROMPTS[0])(batch)
    np.testing.assert_array_equal(np.isnan(values), [False, False, True, False])
    assert values[1] == -1.0
    assert np.isfinite(load_reward("pam", model=model)(clips(0.5, rate=16_000))).all()


def test_a_run_names_its_model_and_texts(model: Path) -> None:
    settings = RewardSettings(
        terms={"clap_similarity": 1.0, "clap_class": 1.0, "pam": 1.0},
        clap_model=str(model),
        clap_prompt=PROMPTS[0],
        clap_classes=PROMPTS,
        clap_class=PROMPTS[1],
    )
    assert set(RewardBlend(settings)(clips(0.5)).terms) == {"clap_similarity", "clap_class", "pam"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clap_model": ""}, "reward.clap_model names no model"),
        ({"clap_model": "nowhere/at/all"}, "cannot load a ClapModel .* from nowhere/at/all"),
        ({"clap_prompt": " "}, "reward.clap_prompt needs a text"),
        ({"terms": {"clap_class": 1.0}}, "reward.clap_classes needs a text"),
        ({"terms": {"clap_class": 1.0}, "clap_classes": PROMPTS, "clap_class": "jazz"}, "reward.clap_class is 'jazz'"),
    ],
)
def test_what_is_missing_is_said(model: Path, change: dict, says: str) -> None:
    settings = {"terms": {"clap_similarity": 1.0}, "clap_model": str(model), "clap_prompt": PROMPTS[0]} | change
    with pytest.raises(UserError, match=says):
        RewardBlend(RewardSettings(**settings))
