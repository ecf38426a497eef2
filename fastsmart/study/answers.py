"""Answers of listeners: their files read with the key of the test.

Answer files come by e-mail from people we do not know, so nothing in them is taken on trust: what does not fit the key
is refused in one sentence that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file
from fastsmart.study.listening import DESIGNS, OF_ONE_CLIP, RATINGS

NO_PREFERENCE = "none"
LONGEST_NAME = 40  # characters of a listener's name, as on the page
Question = Literal["rating", "choice", "varied", "keep", "style"]


@dataclass(frozen=True)
class Answer:
    """One answer about music, with the key put in.

    prompt   : the opening, or the set, that the policies are compared on
    question : "rating", "keep" and "style" are of one policy; "choice" and "varied" compare the second policy with the
               first
    policy   : label of the policy judged; "" where two are compared
    value    : points; 1 or 0 for one to keep or none, or for a style heard as asked or not; 1, 0, -1 for the second
               policy chosen, neither, the first
    repeat   : whether the listener had answered the same before
    asked, heard : of "style", the style that the clip was asked for, and the one it was taken for
    """

    listener: str
    prompt: str
    question: Question
    policy: str
    value: float
    repeat: bool
    asked: str = ""
    heard: str = ""


@dataclass(frozen=True)
class Answers:
    """The answers of all listeners.

    listeners : attention checks passed and asked, by listener
    excluded  : listeners whose answers are left out because they failed a check
    """

    design: str
    policies: list[str]
    given: list[Answer]
    listeners: dict[str, tuple[int, int]]
    excluded: list[str]


def read_answers(files: Sequence[str | Path], key_file: str | Path, keep_inattentive: bool = False) -> Answers:
    """Listeners' files read with the key; of one listener's several files, the one with most answers counts.

    Raises UserError naming the file that cannot be read, is damaged or belongs to another test.
    """
    key = _key(key_file)
    sessions: dict[str, dict[str, Any]] = {}
    for file in files:
        result = _result(file, key, key_file)
        kept = sessions.get(result["session"])
        if kept is None or len(result["answers"]) > len(kept["answers"]):
            sessions[result["session"]] = result
    if not sessions:
        raise UserError("no answers; name the files that listeners sent back")

    given: list[Answer] = []
    listeners: dict[str, tuple[int, int]] = {}
    excluded = []
    for session, result in sorted(sessions.items()):
        name = f"{_plain(result['listener'])} {_plain(session)[:6]}"
        checks = [key["checks"][a["trial"]] == a["answer"] for a in result["answers"] if a["trial"] in key["checks"]]
        listeners[name] = sum(checks), len(checks)
        if not all(checks) and not keep_inattentive:
            excluded.append(name)
            continue
        music = [answer for answer in result["answers"] if answer["trial"] not in key["checks"]]
        given += [one for answer in music for one in _answered(name, answer, key)]
    if not given and excluded:
        raise UserError("every listener failed an attention check; add --keep-inattentive to analyse them all the same")
    if not given:
        raise UserError("no listener has answered anything about music; wait for more files")
    return Answers(key["design"], key["policies"], given, listeners, excluded)


def _answered(name: str, answer: dict[str, Any], key: dict[str, Any]) -> list[Answer]:
    """An answer that fits the key, as one `Answer` for every question of its trial."""
    clips = {clip: key["clips"][clip] for clip in answer["clips"]}
    prompt = str(next(iter(clips.values()))["prompt"])
    repeat = key["trials"][answer["trial"]]["repeat"]
    value = answer["answer"]
    if key["design"] == "rating":
        return [Answer(name, prompt, "rating", next(iter(clips.values()))["policy"], float(value), repeat)]
    if key["design"] == "styles":
        (clip,) = clips.values()
        right = float(value == clip["style"])
        return [Answer(name, prompt, "style", clip["policy"], right, repeat, clip["style"], value)]

    def chosen(clip: str) -> float:
        return 0.0 if clip == NO_PREFERENCE else 1.0 if clips[clip]["policy"] == key["policies"][1] else -1.0

    if key["design"] == "ab":
        return [Answer(name, prompt, "choice", "", chosen(value), repeat)]
    keep = [Answer(name, prompt, "keep", clips[c]["policy"], float(kept), repeat) for c, kept in value["keep"].items()]
    return [Answer(name, prompt, "varied", "", chosen(value["varied"]), repeat), *keep]


def _key(file: str | Path) -> dict[str, Any]:
    """The key, whole; raises UserError where it is not."""
    key = _json(file, "not the key of a listening test; it is the key.json that listen make wrote")
    if not {"study", "clips", "trials", "checks", "policies", "design"} <= key.keys():
        raise UserError(f"{file} is not the key of a listening test; it is the key.json that listen make wrote")

    def need(sound: bool, part: str) -> None:
        if not sound:
            raise UserError(f"{file} is a damaged key: {part}; take the key.json that listen make wrote")

    need(isinstance(key["study"], str), '"study" is no text')
    need(isinstance(key["design"], str) and key["design"] in DESIGNS, f'"design" is none of {", ".join(DESIGNS)}')
    policies = key["policies"]
    labels = isinstance(policies, list) and all(isinstance(p, str) for p in policies)
    need(labels and len(set(policies)) == len(policies) >= 2, '"policies" is no list of two or more labels')
    alone = key["design"] in OF_ONE_CLIP
    need(alone or len(policies) == 2, f'"policies" are {len(policies)}, not two')
    styles = key.get("styles", [])
    need(isinstance(styles, list) and all(isinstance(s, str) for s in styles), '"styles" is no list of names')
    clips, trials, checks = key["clips"], key["trials"], key["checks"]
    need(isinstance(clips, dict) and all(_is_origin(o, policies) for o in clips.values()),
         '"clips" do not all name a policy and a prompt')  # fmt: skip
    if key["design"] == "styles":
        need(all(origin.get("style") in styles for origin in clips.values()), '"clips" do not all have a style')
    need(isinstance(checks, dict) and all(isinstance(c, str | int) for c in checks.values()),
         '"checks" do not all have an answer')  # fmt: skip
    music = {name: t for name, t in trials.items() if name not in checks} if isinstance(trials, dict) else {}
    need(isinstance(trials, dict) and all(_is_trial(t, clips) for t in music.values()),
         '"trials" do not all name clips of the key')  # fmt: skip
    if alone:
        need(all(len(t["clips"]) == 1 for t in music.values()), '"trials" do not all have one clip')
    else:
        pairs = [[clips[c] for c in t["clips"]] for t in music.values()]
        sound = all(
            len(p) == 2 and p[0]["prompt"] == p[1]["prompt"] and p[0]["policy"] != p[1]["policy"] for p in pairs
        )
        need(sound, '"trials" do not all pair two policies on one prompt')
    return key | {"trials": music}


def _is_origin(origin: Any, policies: list[str]) -> bool:
    return (
        isinstance(origin, dict)
        and origin.get("policy") in policies
        and isinstance(origin.get("prompt"), str | int | float | list)
    )


def _is_trial(trial: Any, clips: dict[str, Any]) -> bool:
    if not (isinstance(trial, dict) and isinstance(trial.get("clips"), list) and trial["clips"]):
        return False
    return isinstance(trial.get("repeat"), bool) and all(isinstance(c, str) and c in clips for c in trial["clips"])


def _result(file: str | Path, key: dict[str, Any], key_file: str | Path) -> dict[str, Any]:
    """A listener's file, every answer of which fits the key; raises UserError where one does not."""
    result = _json(file, "no file of answers that the listening page saves")
    if not {"study", "listener", "answers", "session"} <= result.keys():
        raise UserError(f"{file} holds no answers of a listening test; name the files that the listening page saved")
    if result["study"] != key["study"]:
        raise UserError(
            f"{file} answers another listening test than the one of {key_file}; analyse it with its own key"
        )
    for part in ("listener", "session"):
        if not isinstance(result[part], str):
            raise UserError(_damaged(file, f'"{part}" is no text'))
    if not isinstance(result["answers"], list):
        raise UserError(_damaged(file, '"answers" is no list'))
    seen: set[str] = set()
    for number, answer in enumerate(result["answers"], 1):
        wrong = _wrong(answer, key)
        if not wrong and answer["trial"] in seen:
            wrong = "is of a trial that was answered before"
        if wrong:
            raise UserError(_damaged(file, f"answer {number} {wrong}"))
        seen.add(answer["trial"])
    return result


