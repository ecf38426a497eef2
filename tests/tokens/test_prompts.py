"""Prompts have the promised form, are functions of their number, and what is held out is never trained on."""

import hashlib
import shutil
from collections import Counter

import pytest
from miditok import REMI, TokenizerConfig
from token_sources import write_piece

from fastsmart.errors import UserError
from fastsmart.presets import demo, smart_paper, smart_released
from fastsmart.tokens.dataset import TokenDataset, encode_folder
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import (
    bos,
    describe,
    from_dataset,
    make_prompts,
    procedural,
    procedural_with_note,
)
from fastsmart.tokens.settings import PromptSettings
from fastsmart.tokens.vocabulary import load_vocabulary

SMART = load_vocabulary("smart")
PIECES = 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "midi").mkdir()
    for seed in range(PIECES):
        write_piece(folder / "midi" / f"{seed:02d}.mid", seed, bars=2)
    encode_folder(folder / "midi", folder / "dataset", SMART, workers=1)
    return TokenDataset.open(folder / "dataset")


@pytest.fixture(scope="module")
def dataset_folder(dataset) -> str:
    return str(dataset.ids.filename.parent)


def texts(prompts) -> list[str]:
    return [" ".join(SMART.tokens[i] for i in prompts.row(p)) for p in range(len(prompts))]


# The four sources


def test_procedural_prompts_are_the_papers_and_uniform():
    prompts = procedural(SMART, 6000, seed=1)
    rows = prompts.ids.reshape(6000, 4)
    assert {SMART.tokens[i] for i in rows[:, 0]} == {"Bar_None"}
    assert {SMART.tokens[i] for i in rows[:, 2]} == {"Position_0"}
    for column, kind in ((1, "TimeSig"), (3, "Tempo")):
        counts = Counter(rows[:, column].tolist())
        assert set(counts) == set(SMART.ids_of(kind))
        expected = 6000 / len(counts)  # chi-squared within five standard deviations of its mean
        chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
        freedom = len(counts) - 1
        assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_procedural_with_note_adds_one_whole_note():
    prompts = procedural_with_note(SMART, 500, seed=2)
    assert prompts.tokens.lengths.tolist() == [7] * 500
    batch = decode(prompts.tokens, SMART)
    assert batch.counts.tolist() == [1] * 500
    assert (batch.onset_tick == 0).all()
    assert len(set(batch.pitch)) > 80
    assert len(set(batch.velocity)) == 32


def test_dataset_prompts_carry_first_meter_and_tempo_of_real_pieces(dataset, dataset_folder):
    first = set()
    for p in range(len(dataset)):
        words = [SMART.tokens[i] for i in dataset.piece(p)]
        meter, tempo = (next(w for w in words if w.startswith(kind)) for kind in ("TimeSig_", "Tempo_"))
        first.add(f"Bar_None {meter} Position_0 {tempo}")
    prompts = texts(from_dataset(SMART, dataset_folder, 200, seed=3))
    assert set(prompts) == first


def test_bos_prompts_are_bos():
    assert texts(bos(SMART, 3)) == ["BOS_None"] * 3


def test_asked_for_time_signatures_and_tempi_are_kept():
    words = " ".join(texts(procedural(SMART, 300, time_signatures=["3/4", "6/8"], tempo_range=(90, 100)))).split()
    assert set(words) == {
        *("Bar_None", "Position_0", "TimeSig_3/4", "TimeSig_6/8", "Tempo_90.0", "Tempo_93.33", "Tempo_96.67"),
        "Tempo_100.0",
    }


def test_the_seed_decides():
    assert texts(procedural(SMART, 20, seed=4)) == texts(procedural(SMART, 20, seed=4))
    assert texts(procedural(SMART, 20, seed=4)) != texts(procedural(SMART, 20, seed=5))


def test_prompts_are_described_in_words():
    assert procedural(SMART, 1, time_signatures=["3/4"], tempo_range=(96, 97)).text(0) == "3/4, 96.67 bpm"
    assert bos(SMART, 1).text(0) == "BOS"
    note = [SMART.id(t) for t in ("Bar_None", "TimeSig_4/4", "Position_0", "Tempo_120.0", "Pitch_60")]
    assert describe(note, SMART) == "4/4, 120 bpm, Pitch_60"


