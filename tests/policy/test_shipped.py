"""The policy in the package: small enough to ship, and it plays music."""

import json
import re

import numpy as np
import pytest
import torch
from decode_parity import assert_decodes_as_miditok
from safetensors.torch import load_file
from token_sources import garbage

import fastsmart as fs
from fastsmart.music.features import features
from fastsmart.policy.hf_format import shipped_file, shipped_policies
from fastsmart.sampling import sample
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.settings import PromptSettings

SETTINGS = PromptSettings(time_signatures=("4/4",), tempo_min=60, tempo_max=150)


@pytest.fixture(scope="module", params=shipped_policies())
def shipped(request):
    return request.param


@pytest.fixture(scope="module")
def rollout(shipped):
    policy = fs.load_policy(shipped)
    return sample(policy, make_prompts(SETTINGS, policy.vocab, "test", 0, 32), group=20, max_tokens=80)


def test_it_is_sixteen_bit_small_and_comes_with_a_card(shipped):
    weights = shipped_file(shipped, "model.safetensors")
    assert weights.stat().st_size <= 12_000_000
    assert {t.dtype for t in load_file(weights).values()} == {torch.float16}
    card = shipped_file(shipped, "README.md").read_text()
    assert all(text in card for text in ("**Data**", "**Licence of the data**", "**Made by**", "**Validation loss**"))
    assert json.loads(shipped_file(shipped, "typicality.json").read_text())["pieces"] > 100


def test_it_plays_in_key_all_the_time_and_within_the_range_of_real_pieces(rollout, vocab, shipped):
    notes = decode(rollout.sequences(), vocab, 10.0)
    table = features(notes)
    assert (notes.counts > 0).all()
    card = shipped_file(shipped, "README.md").read_text()
    real = float(re.search(r"scale consistency \|[^|]*\| ([0-9.]+)", card).group(1))  # of its own real pieces
    assert real > 0.9
    assert np.nanmean(table["scale_consistency"]) > real - 0.05  # random pitches have about 0.7
    assert 2 < np.nanmean(table["notes_per_second"]) < 12
    assert np.nanmean(table["empty_beat_rate"]) < 0.05
    typicality = fs.load_reward("typicality", statistics=shipped_file(shipped, "typicality.json"))
    noise = decode(garbage(vocab, 100, 300, seed=0), vocab, 10.0)
    assert typicality(fs.Clips(notes)).mean() > typicality(fs.Clips(noise)).mean() + 1.0
    music = [i for kind in ("Pitch", "Velocity", "Duration") for i in vocab.ids_of(kind)]
    drawn = sum(np.isin(rollout.ids[i, :n], music).sum() for i, n in enumerate(rollout.lengths))
    assert 3 * decode(rollout.sequences(), vocab).counts.sum() / drawn > 0.95


def test_what_it_plays_decodes_as_miditok_decodes_it(rollout, vocab):
    assert_decodes_as_miditok(list(rollout.sequences()), vocab)


def test_the_python_face_is_what_the_readme_says(tmp_path, soundfont):
    vocab = fs.load_vocabulary("smart")
    policy = fs.load_policy("pop909-tiny")
    assert not policy.training
    prompts = fs.prompts.procedural(vocab, 2, seed=0)
    rollout = fs.sample(policy, prompts, group=2, max_tokens=60, temperature=1.0, seed=0, engine="native")
    notes = fs.decode(rollout.sequences(), vocab, max_seconds=10.0)
    notes.to_midi(0, tmp_path / "first.mid")
    audio = fs.render(notes, soundfont=soundfont, backend="fluidsynth", sample_rate=16000)
    audio.to_wav(0, tmp_path / "first.wav")
    scores = fs.load_reward("consonance")(fs.Clips(notes=notes, audio=audio))
    assert scores.shape == (4,)
    assert scores.dtype == np.float32
    run = fs.train(
        fs.Config(
            reward=fs.presets.demo().reward.__class__(terms={"variety": 1.0}),
            train=fs.presets.demo().train.__class__(steps=1, prompts=1, eval_prompts=2, listen=1),
            sampling=fs.presets.demo().sampling.__class__(group=2, max_tokens=30),
        ),
        out=tmp_path / "run",
    )
    assert run.step == 1