def _damaged(file: str | Path, what: str) -> str:
    return f"{file} is damaged or was edited: {what}; ask the listener to send it again, or leave it out"


def _wrong(answer: Any, key: dict[str, Any]) -> str:
    """Fault of an answer, in words; "" = none."""
    if not isinstance(answer, dict):
        return "is no answer"
    if not isinstance(answer.get("trial"), str):
        return 'has no "trial"'
    trial, clips, value = answer["trial"], answer.get("clips"), answer.get("answer")
    if not isinstance(clips, list) or not clips or not all(isinstance(c, str) for c in clips):
        return 'has no "clips"'
    if trial in key["checks"]:
        fits = isinstance(value, int | str) and not isinstance(value, bool)
        return "" if fits else 'has an "answer" that the page does not offer'
    if trial not in key["trials"] or sorted(clips) != sorted(key["trials"][trial]["clips"]):
        return "is of a trial or clip that the key does not know"
    offered = {"rating": _is_rating, "ab": _is_choice, "sets": _is_judgement_of_sets}
    if key["design"] == "styles":
        fits = isinstance(value, str) and value in key["styles"]
    else:
        fits = offered[key["design"]](value, clips)
    return "" if fits else 'has an "answer" that the page does not offer'


def _is_rating(value: Any, clips: list[str]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= len(RATINGS)


def _is_choice(value: Any, clips: list[str]) -> bool:
    return isinstance(value, str) and value in (*clips, NO_PREFERENCE)


def _is_judgement_of_sets(value: Any, clips: list[str]) -> bool:
    if not isinstance(value, Mapping) or not _is_choice(value.get("varied"), clips):
        return False
    keep = value.get("keep")
    return isinstance(keep, dict) and keep.keys() == set(clips) and all(isinstance(k, bool) for k in keep.values())


def _plain(text: str) -> str:
    """A stranger's text without what could steer a terminal, and not too long for a line."""
    return "".join(c if c.isprintable() else "?" for c in text)[:LONGEST_NAME]


def _json(file: str | Path, otherwise: str) -> dict[str, Any]:
    """A JSON object; raises UserError saying what the file is not."""
    try:
        tree = json.loads(read_file(file).decode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}; check the name") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is {otherwise}: it cannot be read as JSON") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file} is {otherwise}")
    return tree
