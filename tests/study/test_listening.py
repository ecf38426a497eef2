"""The blind listening test: nothing in the page tells the policies apart, and answers come back whole."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import soundfile
from browsing import until
from listeners import SMALL, answered, is_one_sentence, judged, made, sound
from pyloudnorm import Meter

from fastsmart import UserError
from fastsmart.cli import main
from fastsmart.study.answers import read_answers
from fastsmart.study.listening import KEEP_QUESTION, QUESTIONS, RATINGS, ListeningSettings, make_test, trials_of
from fastsmart.study.ratings import analyse, as_text


def test_the_key_holds_openings_not_rows(long_enough, tmp_path):
    ends = [long_enough.outputs(label).notes(long_enough.vocab).end_s for label in ("base", "tuned")]
    rows = np.flatnonzero((np.stack(ends) >= 5).all(axis=0))
    assert {0, 7} <= set(rows)  # the eighth prompt is the first again: there are seven openings
    _, _, key = made(long_enough, tmp_path / "t", prompts=len(rows), repeats=0)
    prompts = sorted(clip["prompt"] for clip in key["clips"].values() if clip["policy"] == "base")
    assert prompts == sorted(row % 7 for row in rows)


def test_the_page_says_nothing_of_what_the_clips_are(rating_test, long_enough):
    text, data, key = rating_test
    without_audio = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    for secret in ("tuned", "pop909", 'policy"', str(long_enough.path), "evaluation"):
        assert secret not in without_audio, secret
    assert set(data["clips"]) - set(key["clips"]) != set(), "tones have no origin"
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in data["clips"])
    assert list(data["clips"]) == sorted(data["clips"])
    assert all(set(trial) == {"id", "clips", "check", "block"} for trial in data["trials"])


def test_clips_cannot_be_told_apart_by_size_length_level_or_tags(rating_test):
    _, data, key = rating_test
    files = {name: sound(url) for name, url in data["clips"].items()}
    assert len({len(content) for content in files.values()}) == 1
    shapes, loudness = set(), []
    for content in files.values():
        assert not content.startswith(b"ID3")
        assert b"TAG" not in content[-128:]
        samples, rate = soundfile.read(io.BytesIO(content))
        shapes.add((samples.shape, rate))
        loudness.append(Meter(rate).integrated_loudness(samples))
        assert np.abs(samples).max() <= 1
    assert len(shapes) == 1
    assert np.ptp(loudness) < 0.5
    assert np.mean(loudness) == pytest.approx(key["loudness_lufs"], abs=0.3)


def test_question_and_scale_speak_of_the_same(rating_test):
    """ITU-T P.800 names a scale of quality with these five words; "enjoy" would ask for another one."""
    _, data, _ = rating_test
    assert [text.split(maxsplit=1) for text in data["scale"]] == [
        [str(k), word] for k, word in enumerate(("bad", "poor", "fair", "good", "excellent"), 1)
    ]
    assert data["question"].startswith("How good is")
    assert "enjoy" not in data["question"]
    assert data["scale"] == list(RATINGS)


@pytest.mark.parametrize("design", ["rating", "ab"])
def test_the_order_of_trials_and_sides_is_chance(design):
    """Over 400 makings, the first policy's clips come as often in the first half, and stand as often on the left."""
    names, early, left = [f"{k}" for k in range(20)], [], []
    for _ in range(400):
        trials, _ = trials_of(names, 2, 10, ListeningSettings(design, 10, checks=0, repeats=0))
        first = set(names[:10])
        early.append(np.mean([trials[k]["clips"][0] in first for k in range(len(trials) // 2)]))
        left.append(trials[0]["clips"][0] in first)
    assert np.mean(early) == pytest.approx(0.5, abs=0.05)
    assert np.mean(left) == pytest.approx(0.5, abs=0.12)


def test_every_clip_is_asked_for_once_and_some_twice(rating_test):
    _, data, key = rating_test
    music = [t["clips"][0] for t in data["trials"] if not t["check"]]
    assert set(music) == set(key["clips"])
    assert len(music) == 2 * 3 + 2
    assert sum(t["check"] for t in data["trials"]) == 2 == len(key["checks"])
    assert sum(t["repeat"] for t in key["trials"].values()) == 2


def test_who_stops_early_has_compared_the_policies_on_most_of_what_was_heard():
    """A block holds both clips of five prompts: after half the trials at most five prompts are without their pair."""
    names = [f"{policy} {prompt}" for policy in "ab" for prompt in range(20)]
    trials, _ = trials_of(names, 2, 20, ListeningSettings("rating", 20, checks=0, repeats=0))
    for block in range(4):
        heard = [t["clips"][0].split() for t in trials if t["block"] == block]
        assert len(heard) == 10
        assert len({prompt for _, prompt in heard}) == 5
    again, _ = trials_of([*names, *"12345"], 2, 20, ListeningSettings("rating", 20, checks=4, repeats=4))
    assert {t["block"] for t in again} == {0, 1, 2, 3}


def test_ratings_come_back_to_their_policies(rating_test, tmp_path, capsys):
    _, data, key = rating_test
    (tmp_path / "key.json").write_text(json.dumps(key))

    def taste(listener):
        def rate(clips):
            origin = key["clips"][clips[0]]
            tuned = origin["policy"] == "tuned"
            random = np.random.default_rng([listener, int(tuned), origin["prompt"]])
            return int(np.clip((4 if tuned else 2) + random.integers(-1, 2), 1, 5))

        return rate

    for k in range(6):
        (tmp_path / f"{k}.json").write_text(json.dumps(answered(data, key, "same name", taste(k), f"{k}" * 16)))
    careless = answered(data, key, "careless", lambda clips: 1, "f" * 16)
    for a in careless["answers"]:
        a["answer"] = 1
    (tmp_path / "careless.json").write_text(json.dumps(careless))
    assert (
        main(["listen", "analyse", str(tmp_path), "--key", str(tmp_path / "key.json"), "--out", str(tmp_path / "r")])
        == 0
    )
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "r").read_text())
    assert result["listeners"] == 6
    assert result["answers"] == 36
    assert result["excluded"] == ["careless ffffff"]
    assert "careless" in said
    part = result["questions"]["rating"]
    found = part["differences"]["tuned"]
    assert found["estimate"] == pytest.approx(part["means"]["tuned"]["value"] - part["means"]["base"]["value"])
    assert found["low"] > 0
    assert found["pairs"] == 18
    assert 0.5 < part["power"]["tuned"]["50"] < 1
    assert said.count("p = ") == 1


def test_choices_come_back_to_their_policies(long_enough, tmp_path):
    _, data, key = made(long_enough, tmp_path / "ab", design="ab", repeats=1)
    by_policy = {(o["policy"], o["prompt"]): clip for clip, o in key["clips"].items()}
    favourite = {
        o["prompt"]: by_policy["tuned" if o["prompt"] % 2 else "base", o["prompt"]] for o in key["clips"].values()
    }
    files = []
    for k in range(4):
        choose = (lambda clips: "none") if k == 3 else (lambda clips: favourite[key["clips"][clips[0]]["prompt"]])
        files.append(tmp_path / f"{k}.json")
        files[-1].write_text(json.dumps(answered(data, key, f"l{k}", choose, f"{k}" * 16)))
    answers = read_answers(files, tmp_path / "ab" / "key.json")
    odd = sum(prompt % 2 for prompt in favourite)
    assert sum(a.value == 1 for a in answers.given if not a.repeat) == 3 * odd
    result = analyse(answers)
    part = result["questions"]["choice"]
    assert (part["won"], part["lost"], part["no_preference"]) == (3 * odd, 3 * (3 - odd), 3)
    assert part["differences"]["tuned"]["estimate"] == pytest.approx((2 * odd - 3) * 3 / 12, abs=0.1)
    assert result["steadiness"] == 1
    # the four agree on every clip, and there are three: this says little of other clips
    assert part["differences"]["tuned"]["p"] > 0.2
    assert "share for tuned" in as_text(result)
    assert as_text(result).count("p = ") == 1


def test_sets_are_of_the_same_prompts_and_asked_about_as_sets(sets_test):
    text, data, key = sets_test
    without_audio = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "tuned" not in without_audio
    assert data["question"] == "Which SET of two is more varied?"
    assert data["keep_question"] == "Would you keep one of the two of set"
    assert QUESTIONS["sets"] == "Which SET of six is more varied?"
    assert "one of the six" in KEEP_QUESTION
    by_place = {(o["policy"], o["prompt"]): o["prompts"] for o in key["clips"].values()}
    assert set(by_place) == {(policy, number) for policy in ("base", "tuned") for number in (0, 1)}
    assert all(by_place["base", n] == by_place["tuned", n] for n in (0, 1))
    assert len({i for prompts in by_place.values() for i in prompts}) == 4
    lengths = {name: soundfile.info(io.BytesIO(sound(url))).duration for name, url in data["clips"].items()}
    assert all(lengths[name] == pytest.approx(2 * 5 + 1, abs=0.2) for name in key["clips"])
    assert len({len(data["clips"][name]) for name in key["clips"]}) == 1


def test_a_set_is_its_clips_one_after_the_other_with_a_pause(sets_test):
    _, data, key = sets_test
    name = next(iter(key["clips"]))
    samples, rate = soundfile.read(io.BytesIO(sound(data["clips"][name])))
    level = [
        float(np.sqrt((samples[int(a * rate) : int(b * rate)] ** 2).mean())) for a, b in ((0, 5), (5.3, 5.7), (6, 11))
    ]
    assert min(level[0], level[2]) > 100 * level[1]
    assert level[0] == pytest.approx(level[2], rel=0.5)


def test_judgements_of_sets_come_back_to_their_policies(sets_test, tmp_path):
    _, data, key = sets_test
    (tmp_path / "key.json").write_text(json.dumps(key))
    files = []
    for k, (varied, keep) in enumerate(
        [("base", {"base"}), ("base", {"base", "tuned"}), ("base", set()), ("", {"base"})]
    ):
        files.append(tmp_path / f"{k}.json")
        files[-1].write_text(json.dumps(answered(data, key, f"l{k}", judged(key, varied, keep), f"{k}" * 16)))
    result = analyse(read_answers(files, tmp_path / "key.json"))
    varied, keep = result["questions"]["varied"], result["questions"]["keep"]
    assert result["answers"] == 4 * 2
    assert (varied["won"], varied["lost"], varied["no_preference"]) == (0, 6, 2)
    assert varied["differences"]["tuned"]["estimate"] == pytest.approx(-0.75)
    assert (keep["means"]["base"]["value"], keep["means"]["tuned"]["value"]) == (0.75, 0.25)
    assert keep["differences"]["tuned"]["estimate"] == pytest.approx(-0.5)
    assert result["steadiness"] == 1
    said = as_text(result)
    assert "tuned called more varied than base 0 times, the reverse 6 times" in said
    assert "base: one to keep in 75%" in said


def test_an_answer_that_all_agree_on_is_said_and_the_others_analysed(sets_test, tmp_path):
    _, data, key = sets_test
    (tmp_path / "key.json").write_text(json.dumps(key))
    files = [tmp_path / f"{k}.json" for k in range(3)]
    for k, file in enumerate(files):
        tell = judged(key, "base" if k else "tuned", {"base", "tuned"})
        file.write_text(json.dumps(answered(data, key, f"l{k}", tell, f"{k}" * 16)))
    result = analyse(read_answers(files, tmp_path / "key.json"))
    assert result["questions"]["keep"]["differences"] == {}
    assert "no answer tells tuned from base here" in as_text(result)
    for file in files:
        file.write_text(json.dumps(answered(data, key, "l", judged(key, "", set()), file.stem * 16)))
    with pytest.raises(UserError, match="no answer tells the policies apart"):
        analyse(read_answers(files, tmp_path / "key.json"))


def test_styles_that_were_asked_for_are_told_by_ear(styles_test, tmp_path, capsys):
    _, data, key = styles_test
    assert data["styles"] == key["styles"] == ["march", "waltz"]
    assert data["question"] == "Which style is this?"
    assert {origin["style"] for origin in key["clips"].values()} == {"march", "waltz"}
    assert all(len(trial["clips"]) == 1 for trial in data["trials"])
    assert "march" not in json.dumps(data["trials"])  # the page does not say which is which

    def sharp(clips):  # hears every style of the tuned policy, and of the base always a march
        origin = key["clips"][clips[0]]
        return origin["style"] if origin["policy"] == "tuned" else "march"

    for name in ("ann", "bob"):
        saved = answered(data, key, name, sharp, session=name)
        (tmp_path / f"{name}.json").write_text(json.dumps(saved))
    (tmp_path / "key.json").write_text(json.dumps(key))
    assert main(["listen", "analyse", str(tmp_path), "--key", str(tmp_path / "key.json")]) == 0
    said = capsys.readouterr().out
    asked = [origin["style"] for origin in key["clips"].values() if origin["policy"] == "base"]
    assert f"base: heard as asked in {asked.count('march') / len(asked):.0%}" in said
    assert "tuned: heard as asked in 100%" in said
    assert "    waltz: march 100%" in said
    assert "repeated trials answered alike: 100%" in said
    result = analyse(read_answers([tmp_path / "ann.json", tmp_path / "bob.json"], tmp_path / "key.json"))
    heard = result["questions"]["style"]["heard"]
    assert heard["tuned"]["confusion"] == [[1.0, 0.0], [0.0, 1.0]]
    assert heard["base"]["information_bits"]["value"] == 0.0
    bad = answered(data, key, "eve", lambda clips: "polka", session="e")
    (tmp_path / "eve.json").write_text(json.dumps(bad))
    assert main(["listen", "analyse", str(tmp_path / "eve.json"), "--key", str(tmp_path / "key.json")]) == 2
    assert "that the page does not offer" in capsys.readouterr().err


def test_styles_that_were_not_asked_for_cannot_be_told(long_enough, tmp_path):
    with pytest.raises(UserError, match="are not of two or more styles that were asked for"):
        made(long_enough, tmp_path / "t", design="styles")


def test_what_is_wrong_is_said_in_one_sentence(long_enough, rating_test, tmp_path):
    _, data, key = rating_test
    (tmp_path / "key.json").write_text(json.dumps(key))
    (tmp_path / "other.json").write_text(json.dumps(answered(data, key, "x", lambda c: 3, "a") | {"study": "other"}))
    with pytest.raises(UserError, match="answers another listening test"):
        read_answers([tmp_path / "other.json"], tmp_path / "key.json")
    with pytest.raises(UserError, match="not the key"):
        read_answers([], tmp_path / "other.json")
    with pytest.raises(UserError, match="only"):
        make_test(long_enough, tmp_path / "t", ListeningSettings(prompts=9))
    with pytest.raises(UserError, match="compares two"):
        make_test(long_enough, tmp_path / "t", ListeningSettings(design="ab"), ["base", "tuned", "best of 2"])
    with pytest.raises(UserError, match="seconds"):
        ListeningSettings(seconds=1)
    with pytest.raises(UserError, match="multiple"):
        ListeningSettings("sets", prompts=15)
    with pytest.raises(UserError, match="set-size"):
        ListeningSettings("sets", prompts=20, set_size=20)
    made(long_enough, tmp_path / "t", prompts=1)
    with pytest.raises(UserError, match="key would be lost"):
        make_test(long_enough, tmp_path / "t", ListeningSettings(**SMALL))


@pytest.mark.parametrize(
    "options",
    [
        *(["--effect", "0.3", "--prompts", n] for n in ("0", "-5", "1", "99999999")),
        *([f"--effect={bad}"] for bad in ("nan", "inf", "-inf")),
        *(["--design", "ab", f"--effect={bad}"] for bad in ("1.5", "0", "1", "-0.2", "nan")),
        *(
            ["--effect", "0.3", name, bad]
            for name in ("--sd", "--clip-sd", "--taste-sd")
            for bad in ("-1", "nan", "inf")
        ),
    ],
)
def test_power_of_impossible_numbers_is_refused(options, capsys):
    assert main(["listen", "power", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert is_one_sentence(said.err, "--")


def test_hostile_questions_and_labels_do_not_become_part_of_the_page(long_enough, tmp_path, browser):
    """The question is shown as it was typed; labels and paths are not in the page at all."""
    evil = "</script><img src=x onerror=\"document.title='owned'\"><b>Which?</b> [red]x[/red] ${7*7}"
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    text, data, _ = made(long_enough, folder, prompts=1, checks=0, repeats=0, question=evil)
    assert data["question"] == evil
    assert evil not in text
    assert "onerror=alert" not in text
    tab = browser.new_page()
    tab.goto((folder / "page" / "listen.html").as_uri())
    tab.fill("#listener", evil[:40])
    tab.click("#start")
    assert tab.locator("#choices legend").inner_text() == evil
    assert tab.locator("#choices img, #choices b").count() == 0
    assert tab.title() == "Listening test"


def hear(tab) -> None:
    """Play every clip of the trial at three times the speed, until it may be judged."""
    assert tab.locator("#choices input").first.is_disabled()
    for i in range(tab.locator("audio").count()):
        tab.locator("audio").nth(i).evaluate("a => { a.playbackRate = 3; a.muted = true; a.play(); }")
        until(tab, f"document.querySelectorAll('audio')[{i}].ended")
    until(tab, "!document.querySelector('#choices input').disabled")


@pytest.mark.parametrize("design", ["rating", "ab", "sets"])
def test_a_listener_answers_leaves_and_comes_back(browser, long_enough, tmp_path, design):
    prompts = 2 if design == "sets" else 1
    _, data, _ = made(long_enough, tmp_path / "t", design=design, prompts=prompts, checks=1, repeats=0, set_size=2)
    said = []
    context = browser.new_context(accept_downloads=True)
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    address = (tmp_path / "t" / "page" / "listen.html").as_uri()
    tab.goto(address)
    tab.fill("#listener", "Ada L.")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    trials = len(data["trials"])
    for k in range(trials):
        assert tab.locator("#place").inner_text() == f"{k + 1} of {trials}"
        hear(tab)
        for question in tab.locator("#choices fieldset").all():
            assert tab.locator("#next").is_disabled()
            question.locator("input").nth(1).focus()
            tab.keyboard.press("Space")
        if k == 0:
            tab.locator("#next").click()
            tab.close()
            tab = context.new_page()
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.goto(address)
        else:
            tab.locator("#next").focus()
            tab.keyboard.press("Enter")
    with tab.expect_download() as download:
        tab.locator("#download").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    result = json.loads(saved.read_text())
    assert saved.name.startswith("answers-Ada_L_-")
    assert sorted(a["trial"] for a in result["answers"]) == sorted(t["id"] for t in data["trials"])
    assert all(min(a["heard_s"]) >= 4 for a in result["answers"])
    answers = read_answers([saved], tmp_path / "t" / "key.json", keep_inattentive=True)
    assert len(answers.given) == (trials - 1) * (3 if design == "sets" else 1)
    assert said == []
