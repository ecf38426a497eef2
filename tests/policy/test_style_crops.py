"""Rows with styles: who is named how often, and that the source of a piece cannot be told from them."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from styled_pieces import STYLES, write_styled
from tiny_policy import make_policy
from token_sources import synthetic_pieces

from fastsmart.errors import UserError
from fastsmart.machine.signals import StopRequest
from fastsmart.policy.crops import CropSettings
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.policy.pretrain import PretrainSettings, evaluate, pretrain
from fastsmart.policy.style_crops import StyleCropper, StyleSettings, evened
from fastsmart.policy.style_tokens import _nats_of_rows, learn_style_tokens
from fastsmart.policy.transformer import PolicySize
from fastsmart.tokens.dataset import encode_folder, encode_midi
from fastsmart.tokens.decode import decode
from fastsmart.tokens.grid import on_grid
from fastsmart.tokens.labels import read_labels
from fastsmart.tokens.token_batch import TokenBatch

SIZE = PolicySize(413, hidden_size=32, intermediate_size=64, num_layers=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, vocab):
    """(encoded dataset, labels): marches in a manifest, by two composers, and a folder of drones."""
    root = tmp_path_factory.mktemp("styles")
    write_styled(root / "midi")
    with open(root / "midi" / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["style", "path", "composer", "split"])
        for i in range(10):
            split = "valid" if i == 8 else "test" if i == 9 else "train"
            writer.writerow(["march", f"march/{i:02d}.mid", "Sousa, John" if i else "Nobody", split])
    dataset = encode_folder(root / "midi", root / "data", vocab)
    manifests = [str(root / "midi" / "manifest.csv"), f"drone={root / 'midi' / 'drone'}"]
    labels = read_labels(manifests, dataset.files, dataset.source, 0.2, 0)
    styles = replace(labels.named(), composers=(("Sousa, John", "INF3_None", "march"),))  # of seven pieces in training
    return evened(dataset, styles), labels


def cropper(corpus, split="train", **changes):
    dataset, labels = corpus
    settings = StyleSettings(**changes)
    return StyleCropper(dataset, labels, dataset.vocab.styles, labels.pieces(split), CropSettings(length=96), settings)


def test_labels_say_style_composer_and_split(corpus):
    labels = corpus[1]
    assert set(labels.style) == set(STYLES)
    assert labels.pieces("train", "march").tolist() == list(range(10, 18))
    assert labels.pieces("valid", "march").tolist() == [18]
    assert labels.pieces("test", "march").tolist() == [19]
    assert [len(labels.pieces(split, "drone")) for split in ("train", "valid", "test")] == [8, 1, 1]
    assert labels.composer[10:12] == ("Nobody", "Sousa, John")
    assert labels.named().styles == (("drone", "INF1_None"), ("march", "INF2_None"))


def test_rows_are_balanced_and_one_in_seven_has_no_style(corpus):
    vocab = corpus[0].vocab
    rows = cropper(corpus).rows(np.random.default_rng(0), 3000)
    styled = rows[:, 0] == vocab.bos_id
    named = np.isin(rows[:, 1], [vocab.id("INF1_None"), vocab.id("INF2_None")]) & styled
    # 0.15 without a style, and a tenth of those with BOS nevertheless
    assert abs(named.mean() - 0.85) < 0.02
    assert abs((styled & ~named).mean() - 0.015) < 0.01
    march = (rows[:, 1] == vocab.id("INF2_None")) & named
    assert abs(march.sum() / named.sum() - 0.5) < 0.05
    # two composers, one of one piece and one of seven: by the square root of their bars; one has a token
    share = 7**0.5 / (1 + 7**0.5)
    assert abs((rows[march, 2] == vocab.id("INF3_None")).mean() - share / 2) < 0.05
    bar = vocab.id("Bar_None")
    first = np.argmax(rows == bar, axis=1)
    assert set(first.tolist()) == {0, 1, 2, 3}


def test_validation_rows_always_have_their_style_and_the_piece_s_own_pitches(corpus):
    dataset, labels = corpus
    vocab = dataset.vocab
    valid = cropper(corpus, "valid")
    rows = valid.rows_of("march", np.random.default_rng(1), 50)
    assert (rows[:, :2] == [vocab.bos_id, vocab.id("INF2_None")]).all()
    own = set(decode([dataset.piece(int(labels.pieces("valid", "march")[0]))], vocab).pitch.tolist())
    assert set(decode(TokenBatch.pack(list(rows)), vocab).pitch.tolist()) <= own


def test_velocity_and_tempo_of_a_row_say_nothing_of_its_style(corpus):
    vocab = corpus[0].vocab
    train = cropper(corpus)
    means, spreads, tempi = [], [], []
    for style in STYLES:
        rows = train.rows_of(style, np.random.default_rng(2), 600)
        notes = decode(TokenBatch.pack(list(rows)), vocab)
        top = np.append(np.diff(notes.onset_tick) != 0, True)  # of a chord the highest note is louder than the others
        by_row = [notes.velocity[notes.rows(i)][top[notes.rows(i)]].astype(float) for i in range(len(notes))]
        means.append(np.mean([v.mean() for v in by_row]))
        spreads.append(np.mean([v.std() for v in by_row]))
        tempi.append(np.log(notes.tempo_bpm).mean())
    assert abs(means[0] - means[1]) < 3
    assert abs(spreads[0] - spreads[1]) < 1.5
    assert abs(tempi[0] - tempi[1]) < 0.06
    assert min(spreads) > 5


def test_a_score_stays_as_it_is_on_the_grid_and_what_is_played_comes_back_to_it(vocab, tmp_path):
    write_styled(tmp_path / "midi", pieces=3)
    random = np.random.default_rng(0)
    for path in sorted((tmp_path / "midi").rglob("*.mid")):
        score = encode_midi(path, vocab).astype(np.int64)
        assert np.array_equal(on_grid(score, vocab), score)
        position = np.isin(score, vocab.ids_of("Position")) & (score > vocab.id("Position_0"))
        played = score.copy()
        # a twelfth early or late, but never onto the next position
        played[position] += random.integers(-1, 2, position.sum())
        assert not np.array_equal(played, score)
        notes, straight = (decode([on_grid(ids, vocab)], vocab) for ids in (played, score))
        phases = set((notes.onset_tick * 12 // notes.ticks_per_beat % 12).tolist())
        assert phases <= {0, 3, 4, 6, 8, 9}  # alone in a beat, a late sixteenth may be an early triplet
        if path.parent.name == "march":
            assert np.array_equal(notes.onset_tick, straight.onset_tick)
            assert np.array_equal(notes.pitch, straight.pitch)


def test_the_grid_keeps_bars_tempi_and_notes_of_any_piece(vocab, tmp_path):
    for ids in synthetic_pieces(vocab, 8, tmp_path, seed=3):
        moved = on_grid(ids, vocab)
        assert np.array_equal(on_grid(moved, vocab), moved)
        before, after = decode([ids], vocab), decode([moved], vocab)
        assert np.array_equal(before.meter_tick, after.meter_tick)
        assert np.array_equal(before.tempo_tick, after.tempo_tick)
        assert np.array_equal(before.tempo_bpm, after.tempo_bpm)
        kept = {(int(p), int(v)) for p, v in zip(after.pitch, after.velocity, strict=True)}
        assert kept <= {(int(p), int(v)) for p, v in zip(before.pitch, before.velocity, strict=True)}
        assert after.counts[0] >= 0.9 * before.counts[0]


def test_pretraining_learns_styles_and_resumes_as_if_nothing_had_happened(corpus, tmp_path, vocab):
    dataset, labels = corpus
    settings = PretrainSettings(
        steps=24, batch=8, warmup=2, learning_rate=1e-2, eval_every=12, valid_rows=8, crop=CropSettings(length=64)
    )
    whole = pretrain(dataset, SIZE, settings, tmp_path / "whole", labels=labels)
    stop = StopRequest()

    def stop_at_13(line) -> None:
        stop.signal_number = 15 if line["step"] == 13 else 0

    pretrain(dataset, SIZE, settings, tmp_path / "cut", stop=stop, report=stop_at_13, labels=labels)
    with pytest.raises(UserError, match="started with other"):
        pretrain(dataset, SIZE, replace(settings, styles=StyleSettings(temperature=1.0)), tmp_path / "cut", True)
    cut = pretrain(dataset, SIZE, settings, tmp_path / "cut", resume=True, labels=labels)
    assert cut.best == whole.best
    assert all(torch.equal(a, b) for a, b in zip(cut.policy.parameters(), whole.policy.parameters(), strict=True))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert all(f'"valid_loss/{style}"' in lines for style in STYLES)
    assert whole.best < whole.baselines["unigram"]
    assert load_policy(tmp_path / "whole").vocab.styles == dataset.vocab.styles


def test_tokens_of_styles_learn_alone_and_tell_the_styles_further_apart(corpus, tmp_path):
    dataset, labels = corpus
    settings = PretrainSettings(
        steps=30, batch=8, warmup=2, learning_rate=1e-2, valid_rows=8, style_steps=25, crop=CropSettings(length=48)
    )
    before = pretrain(dataset, SIZE, settings, tmp_path / "run", labels=labels).policy
    after = learn_style_tokens(before, dataset, labels, settings)
    tokens = [dataset.vocab.id(text) for _, text in dataset.vocab.styles.styles]
    changed = {}
    for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        rows = (p != q).reshape(len(p), -1).any(1).nonzero().ravel().tolist()
        changed |= {name: rows} if rows else {}
    assert changed == {"model.embed_tokens.weight": tokens}
    again = learn_style_tokens(before, dataset, labels, settings)
    assert all(torch.equal(p, q) for p, q in zip(after.parameters(), again.parameters(), strict=True))
    valid = cropper(corpus, "valid")
    rows = np.concatenate([valid.rows_of(style, np.random.default_rng(7), 12) for style in STYLES])
    others = rows.copy()
    others[:, 1] = sum(tokens) - rows[:, 1]  # of two styles the other one
    apart = [evaluate(policy, others, valid.pad) - evaluate(policy, rows, valid.pad) for policy in (before, after)]
    assert apart[1] > apart[0] + 0.01


def test_nats_of_a_row_after_each_style_are_the_policy_s_own(corpus):
    dataset = corpus[0]
    policy, train = make_policy(dataset.vocab), cropper(corpus)
    rows = np.concatenate([train.rows_of(style, np.random.default_rng(5), 1) for style in train.tokens])
    tokens = torch.tensor([token for _, token in train.tokens.values()])
    with torch.no_grad():
        nats, length = _nats_of_rows(policy, rows, tokens, train.pad)
        for i, row in enumerate(rows):
            for j, token in enumerate(tokens):
                ids = torch.from_numpy(row[row != train.pad])
                ids[1] = token
                logprobs = policy(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[1:]
                assert float(nats[i, j]) == pytest.approx(-float(logprobs.sum()), rel=1e-4)
    assert length == int((rows != train.pad).sum()) - 2 * len(rows)


def test_it_begins_with_the_weights_of_a_policy_and_refuses_one_of_other_tokens(corpus, tmp_path, vocab):
    dataset, labels = corpus
    save_policy(make_policy(vocab), tmp_path / "begun")
    settings = PretrainSettings(
        steps=1, batch=1, learning_rate=1e-30, valid_rows=2, init=str(tmp_path / "begun"), crop=CropSettings(length=64)
    )
    found = pretrain(dataset, SIZE, settings, tmp_path / "run", labels=labels).policy
    begun = load_policy(tmp_path / "begun")
    assert found.size == begun.size
    for (_, p), (_, q) in zip(found.named_parameters(), begun.named_parameters(), strict=True):
        assert np.allclose(p.detach().numpy(), q.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("path,kind\n", "has no column style"),
        ("path,style\nmarch/00.mid,\n", "line 2: '' is no name of a style"),
        ("path,style\nmarch/00.mid,a/b\n", "line 2: 'a/b' is no name of a style"),
        ("path,style,split\nmarch/00.mid,a,later\n", "line 2: the split 'later'"),
        ("path,style\nmarch/99.mid,a\n", "names none of the pieces"),
        ("path,style\nmarch/00.mid,a\nmarch/01.mid,a\n", "names a; name at least two styles"),
        ("path,style,split\nmarch/00.mid,a,train\ndrone/00.mid,b,train\n", "a has no piece in the split 'valid'"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(corpus, tmp_path, manifest, said):
    dataset, _ = corpus
    path = tmp_path / "manifest.csv"
    for style in STYLES:
        (tmp_path / style).mkdir()
        for i in range(10):
            (tmp_path / style / f"{i:02d}.mid").touch()
    path.write_text(manifest)
    with pytest.raises(UserError, match=said):
        read_labels([str(path)], dataset.files, str(tmp_path), 0.1, 0)
