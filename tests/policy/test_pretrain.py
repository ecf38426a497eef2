"""Pre-training: rows that read like prompts, a loss that falls, and resuming as if nothing had happened."""

import json

import numpy as np
import pytest
import torch
from token_sources import write_piece

from fastsmart.errors import UserError
from fastsmart.machine.signals import StopRequest
from fastsmart.policy.crops import IGNORED, Cropper, CropSettings, ngram_losses, targets
from fastsmart.policy.pretrain import PretrainSettings, evaluate, pretrain, split_pieces
from fastsmart.policy.transformer import PolicySize
from fastsmart.tokens.dataset import encode_folder
from fastsmart.tokens.decode import decode


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, vocab):
    root = tmp_path_factory.mktemp("pretrain")
    (root / "midi").mkdir()
    for seed in range(12):
        write_piece(root / "midi" / f"{seed:02d}.mid", seed)
    return encode_folder(root / "midi", root / "data", vocab)


def small(**changes) -> PretrainSettings:
    crop = CropSettings(length=64)
    plain = {"steps": 30, "batch": 8, "warmup": 2, "eval_every": 10, "valid_rows": 8, "valid_share": 0.2, "crop": crop}
    return PretrainSettings(**(plain | changes))


SIZE = PolicySize(413, hidden_size=32, intermediate_size=64, num_layers=2)


def test_rows_begin_like_prompts_and_play_the_piece_they_are_cut_from(dataset):
    vocab = dataset.vocab
    cropper = Cropper(dataset, np.arange(len(dataset)), CropSettings(length=120, bos_share=0.0))
    rows = cropper.rows(np.random.default_rng(0), 200, augment=False)
    whole = [set(zip(n.pitch.tolist(), n.velocity.tolist(), strict=True)) for n in _pieces(dataset)]
    for row in rows:
        head = [vocab.tokens[i].split("_")[0] for i in row[:4]]
        assert head == ["Bar", "TimeSig", "Position", "Tempo"]
        assert vocab.tokens[row[2]] == "Position_0"
        notes = decode([row[row != vocab.pad_id]], vocab)
        played = set(zip(notes.pitch.tolist(), notes.velocity.tolist(), strict=True))
        assert played
        assert any(played <= piece for piece in whole)
    ended = (rows == vocab.eos_id).any(1)
    assert ended.any()
    assert not ended.all()


def _pieces(dataset):
    notes = decode([dataset.piece(p) for p in range(len(dataset))], dataset.vocab)
    return [notes.select([p]) for p in range(len(dataset))]


def test_transposition_moves_every_pitch_of_a_row_alike_and_stays_on_the_keyboard(dataset):
    pieces = np.arange(len(dataset))
    settings = CropSettings(length=120, bos_share=0.0, transpose_down=60, transpose_up=60)
    rng = np.random.default_rng
    cropper = Cropper(dataset, pieces, settings)
    low, high = cropper.pitch_low, cropper.pitch_high
    moves = set()
    for seed in range(60):
        # the first draw chooses the bar, so the same seed gives the same row with and without moving it
        moved, plain = cropper.rows(rng(seed), 1)[0], cropper.rows(rng(seed), 1, augment=False)[0]
        pitch = (plain >= low) & (plain <= high)
        assert (moved[~pitch] == plain[~pitch]).all()
        difference = set((moved - plain)[pitch].tolist())
        assert len(difference) == 1
        moves |= difference
        assert moved[pitch].min() >= low
        assert moved[pitch].max() <= high
    assert min(moves) < -6
    assert max(moves) > 6


def test_padding_is_no_target(dataset):
    cropper = Cropper(dataset, np.arange(len(dataset)), CropSettings(length=4000))
    rows = cropper.rows(np.random.default_rng(0), 2)
    _, target = targets(rows, cropper.pad)
    assert (target[rows[:, 1:] == cropper.pad] == IGNORED).all()
    assert (rows == cropper.pad).any()


def test_ngram_losses_are_those_of_counting():
    train = [np.array([0, 1, 0, 1, 2])]
    rows = np.array([[0, 1, 3]])  # 3 is padding: one real target
    losses = ngram_losses(train, rows, 4, pad=3)
    # add-one counts: after 0 come 1 twice, so (2 + 1) / (2 + 4); token 1 is seen 2 + 1 times of 5 + 4
    assert losses["bigram"] == pytest.approx(-np.log(3 / 6))
    assert losses["unigram"] == pytest.approx(-np.log(3 / 9))


def test_the_loss_falls_below_the_unigram_and_the_run_folder_is_complete(dataset, tmp_path):
    lines = []
    settings = small(steps=60, learning_rate=1e-2)
    result = pretrain(dataset, SIZE, settings, tmp_path / "run", report=lines.append)
    assert result.step == 60
    assert result.best < result.baselines["unigram"]
    written = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [10, 20, 30, 40, 50, 60]
    assert min(line["valid_loss"] for line in written) == result.best
    assert len(lines) == 60
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    _, valid = split_pieces(len(dataset), settings.valid_share, settings.seed)
    rows = Cropper(dataset, valid, settings.crop).rows(np.random.default_rng([0, 0]), 8, augment=False)
    assert evaluate(result.policy, rows, dataset.vocab.pad_id) == pytest.approx(result.best, rel=1e-6)


def test_stopped_and_resumed_it_ends_with_the_weights_of_one_never_stopped(dataset, tmp_path):
    whole = pretrain(dataset, SIZE, small(), tmp_path / "whole")
    stop = StopRequest()

    def stop_at_13(line) -> None:
        stop.signal_number = 15 if line["step"] == 13 else 0

    pretrain(dataset, SIZE, small(), tmp_path / "cut", stop=stop, report=stop_at_13)
    with pytest.raises(UserError, match="add --resume"):
        pretrain(dataset, SIZE, small(), tmp_path / "cut")
    with pytest.raises(UserError, match="started with other settings"):
        pretrain(dataset, SIZE, small(batch=4), tmp_path / "cut", resume=True)
    cut = pretrain(dataset, SIZE, small(), tmp_path / "cut", resume=True)
    assert cut.best == whole.best
    assert all(torch.equal(a, b) for a, b in zip(cut.policy.parameters(), whole.policy.parameters(), strict=True))


def test_early_stopping_keeps_the_best(dataset, tmp_path):
    settings = small(steps=200, learning_rate=0.3, eval_every=5, patience=2)  # diverges soon
    result = pretrain(dataset, SIZE, settings, tmp_path / "run")
    assert result.stopped_early
    assert result.step < 200
    losses = [json.loads(x)["valid_loss"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.best == min(losses)
    assert len(losses) - 1 - int(np.argmin(losses)) == 2


def test_too_few_pieces_and_nothing_to_resume_are_said(dataset, tmp_path):
    with pytest.raises(UserError, match="too few to keep some for validation"):
        split_pieces(1, 0.05, 0)
    with pytest.raises(UserError, match="nothing to resume"):
        pretrain(dataset, SIZE, small(), tmp_path / "none", resume=True)
