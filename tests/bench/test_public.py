"""The public pipeline that benchmarks measure against does what it says, at toy size."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_audiobox import write_small_audiobox
from tiny_soundfont import write_soundfont

pytest.importorskip("trl", reason="TRL is a development dependency: pip install -e .[dev]")
from peers import public

from fastsmart.audio.resample import resample
from fastsmart.tokens.prompts import procedural
from fastsmart.tokens.vocabulary import Vocabulary

pytestmark = [  # upstreams' own
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]
GROUP, TOKENS, STEPS = 2, 16, 2


@pytest.fixture(scope="module")
def synth(tmp_path_factory: pytest.TempPathFactory) -> public.Synth:
    return public.Synth(write_soundfont(tmp_path_factory.mktemp("font") / "tiny.sf2"))


def piece(vocab: Vocabulary, notes: int) -> list[int]:
    """Notes on the beats of 4/4, 60 a minute, each a beat long."""
    words = ["Bar_None", "TimeSig_4/4", "Position_0", "Tempo_60.0"]
    for i in range(notes):
        words += ["Bar_None"] * (i % 4 == 0 and i > 0)
        words += [f"Position_{12 * (i % 4)}", f"Pitch_{60 + i % 12}", "Velocity_99", "Duration_1.0.12"]
    return [vocab.id(word) for word in words]


def prompts_of(vocab: Vocabulary) -> list[np.ndarray]:
    prompts = procedural(vocab, 2 * STEPS, seed=0).tokens
    return [prompts.row(i) for i in range(len(prompts))]


def test_its_steps_train_on_what_it_drew_rendered_and_scored(
    vocab: Vocabulary, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, seen = defaultdict(float), []
    audiobox = write_small_audiobox(tmp_path / "checkpoint.pt", monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scored = public.public_reward(write_soundfont(tmp_path / "tiny.sf2"), audiobox, vocab.tokenizer, seconds)

    def reward(pieces):
        seen.append((pieces, scored(pieces)))
        return seen[-1][1]

    prompts = prompts_of(vocab)
    trainer = public.PublicTrainer(
        checkpoint, prompts, STEPS, reward, seconds, group=GROUP, max_tokens=TOKENS, gradient_checkpointing=False
    )
    before = [p.detach().clone() for p in trainer.trainer.model.parameters()]
    steps = [trainer.step() for _ in range(STEPS)]
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.trainer.model.parameters(), strict=True))
    trainer.close()
    for number, (times, (pieces, scores)) in enumerate(zip(steps, seen, strict=True)):
        assert set(times) == {*public.STAGES, "whole"}
        assert min(times.values()) > 0
        assert sum(times[stage] for stage in public.STAGES) == pytest.approx(times["whole"])
        assert [len(ids) for ids in pieces] == [4 + TOKENS] * 2 * GROUP  # no token ends a piece
        asked = [list(prompt) for prompt in prompts[2 * number : 2 * number + 2] for _ in range(GROUP)]
        assert [ids[:4] for ids in pieces] == asked
        assert np.isfinite(scores).all()


def test_its_update_can_be_measured_alone(vocab: Vocabulary, checkpoint: Path) -> None:
    completions = [[vocab.id("Bar_None")] * TOKENS, [vocab.id("Pitch_60")] * TOKENS] * GROUP
    seen = []

    def reward(pieces):
        seen.extend(ids[4:] for ids in pieces)
        return [float(i) for i in range(len(pieces))]

    trainer = public.PublicTrainer(
        checkpoint, prompts_of(vocab), STEPS, reward, defaultdict(float), group=GROUP, completions=completions
    )
    assert set(trainer.step()) == {"update", "whole"}
    trainer.close()
    assert seen == completions


def test_what_goes_wrong_in_training_is_raised(vocab: Vocabulary, checkpoint: Path) -> None:
    def reward(pieces):
        raise ArithmeticError("no")

    trainer = public.PublicTrainer(
        checkpoint, prompts_of(vocab), STEPS, reward, defaultdict(float), group=GROUP, max_tokens=2
    )
    with pytest.raises(ArithmeticError):
        trainer.step()
    trainer.close()


def test_a_clip_is_as_long_as_its_score_and_cut_at_ten_seconds(synth: public.Synth, vocab: Vocabulary) -> None:
    four, many, none = (public.decode_midi(vocab.tokenizer, piece(vocab, notes)) for notes in (4, 16, 0))
    for score, length in ((four, 4.0), (many, 10.0), (none, 1.0)):
        clip = synth.render_clip(score)
        assert clip.shape == (2, round(length * public.SYNTH_HZ))
        assert np.abs(clip).max() == pytest.approx(0 if score is none else 1, abs=1e-3)


def test_nothing_of_the_clip_before_is_heard(synth: public.Synth, vocab: Vocabulary) -> None:
    first, other = (public.decode_midi(vocab.tokenizer, piece(vocab, notes)) for notes in (4, 7))
    alone = synth.render_clip(first)
    synth.render_clip(other)
    np.testing.assert_array_equal(synth.render_clip(first), alone)


def test_the_stand_in_for_torchaudio_resamples_as_ours_does() -> None:
    wav = np.random.default_rng(0).normal(size=(2, 10_001)).astype(np.float32)
    ours = np.stack([resample(channel, 48_000, 16_000) for channel in wav])
    theirs = public._resample(torch.from_numpy(wav), 48_000, 16_000).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