# Numbered prompts of a run


def settings_of(source: str, dataset_folder: str, **more) -> PromptSettings:
    return PromptSettings(source, dataset=dataset_folder if source == "dataset" else "", **more)


@pytest.mark.parametrize("source", ["procedural", "procedural-note", "first-note", "dataset", "bos"])
@pytest.mark.parametrize("split", ["train", "selection", "test"])
def test_a_prompt_is_a_function_of_its_number(source, split, dataset_folder):
    settings = settings_of(source, dataset_folder, seed=6)
    whole = texts(make_prompts(settings, SMART, split, 0, 40))
    parts = [text for start in range(0, 40, 8) for text in texts(make_prompts(settings, SMART, split, start, 8))]
    assert whole == parts
    assert texts(make_prompts(settings, SMART, split, 17, 1)) == [whole[17]]
    assert len(make_prompts(settings, SMART, split, 3, 0)) == 0


@pytest.mark.parametrize("source", ["procedural", "procedural-note"])
def test_train_and_heldout_prompts_never_overlap_and_cover_everything(source):
    settings = PromptSettings(source, seed=7)
    train, selection, heldout = (
        {" ".join(text.split()[:4]) for text in texts(make_prompts(settings, SMART, split, 0, n))}
        for split, n in (("train", 12_000), ("selection", 240), ("test", 240))
    )
    assert selection == heldout
    assert len(heldout) == 15 * 64 // 8
    assert len(train) == 15 * 64 - len(heldout)
    assert not train & heldout


def test_heldout_prompts_do_not_repeat_before_all_have_come():
    heldout = texts(make_prompts(PromptSettings(seed=8), SMART, "test", 0, 240))
    assert len(set(heldout[:120])) == 120
    assert heldout[120:] == heldout[:120]


def test_what_is_held_out_depends_on_the_seed_alone():
    one, same, other = (texts(make_prompts(PromptSettings(seed=seed), SMART, "test", 0, 120)) for seed in (9, 9, 10))
    assert one == same
    assert set(one) != set(other)


