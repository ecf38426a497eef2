"""A small listening test, and listeners who answer as they are told."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

from fastsmart.study.listening import ListeningSettings, make_test

SMALL = {"prompts": 3, "seconds": 5.0}


def made(evaluation, folder, **settings) -> tuple[str, dict, dict]:
    """A test made in a folder: its page, the data in it, and its key."""
    page, key = make_test(evaluation, folder, ListeningSettings(**(SMALL | settings)))
    text = page.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="notes">(.*?)</script>', text).group(1)), json.loads(key.read_text())


def sound(url: str) -> bytes:
    return base64.b64decode(url.split(",", 1)[1])


def answered(data: dict, key: dict, listener: str, answer: Callable[[list[str]], Any], session: str) -> dict:
    """What a listener's page would save."""
    answers = [
        {"trial": t["id"], "clips": t["clips"], "answer": key["checks"].get(t["id"]) or answer(t["clips"])}
        for t in data["trials"]
    ]
    return {"study": data["study"], "listener": listener, "session": session, "answers": answers}


def judged(key: dict, varied: str, keep: set[str]) -> Callable[[list[str]], dict]:
    """A listener who calls sets of one policy more varied, and would keep a clip of some policies' sets."""

    def answer(clips):
        by_policy = {key["clips"][clip]["policy"]: clip for clip in clips}
        return {"varied": by_policy.get(varied, "none"), "keep": {c: p in keep for p, c in by_policy.items()}}

    return answer


def is_one_sentence(said: str, file: str) -> bool:
    """Whether a refusal is one sentence that names the file, or the option."""
    return said.count("\n") == 1 and said.startswith("fastsmart: ") and file in said and len(said) < 600
