"""Styles on unused tokens: what a policy knows, what may be asked of it, and that nothing else changes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from decode_parity import assert_decodes_as_miditok
from tiny_policy import make_policy

from fastsmart.errors import UserError
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import asked_styles, describe, make_prompts, procedural, styled
from fastsmart.tokens.settings import PromptSettings
from fastsmart.tokens.styles import STYLES_FILE, Styles
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import load_vocabulary

STYLES = Styles(
    (("baroque", "INF1_None"), ("ragtime", "INF2_None"), ("hymn", "INF3_None")),
    (("Joplin, Scott", "INF4_None", "ragtime"),),
)


IN_METRES = replace(STYLES, metres=(("ragtime", (("2/4", 0.75), ("3/4", 0.25))),))


@pytest.fixture(scope="module")
def knowing(vocab):
    return replace(vocab, styles=STYLES)


@pytest.fixture(scope="module")
def in_metres(vocab):
    return replace(vocab, styles=IN_METRES)


def test_styles_travel_with_a_checkpoint_and_its_weights_do_not_change(knowing, tmp_path):
    policy = make_policy(knowing)
    save_policy(policy, tmp_path / "with")
    plain = make_policy(replace(knowing, styles=None))
    save_policy(plain, tmp_path / "without")
    assert load_policy(tmp_path / "with").vocab.styles == STYLES
    assert load_policy(tmp_path / "without").vocab.styles is None
    files = {path.name: path.read_bytes() for path in (tmp_path / "without").iterdir()}
    assert files | {STYLES_FILE: (tmp_path / "with" / STYLES_FILE).read_bytes()} == {
        path.name: path.read_bytes() for path in (tmp_path / "with").iterdir()
    }


def test_a_preset_knows_no_styles_whatever_lies_in_the_working_folder(knowing, tmp_path, monkeypatch):
    STYLES.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_vocabulary("smart").styles is None


def test_a_style_and_a_composer_are_the_tokens_after_bos(knowing):
    prompts = procedural(knowing, 4, seed=3)
    asked = styled(prompts, ["ragtime", "ragtime/joplin"])
    texts = [[knowing.tokens[i] for i in asked.row(k)] for k in range(4)]
    assert [row[:2] for row in texts[::2]] == [["BOS_None", "INF2_None"]] * 2
    assert [row[:3] for row in texts[1::2]] == [["BOS_None", "INF2_None", "INF4_None"]] * 2
    for k in range(4):
        assert asked.row(k)[-4:].tolist() == prompts.row(k).tolist()
    assert asked_styles(asked.tokens, knowing) == ["ragtime"] * 4
    assert asked_styles(prompts.tokens, knowing) == [""] * 4
    assert describe(asked.row(1), knowing).startswith("ragtime, Joplin, Scott, ")


def test_prompts_without_styles_are_those_of_a_vocabulary_that_knows_none(vocab, knowing):
    for source in ("procedural", "procedural-note", "first-note", "bos"):
        for split in ("train", "selection", "test"):
            first, second = (make_prompts(PromptSettings(source), v, split, 5, 20) for v in (vocab, knowing))
            assert np.array_equal(first.ids, second.ids)


def test_styles_take_turns_and_held_out_openings_come_in_each_of_them(knowing):
    names = ("hymn", "baroque", "ragtime")
    plain = make_prompts(PromptSettings("first-note", seed=1), knowing, "test", 0, 8)
    settings = PromptSettings("first-note", styles=names, seed=1)
    asked = make_prompts(settings, knowing, "test", 0, 24)
    assert asked_styles(asked, knowing) == list(names) * 8
    for k in range(24):
        assert asked.row(k)[2:].tolist() == plain.row(k // 3).tolist()
    assert make_prompts(settings, knowing, "test", 7, 3).row(0).tolist() == asked.row(7).tolist()
    train = asked_styles(make_prompts(settings, knowing, "train", 0, 300), knowing)
    assert [train.count(name) for name in names] == [100] * 3
    assert make_prompts(PromptSettings("bos", styles=("hymn",)), knowing, "train", 0, 1).row(0).tolist() == [
        knowing.bos_id,
        knowing.id("INF3_None"),
    ]


def metre(row, vocab):
    return next(vocab.tokens[i] for i in row if vocab.tokens[i].startswith("TimeSig"))


@pytest.mark.parametrize("source", ["procedural", "procedural-note", "first-note"])
def test_openings_of_a_style_are_in_the_metres_of_its_pieces(knowing, in_metres, source):
    settings = PromptSettings(source, time_signatures=("4/4",), styles=("ragtime/Joplin", "hymn"))
    plain, asked = (make_prompts(settings, vocab, "train", 0, 800) for vocab in (knowing, in_metres))
    found = [metre(asked.row(k), in_metres) for k in range(800)]
    assert set(found[1::2]) == {"TimeSig_4/4"}
    assert set(found[::2]) == {"TimeSig_2/4", "TimeSig_3/4"}
    assert found[::2].count("TimeSig_2/4") / 400 == pytest.approx(0.75, abs=0.07)
    for k in range(800):  # nothing else has changed
        assert np.count_nonzero(plain.row(k) != asked.row(k)) == (k + 1) % 2
    again = make_prompts(settings, in_metres, "train", 300, 1)
    assert again.row(0).tolist() == asked.row(300).tolist()
    off = make_prompts(replace(settings, style_metres=False), in_metres, "train", 0, 800)
    assert np.array_equal(off.ids, plain.ids)


def test_metres_leave_alone_what_has_none(in_metres):
    row = make_prompts(PromptSettings("bos", styles=("ragtime",)), in_metres, "train", 0, 1).row(0)
    assert row.tolist() == [in_metres.bos_id, in_metres.id("INF2_None")]


def test_given_prompts_are_put_in_the_metres_only_where_that_is_asked_for(in_metres):
    prompts = procedural(in_metres, 20, seed=0, time_signatures=["4/4"])
    kept, drawn = styled(prompts, ["ragtime"]), styled(prompts, ["ragtime"], metres_seed=1)
    assert {metre(row, in_metres) for row in kept.tokens} == {"TimeSig_4/4"}
    assert {metre(row, in_metres) for row in drawn.tokens} == {"TimeSig_2/4", "TimeSig_3/4"}


def test_metres_travel_with_a_checkpoint(in_metres, tmp_path):
    save_policy(make_policy(in_metres), tmp_path)
    assert load_policy(tmp_path).vocab.styles == IN_METRES


def test_a_style_makes_no_difference_to_the_notes_and_none_to_miditok(knowing, tmp_path):
    prompt = styled(procedural(knowing, 1, seed=0), ["ragtime/Joplin, Scott"]).row(0)
    music = [knowing.id(text) for text in ("Pitch_60", "Velocity_63", "Duration_1.0.12", "Bar_None", "TimeSig_3/4")]
    with_style, without = (decode(TokenBatch.pack([[*row, *music]]), knowing) for row in (prompt, prompt[3:]))
    assert with_style.counts.tolist() == [1]
    assert np.array_equal(with_style.onset_s, without.onset_s)
    assert np.array_equal(with_style.pitch, without.pitch)
    assert_decodes_as_miditok([np.array([*prompt, *music])], knowing)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("ragtyme", "did you mean ragtime?"),
        ("opera", "the policy knows baroque, ragtime, hymn"),
        ("ragtime/Bach", "its composers: Joplin, Scott"),
        ("hymn/Bach", "its composers: none"),
    ],
)
def test_what_a_policy_does_not_know_is_said_with_what_it_knows(knowing, asked, said):
    with pytest.raises(UserError, match=said):
        make_prompts(PromptSettings(styles=(asked,)), knowing, "train", 0, 1)


def test_a_policy_without_styles_says_so(vocab):
    with pytest.raises(UserError, match=r"prompts\.styles asks for ragtime, and the policy knows no styles"):
        make_prompts(PromptSettings(styles=("ragtime",)), vocab, "train", 0, 1)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([], "is not a list of styles"),
        ({"styles": {"a": 3}}, "is not a list of styles"),
        ({"styles": {"a": "Pitch_60"}}, "uses the token Pitch_60"),
        ({"styles": {"a": "INF17_None"}}, "uses the token INF17_None"),
        ({"styles": {"a": "INF1_None", "b": "INF1_None"}}, "uses the token INF1_None twice"),
        ({"styles": {"a": "INF1_None"}, "composers": {"x": {"token": "INF2_None", "style": "b"}}}, "the style 'b'"),
        ({"styles": {"a": "INF1_None"}, "metres": {"b": {"3/4": 1}}}, "metres of 'b', which it does not list"),
        ({"styles": {"a": "INF1_None"}, "metres": {"a": {"9/1": 1}}}, "a is in '9/1', for which the vocabulary has no"),
        (
            {"styles": {"a": "INF1_None"}, "metres": {"a": {"3/4": 0}}},
            "3/4 of a the share 0; it must be a number above",
        ),
        ({"styles": {"a": "INF1_None"}, "metres": {"a": {"3/4": "x"}}}, "3/4 of a the share 'x'"),
        ({"styles": {"a": "INF1_None"}, "metres": {"a": {}}}, "gives no metre of a"),
        ({"styles": {"a": "INF1_None"}, "metres": {"a": 3}}, "is not a list of styles"),
    ],
)
def test_a_damaged_list_of_styles_is_named(vocab, tmp_path, tree, said):
    vocab.save(tmp_path)
    (tmp_path / STYLES_FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=said) as error:
        load_vocabulary(tmp_path)
    assert STYLES_FILE in str(error.value)
