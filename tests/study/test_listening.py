"""The blind listening test: nothing in the page tells the policies apart, and answers come back whole."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import soundfile
from browsing import until
from pyloudnorm import Meter

from fastsmart import UserError
from fastsmart.cli import main
from fastsmart.study.listening import ListeningSettings, make_test, trials_of
from fastsmart.study.ratings import analyse, as_text, read_answers

SMALL = {"prompts": 3, "seconds": 5.0}


@pytest.fixture(scope="module")
def long_enough(evaluation):
    """Prompts on which both tiny policies play five seconds."""
    ends = [evaluation.outputs(label).notes(evaluation.vocab).end_s for label in ("base", "tuned")]
    assert (np.stack(ends) >= 5).all(axis=0).sum() >= 3
    return evaluation


def made(evaluation, folder, **settings):
    page, key = make_test(evaluation, folder, ListeningSettings(**(SMALL | settings)))
    text = page.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="notes">(.*?)</script>', text).group(1)), json.loads(key.read_text())


@pytest.fixture(scope="module")
def rating_test(long_enough, tmp_path_factory):
    return made(long_enough, tmp_path_factory.mktemp("rating") / "t")


def sound(url: str) -> bytes:
    return base64.b64decode(url.split(",", 1)[1])


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
    assert all(set(trial) == {"id", "clips", "check"} for trial in data["trials"])


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


def answered(data, key, listener: str, answer, session: str) -> dict:
    """What a listener's page would save."""
    answers = [
        {"trial": t["id"], "clips": t["clips"], "answer": key["checks"].get(t["id"]) or answer(t["clips"])}
        for t in data["trials"]
    ]
    return {"study": data["study"], "listener": listener, "session": session, "answers": answers}


def test_ratings_come_back_to_their_policies(rating_test, tmp_path, capsys):
    _, data, key = rating_test
    random = np.random.default_rng(0)
    (tmp_path / "key.json").write_text(json.dumps(key))

    def taste(clips):
        return int(np.clip((4 if key["clips"][clips[0]]["policy"] == "tuned" else 2) + random.integers(-1, 2), 1, 5))

    for k in range(6):
        (tmp_path / f"{k}.json").write_text(json.dumps(answered(data, key, "same name", taste, f"{k}" * 16)))
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
    for model in result["models"].values():
        assert model["effects"]["tuned"]["estimate"] == pytest.approx(
            result["means"]["tuned"]["value"] - result["means"]["base"]["value"]
        )
        assert model["effects"]["tuned"]["low"] > 0
    assert result["power"]["tuned"]["50"] > 0.9


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
    first = answers.table[~answers.table["repeat"]]
    odd = sum(prompt % 2 for prompt in favourite)
    assert (first["won"] == 1).sum() == 3 * odd
    result = analyse(answers)
    assert (result["won"], result["lost"], result["no_preference"]) == (3 * odd, 3 * (3 - odd), 3)
    assert result["steadiness"] == 1
    assert "mixed logistic model" in as_text(result)


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
    made(long_enough, tmp_path / "t", prompts=1)
    with pytest.raises(UserError, match="key would be lost"):
        make_test(long_enough, tmp_path / "t", ListeningSettings(**SMALL))


def hear(tab) -> None:
    """Play every clip of the trial at three times the speed, until it may be judged."""
    assert tab.locator("#choices input").first.is_disabled()
    for i in range(tab.locator("audio").count()):
        tab.locator("audio").nth(i).evaluate("a => { a.playbackRate = 3; a.muted = true; a.play(); }")
        until(tab, f"document.querySelectorAll('audio')[{i}].ended")
    until(tab, "!document.querySelector('#choices input').disabled")


@pytest.mark.parametrize("design", ["rating", "ab"])
def test_a_listener_answers_leaves_and_comes_back(browser, long_enough, tmp_path, design):
    _, data, _ = made(long_enough, tmp_path / "t", design=design, prompts=1, checks=1, repeats=0)
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
        tab.locator("#choices input").nth(1).focus()
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
    assert len(answers.table) == trials - 1
    assert said == []
