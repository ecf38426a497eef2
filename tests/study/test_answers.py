"""Files that listeners send back: whatever is wrong with one, a sentence names it, and nothing in it is trusted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from listeners import answered, is_one_sentence, judged

from fastsmart.cli import main
from fastsmart.study.answers import read_answers
from fastsmart.study.ratings import analyse


def put(tree, path, value):
    """A copy of a JSON tree with one place replaced, or left out where the value is `...`."""
    tree = json.loads(json.dumps(tree))
    *way, last = path
    place = tree
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return tree


HUGE = [10**400, 1e308, float("inf"), float("nan")]
DAMAGED_ANSWERS = {
    "answers no list": [(["answers"], bad) for bad in (5, "x", None, {"a": 1})],
    "an answer that is none": [(["answers", 0], bad) for bad in (None, [], 3, "x", {})],
    "no trial": [(["answers", 0, "trial"], bad) for bad in (..., None, 3, [], {}, "unknown")],
    "no clips": [(["answers", 0, "clips"], bad) for bad in (..., None, [], 3, "x", [3], ["unknown"], [[]])],
    "no rating": [(["answers", 0, "answer"], bad) for bad in (..., None, "good", [], {}, True, 0, 6, 2.5, *HUGE)],
    "session": [(["session"], bad) for bad in (3, [], None, {})],
    "listener": [(["listener"], bad) for bad in (3, [], None)],
    "study": [(["study"], bad) for bad in (3, [], None, ...)],
}
DAMAGED_KEYS = {
    "trials": [(["trials"], bad) for bad in (5, [], None, {"x": 3}, {"x": {"clips": ["?"], "repeat": False}})],
    "policies": [(["policies"], bad) for bad in ([], 3, ["base"], ["base", "base"], [3, 4], None, ["a", "b"])],
    "clips": [(["clips"], bad) for bad in ([], 3, {"x": 3}, {}, None)],
    "checks": [(["checks"], bad) for bad in ([], 3, {"x": []}, None)],
    "design": [(["design"], bad) for bad in ("rated", [], 3, None, "ab", "sets", ...)],
    "study": [(["study"], bad) for bad in (3, [], None)],
}


def analysed(tmp_path, capsys, answers: str, key: str) -> tuple[int, str]:
    """Exit code and error of `listen analyse` on two files of that text."""
    (tmp_path / "answers.json").write_text(answers)
    (tmp_path / "key.json").write_text(key)
    code = main(["listen", "analyse", str(tmp_path / "answers.json"), "--key", str(tmp_path / "key.json")])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("kind", DAMAGED_ANSWERS)
def test_damaged_answers_are_refused_by_the_name_of_their_file(kind, rating_test, tmp_path, capsys):
    """These files come by e-mail from people we do not know."""
    _, data, key = rating_test
    good = answered(data, key, "Ada", lambda clips: 3, "0" * 16)
    good["answers"].sort(key=lambda a: a["trial"] in key["checks"])
    for path, bad in DAMAGED_ANSWERS[kind]:
        code, said = analysed(tmp_path, capsys, json.dumps(put(good, path, bad)), json.dumps(key))
        assert (code, is_one_sentence(said, "answers.json")) == (2, True), (path, bad, said)


@pytest.mark.parametrize("kind", DAMAGED_KEYS)
def test_damaged_keys_are_refused_by_the_name_of_their_file(kind, rating_test, tmp_path, capsys):
    _, data, key = rating_test
    good = json.dumps(answered(data, key, "Ada", lambda clips: 3, "0" * 16))
    for path, bad in DAMAGED_KEYS[kind]:
        code, said = analysed(tmp_path, capsys, good, json.dumps(put(key, path, bad)))
        assert (code, is_one_sentence(said, "key.json")) == (2, True), (path, bad, said)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"x"', "[" * 100_000, "\0\0", '{"a": ' + "9" * 5000 + "}", "{}"]
)
def test_what_is_no_such_file_at_all_is_refused_too(text, rating_test, tmp_path, capsys):
    _, data, key = rating_test
    good = answered(data, key, "Ada", lambda clips: 3, "0" * 16)
    for pair, named in (((text, json.dumps(key)), "answers.json"), ((json.dumps(good), text), "key.json")):
        code, said = analysed(tmp_path, capsys, *pair)
        assert (code, is_one_sentence(said, named)) == (2, True), (named, said)


def test_an_answer_given_twice_and_a_set_judged_by_half_are_refused(sets_test, tmp_path, capsys):
    _, data, key = sets_test
    good = answered(data, key, "Ada", judged(key, "base", set()), "0" * 16)
    music = next(i for i, a in enumerate(good["answers"]) if a["trial"] not in key["checks"])
    bad = [put(good, ["answers"], good["answers"] + [good["answers"][music]])]
    bad += [put(good, ["answers", music, "answer"], value) for value in ({}, {"varied": "none"}, "none", None)]
    clips = good["answers"][music]["clips"]
    for keep in ({}, {clips[0]: True}, dict.fromkeys(clips, "yes"), [True, False], None):
        bad.append(put(good, ["answers", music, "answer"], {"varied": "none", "keep": keep}))
    for tree in bad:
        code, said = analysed(tmp_path, capsys, json.dumps(tree), json.dumps(key))
        assert (code, is_one_sentence(said, "answers.json")) == (2, True), said


def test_a_listener_alone_or_without_answers_gets_a_sentence(rating_test, tmp_path, capsys):
    _, data, key = rating_test
    taste = answered(data, key, "Ada", lambda clips: 3 + (key["clips"][clips[0]]["policy"] == "base"), "0" * 16)
    code, said = analysed(tmp_path, capsys, json.dumps(taste), json.dumps(key))
    assert code == 2
    assert "at least two listeners" in said
    code, said = analysed(tmp_path, capsys, json.dumps(taste | {"answers": []}), json.dumps(key))
    assert code == 2
    assert "no listener has answered" in said


def test_a_stranger_cannot_steer_the_terminal(rating_test, tmp_path):
    _, data, key = rating_test
    (tmp_path / "key.json").write_text(json.dumps(key))
    name = "\x1b]0;owned\x07\n[red]" + "x" * 5000
    for k in range(2):
        answers = answered(data, key, name, lambda clips: 3, f"{k}\x1b" * 8)
        next(a for a in answers["answers"] if a["trial"] in key["checks"])["answer"] = 0
        (tmp_path / f"{k}.json").write_text(json.dumps(answers))
    found = read_answers([tmp_path / "0.json"], tmp_path / "key.json", keep_inattentive=True)
    (said,) = found.listeners
    assert said.isprintable()
    assert len(said) < 60


def test_analysis_needs_nothing_but_what_fastsmart_is_installed_with(rating_test, tmp_path):
    """`make demo` installs neither pandas nor statsmodels."""
    _, data, key = rating_test
    (tmp_path / "key.json").write_text(json.dumps(key))
    for k in range(3):
        taste = answered(data, key, "Ada", lambda clips: 3 + (key["clips"][clips[0]]["policy"] == "base"), f"{k}" * 16)
        (tmp_path / f"{k}.json").write_text(json.dumps(taste))
    code = (
        "import sys; sys.modules['pandas'] = sys.modules['statsmodels'] = None; from fastsmart.cli import main;"
        f"sys.exit(main(['listen', 'analyse', {str(tmp_path)!r}, '--key', {str(tmp_path / 'key.json')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 listeners, 3 prompts" in done.stdout


def test_several_clips_of_one_prompt_count_as_their_mean(rating_test, tmp_path):
    """Prompts that open alike are one: a listener's answers about them are no independent ones."""
    _, data, key = rating_test
    key = json.loads(json.dumps(key))
    _, *same = sorted({origin["prompt"] for origin in key["clips"].values()})
    for origin in key["clips"].values():
        origin["prompt"] = "opening" if origin["prompt"] in same else "another"
    (tmp_path / "key.json").write_text(json.dumps(key))
    files = [tmp_path / f"{k}.json" for k in range(3)]
    for k, file in enumerate(files):
        taste = answered(data, key, "Ada", lambda clips: 3 + (key["clips"][clips[0]]["policy"] == "base"), f"{k}" * 16)
        file.write_text(json.dumps(taste))
    found = analyse(read_answers(files, tmp_path / "key.json"))["questions"]["rating"]["differences"]["tuned"]
    assert (found["prompts"], found["pairs"]) == (2, 6)
    assert found["estimate"] == pytest.approx(-1.0)
