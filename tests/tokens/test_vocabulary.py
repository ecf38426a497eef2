"""The vocabulary is MidiTok's; preset `smart` is the paper's 413 tokens."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from miditok import REMI, TokenizerConfig

from fastsmart.errors import UserError
from fastsmart.tokens.decode import tables_of_miditok
from fastsmart.tokens.vocabulary import TOKENIZER_FILE, derived, load_vocabulary

SMART = load_vocabulary("smart")


def test_preset_smart_is_the_papers_configuration_id_by_id():
    config = TokenizerConfig(
        pitch_range=(21, 108),
        beat_res={(0, 4): 12},
        num_velocities=32,
        special_tokens=["PAD", "BOS", "EOS", "PRE", "SUF", *[f"INF{i}" for i in range(1, 17)]],
        use_tempos=True,
        num_tempos=64,
        tempo_range=(40, 250),
        use_time_signatures=True,
        time_signature_range={8: [3, 5, 6, 7, 9, 10, 11, 12], 4: [2, 3, 4, 5, 6], 2: [2, 3]},
        use_programs=False,
        use_pitchdrum_tokens=False,
    )
    assert dict(REMI(config).vocab) == {token: i for i, token in enumerate(SMART.tokens)}


def test_what_is_stored_of_a_preset_is_what_miditok_makes_of_it():
    made = SMART.tokenizer.vocab
    tables = [x.tolist() if hasattr(x, "tolist") else x for x in tables_of_miditok(SMART)]
    wanted = {"tokens": sorted(made, key=made.__getitem__), "decode": tables}
    assert derived(SMART.description) == wanted, f"write this to presets/smart.derived.json: {json.dumps(wanted)}"


def test_preset_smart_has_413_tokens_of_the_published_kinds():
    kinds = Counter(token.split("_")[0] for token in SMART.tokens[21:])
    published = {"Bar": 1, "Pitch": 88, "Velocity": 32, "Duration": 48, "Position": 144, "Tempo": 64, "TimeSig": 15}
    assert len(SMART) == 413
    assert kinds == published
    assert (SMART.pad_id, SMART.bos_id, SMART.eos_id) == (0, 1, 2)
    assert (SMART.values_of("Pitch")[0], SMART.values_of("Pitch")[-1]) == ("21", "108")
    assert (SMART.values_of("Velocity")[0], SMART.values_of("Velocity")[-1]) == ("3", "127")
    assert (SMART.values_of("Duration")[0], SMART.values_of("Duration")[-1]) == ("0.1.12", "4.0.12")
    assert (SMART.values_of("Tempo")[0], SMART.values_of("Tempo")[-1]) == ("40.0", "250.0")
    assert " ".join(SMART.values_of("TimeSig")) == "3/8 5/8 6/8 7/8 9/8 10/8 11/8 12/8 2/4 3/4 4/4 5/4 6/4 2/2 3/2"


def test_ids_and_texts_are_each_others_inverse():
    for kind in ("Bar", "Position", "Pitch", "Velocity", "Duration", "Tempo", "TimeSig"):
        texts = [f"{kind}_{value}" for value in SMART.values_of(kind)]
        assert [SMART.id(text) for text in texts] == SMART.ids_of(kind)
        assert [SMART.tokens[i] for i in SMART.ids_of(kind)] == texts


def test_an_unknown_token_lists_the_known_ones():
    with pytest.raises(UserError, match=r"TimeSig_1/4.*TimeSig_3/8"):
        SMART.id("TimeSig_1/4")
    with pytest.raises(UserError, match="no Chord tokens"):
        SMART.id("Chord_maj")


def test_a_saved_vocabulary_loads_from_its_folder_its_file_and_in_miditok(tmp_path):
    SMART.save(tmp_path)
    assert load_vocabulary(tmp_path) == load_vocabulary(str(tmp_path / TOKENIZER_FILE)) == SMART
    assert dict(REMI(params=tmp_path / TOKENIZER_FILE).vocab) == dict(SMART.tokenizer.vocab)


def test_what_miditok_saves_is_read(tmp_path):
    tokenizer = REMI(TokenizerConfig(special_tokens=["PAD", "BOS", "EOS", "MASK"], use_pitchdrum_tokens=False))
    tokenizer.save(tmp_path / "other.json")
    vocab = load_vocabulary(tmp_path / "other.json")
    assert dict(tokenizer.vocab) == {token: i for i, token in enumerate(vocab.tokens)}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_programs": True}, "Program"),
        ({"use_rests": True}, "Rest"),
        ({"use_chords": True}, "Chord"),
        ({"use_sustain_pedals": True}, "Pedal"),
        ({"use_velocities": False}, "Velocity"),
        ({"special_tokens": ["PAD", "BOS"]}, "EOS"),
        ({"use_pitchdrum_tokens": True}, "PitchDrum"),
    ],
)
def test_a_vocabulary_the_decoder_does_not_know_is_refused_by_name(config, named, tmp_path):
    config = {"special_tokens": ["PAD", "BOS", "EOS"], "use_pitchdrum_tokens": False} | config
    REMI(TokenizerConfig(**config)).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=rf"tokenizer\.json.*{named}"):
        load_vocabulary(tmp_path)


def changed(**entries) -> str:
    return json.dumps(json.loads(SMART.description) | entries)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a MidiTok JSON"),
        ("MThd\0\0", "not a MidiTok JSON"),
        ("[1, 2]", "no 'config'"),
        ('{"model_type": "phi3"}', "no 'config'"),
        (changed(tokenization="MIDILike"), "MIDILike"),
        (changed(model='{"model": {"type": "BPE"}}'), "merged tokens"),
        (changed(config={"beat_res": {"0_4": 12}, "pitch_range": 5}), "MidiTok can build"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(text, reason, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=rf"tokenizer\.json.*{reason}"):
        load_vocabulary(tmp_path)


@pytest.mark.parametrize("source", ["smrt", "nowhere/deep/tokenizer.json", "missing.json", "/nowhere/tokenizer.json"])
def test_a_missing_file_is_named_with_what_would_do(source):
    with pytest.raises(UserError, match=rf"{source}.*smart"):
        load_vocabulary(source)


def test_importing_the_vocabulary_is_light():
    code = "import sys, fastsmart.tokens.vocabulary; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numba", "miditok", "symusic", "torch", "transformers"} & set(modules)