def test_pieces_are_held_out_of_a_dataset(dataset_folder, dataset):
    train, heldout = (
        Counter(texts(make_prompts(settings_of("dataset", dataset_folder), SMART, split, 0, n)))
        for split, n in (("train", 2000), ("test", PIECES // 8))
    )
    everything = Counter(texts(from_dataset(SMART, dataset_folder, 2000)))
    assert set(train) | set(heldout) == set(everything)
    alone = {text for text in heldout if text not in train}
    assert alone  # these pieces begin as no other does: this seed holds at least one such piece out


def test_few_openings_are_shared_by_all_splits():
    settings = PromptSettings(time_signatures=("4/4",), tempo_min=100, tempo_max=120)
    train, selection, test = (
        set(texts(make_prompts(settings, SMART, split, 0, 500))) for split in ("train", "selection", "test")
    )
    assert train == selection == test
    assert len(train) == 7


def test_the_demo_is_chosen_and_judged_by_hundreds_of_openings_it_never_trains_on():
    splits = {
        split: texts(make_prompts(demo().prompts, SMART, split, 0, n))
        for split, n in (("train", 12_000), ("selection", 256), ("test", 256))
    }
    openings = {split: {" ".join(text.split()[:5]) for text in rows} for split, rows in splits.items()}
    assert {split: len(found) for split, found in openings.items()} == {"train": 616, "selection": 256, "test": 256}
    assert len(set().union(*openings.values())) == 616 + 256 + 256  # none is in two splits
    everything = [text for rows in splits.values() for text in rows]
    assert len(set(everything)) == 616 + 256 + 256  # one opening has one velocity and one duration


def test_a_first_note_lies_within_its_limits():
    settings = PromptSettings(
        "first-note", pitch_min=60, pitch_max=64, velocity_min=63, velocity_max=71, duration_min=0.25, duration_max=0.5
    )
    words = [text.split() for text in texts(make_prompts(settings, SMART, "train", 0, 2000))]
    assert {len(row) for row in words} == {7}
    assert {row[4] for row in words} == {f"Pitch_{pitch}" for pitch in range(60, 65)}
    assert {row[5] for row in words} == {"Velocity_63", "Velocity_67", "Velocity_71"}
    assert {row[6] for row in words} == {f"Duration_0.{twelfths}.12" for twelfths in (3, 4, 5, 6)}


# sha256 of the ids of prompts 0 to 1,599, as they were when the first runs were published
PUBLISHED = {
    ("paper", "train"): "a10617b69f403c74158f1e9ca4b02e40405b7bc6d41916556644af484ff9a05b",
    ("paper", "test"): "78f0beb7c79acfee7ec8fea4df0b4726d57cc55ffeb598f6c12a3e13921f2f0e",
    ("released", "train"): "ea0a8a0b5467df18a10eb714fa3e7df650b1ef04cc320a1cce74890870f61156",
    ("released", "test"): "e38e14a0977d4f5c9919a4a1e7d9618ff368c08e5e117e0bc205b0d1b6cedb08",
}


@pytest.mark.parametrize(("preset", "split"), PUBLISHED)
def test_the_prompts_of_published_runs_stay_what_they_were(preset, split):
    settings = {"paper": smart_paper, "released": smart_released}[preset]().prompts
    ids = make_prompts(settings, SMART, split, 0, 1600).ids
    assert hashlib.sha256(ids.tobytes()).hexdigest() == PUBLISHED[preset, split]


def test_a_time_signature_named_twice_counts_once():
    once, twice = (PromptSettings(time_signatures=names) for names in (("3/4",), ("3/4", "3/4")))
    assert texts(make_prompts(once, SMART, "train", 0, 50)) == texts(make_prompts(twice, SMART, "train", 0, 50))


# What is asked wrongly


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "midi"}, r"prompts\.source must be one of procedural, .*'midi'"),
        ({"time_signatures": ("1/4",)}, r"prompts\.time_signatures: no '1/4'.*3/8, 5/8.*3/2"),
        ({"tempo_min": 300}, r"prompts\.tempo_min 300.*40, 43\.33.*250 bpm"),
        ({"tempo_min": 100, "tempo_max": 99}, r"prompts\.tempo_max 99.*40, 43\.33.*250 bpm"),
        ({"tempo_min": float("nan")}, r"prompts\.tempo_min is nan"),
        ({"source": "first-note", "pitch_min": 109}, r"prompts\.pitch_min 109 .*leave no pitch.*21, 22.*108$"),
        ({"source": "first-note", "velocity_min": 4, "velocity_max": 6}, r"prompts\.velocity_max 6 .*3, 7, .*127$"),
        ({"source": "procedural-note", "duration_min": 4.5}, r"prompts\.duration_min 4\.5 .*4 beats$"),
        ({"source": "dataset"}, r"prompts\.dataset is empty"),
        ({"source": "dataset", "dataset": "/nowhere/at/all"}, "/nowhere/at/all is not an encoded dataset"),
        ({"seed": -1}, r"prompts\.seed"),
    ],
)
def test_a_setting_that_cannot_be_met_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        make_prompts(PromptSettings(**settings), SMART, "train", 0, 1)


def test_a_dataset_of_another_vocabulary_is_refused(dataset_folder, tmp_path):
    REMI(TokenizerConfig(special_tokens=["PAD", "BOS", "EOS"], use_pitchdrum_tokens=False)).save(tmp_path / "v.json")
    other = load_vocabulary(tmp_path / "v.json")
    with pytest.raises(UserError, match=r"prompts\.source 'procedural' needs TimeSig"):
        procedural(other, 1)
    shutil.copytree(dataset_folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text(other.description)
    with pytest.raises(UserError, match=r"prompts\.dataset .*copy was encoded with another vocabulary"):
        from_dataset(SMART, tmp_path / "copy", 1)


def test_a_replaced_dataset_is_read_again(dataset_folder, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(dataset_folder, folder)
    before = set(texts(from_dataset(SMART, folder, 200)))
    (tmp_path / "midi").mkdir()
    write_piece(tmp_path / "midi" / "only.mid", 99, bars=2)
    shutil.rmtree(folder)
    encode_folder(tmp_path / "midi", folder, SMART, workers=1)
    after = set(texts(from_dataset(SMART, folder, 200)))
    assert len(before) > 1
    assert len(after) == 1


def test_only_three_splits():
    with pytest.raises(ValueError, match="train, selection, test"):
        make_prompts(PromptSettings(), SMART, "heldout", 0, 1)
