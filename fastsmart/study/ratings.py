"""Results of a listening test: means, differences that hold for other listeners and prompts, and power."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy import stats

from fastsmart.errors import UserError
from fastsmart.music.bootstrap import LEVEL
from fastsmart.music.style_information import heard_styles
from fastsmart.study.answers import Answer, Answers, Question, read_answers
from fastsmart.study.mixed import crossed_mean, crossed_power, sign_test

__all__ = ["LISTENERS", "analyse", "as_text", "read_answers"]

LISTENERS = (5, 10, 15, 20, 30, 50)  # of the power table
QUESTIONS: dict[str, tuple[Question, ...]] = {
    "rating": ("rating",),
    "ab": ("choice",),
    "sets": ("varied", "keep"),
    "styles": ("style",),
}
OF_TWO = ("choice", "varied")  # questions that compare two policies


def analyse(answers: Answers) -> dict[str, Any]:
    """The analysis as a tree for JSON: for every question means, differences between policies and power.

    Raises UserError where there are too few answers to compare two policies.
    """
    first = [a for a in answers.given if not a.repeat]
    trials = {(a.listener, a.prompt, a.policy if a.question in ("rating", "style") else "") for a in first}
    asked = {question: _question(question, first, answers) for question in QUESTIONS[answers.design]}
    if not any(part["differences"] for part in asked.values()):
        raise UserError("no answer tells the policies apart, so there is no difference to test; collect more")
    return {
        "design": answers.design,
        "policies": answers.policies,
        "listeners": len({a.listener for a in first}),
        "excluded": answers.excluded,
        "prompts": len({a.prompt for a in first}),
        "answers": len(trials),
        "steadiness": _steadiness(answers.given),
        "questions": asked,
    }


def _question(question: Question, first: list[Answer], answers: Answers) -> dict[str, Any]:
    given = [a for a in first if a.question == question]
    base, *others = answers.policies
    pairs = [("", "")] if question in OF_TWO else [(base, other) for other in others]
    tables = {other: _differences(given, *pair) for other, pair in zip(others, pairs, strict=True)}
    effects = {other: crossed_mean(table) for other, table in tables.items() if np.nan_to_num(table).any()}
    described: dict[str, Any] = _choices(given) if question in OF_TWO else {"means": _means(given, answers.policies)}
    if question == "style":
        described["heard"] = {policy: _heard([a for a in given if a.policy == policy]) for policy in answers.policies}
    return described | {
        "differences": {other: asdict(effect) for other, effect in effects.items()},
        "power": {
            other: {n: crossed_power(e.estimate, e.spread, n, e.prompts) for n in LISTENERS}
            for other, e in effects.items()
        },
    }


def _heard(given: list[Answer]) -> dict[str, Any]:
    """Confusion of the styles asked for and heard, and the bits between them, with an interval over clips."""
    if not given:
        return {}
    styles = sorted({a.asked for a in given})
    told = [a for a in given if a.heard in styles]  # a style that no clip was asked for is no column
    if not told or len(styles) < 2 or {a.asked for a in told} != set(styles):
        return {}
    found = heard_styles(styles, [a.asked for a in told], [a.heard for a in told], [a.prompt for a in told])
    return {
        "styles": styles,
        "confusion": found.confusion.round(4).tolist(),
        "information_bits": asdict(found.information.estimate()),
    }


def _means(given: list[Answer], policies: list[str]) -> dict[str, dict[str, float]]:
    by_policy = {policy: [a for a in given if a.policy == policy] for policy in policies}
    return {policy: _mean_over_listeners(answers) for policy, answers in by_policy.items() if answers}


def _differences(given: list[Answer], base: str, other: str) -> np.ndarray:
    """Rating of `other` minus that of `base` by each listener on each prompt, [L, P], NaN where one is missing.

    Answers that compare two policies are differences already; for them both labels are "". Several answers of a
    listener about one prompt count as their mean.
    """
    listeners = {name: i for i, name in enumerate(dict.fromkeys(a.listener for a in given))}
    prompts = {name: j for j, name in enumerate(dict.fromkeys(a.prompt for a in given))}
    total, count = np.zeros((2, 2, len(listeners), len(prompts)))
    for a in given:
        if a.policy in (base, other):
            place = int(a.policy == other), listeners[a.listener], prompts[a.prompt]
            total[place] += a.value
            count[place] += 1
    means = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return means[1] if base == other else means[1] - means[0]


def _choices(given: list[Answer]) -> dict[str, Any]:
    won, lost = sum(a.value > 0 for a in given), sum(a.value < 0 for a in given)
    by_listener: dict[str, float] = defaultdict(float)
    for a in given:
        by_listener[a.listener] += a.value
    second, first = sum(v > 0 for v in by_listener.values()), sum(v < 0 for v in by_listener.values())
    return {
        "won": won,
        "lost": lost,
        "no_preference": len(given) - won - lost,
        "listeners_for": {
            "second": second,
            "first": first,
            "sign_test_p": sign_test(second, first) if second + first else None,
        },
    }


def as_text(result: dict[str, Any]) -> str:
    """The analysis in sentences for a person."""
    base, *others = result["policies"]
    unit = "pairs of sets" if result["design"] == "sets" else "prompts"
    lines = [
        f"{result['listeners']} listeners, {result['prompts']} {unit}, {result['answers']} answers"
        + (f"; left out for failed attention checks: {', '.join(result['excluded'])}" if result["excluded"] else "")
    ]
    for question, part in result["questions"].items():
        say = SAID[question]
        lines += say(part, base, others, question)
        for other in others:
            if other not in part["differences"]:
                lines.append(f"  no answer tells {other} from {base} here")
                continue
            shown = ", ".join(f"{n}: {power:.0%}" for n, power in part["power"][other].items())
            lines.append(f"  chance to find this difference of {other} again, by number of listeners: {shown}")
    if result["steadiness"] is not None:
        lines.append(f"  repeated trials answered alike: {result['steadiness']:.0%}")
    return "\n".join(lines)


def _of_ratings(part: dict[str, Any], base: str, others: list[str], question: str) -> Iterable[str]:
    yield from (f"  {policy}: mean rating {_in_brackets(m, '.2f')}" for policy, m in part["means"].items())
    for other, e in part["differences"].items():
        yield f"  {other} over {base}: {_in_brackets(e, '+.2f')} points, {_of_test(e)}"


def _of_keeping(part: dict[str, Any], base: str, others: list[str], question: str) -> Iterable[str]:
    for policy, m in part["means"].items():
        yield f"  {policy}: one to keep in {_in_brackets(m, '.0%')} of the sets"
    for other, e in part["differences"].items():
        yield f"  {other} over {base}: {_in_brackets(e, '+.0%')} of the sets, {_of_test(e)}"


def _of_styles(part: dict[str, Any], base: str, others: list[str], question: str) -> Iterable[str]:
    for policy, m in part["means"].items():
        yield f"  {policy}: heard as asked in {_in_brackets(m, '.0%')} of the clips"
        if heard := part["heard"][policy]:
            bits = heard["information_bits"]
            yield (
                f"    between the style asked for and heard {_in_brackets(bits, '.2f')} bits (over clips; chance "
                f"{1 / len(heard['styles']):.0%} of {len(heard['styles'])} styles)"
            )
            for style, row in zip(heard["styles"], heard["confusion"], strict=True):
                shares = zip(heard["styles"], row, strict=True)
                yield f"    {style}: {', '.join(f'{name} {share:.0%}' for name, share in shares if share)}"
    for other, e in part["differences"].items():
        yield f"  {other} over {base}: {_in_brackets(e, '+.0%')} of the clips, {_of_test(e)}"


def _of_choices(part: dict[str, Any], base: str, others: list[str], question: str) -> Iterable[str]:
    (other,), listeners = others, part["listeners_for"]
    chosen = "chosen over" if question == "choice" else "called more varied than"
    yield (
        f"  {other} {chosen} {base} {part['won']} times, the reverse {part['lost']} times, neither "
        f"{part['no_preference']} times"
    )
    yield f"  mostly for {other}: {listeners['second']} listeners; mostly for {base}: {listeners['first']}"
    for e in part["differences"].values():
        share = {name: min(max((1 + e[name]) / 2, 0.0), 1.0) for name in ("estimate", "low", "high")}
        yield f"  share for {other}, neither counted half to each: {_in_brackets(share, '.0%')}, {_of_test(e)}"


SAID = {
    "rating": _of_ratings,
    "keep": _of_keeping,
    "choice": _of_choices,
    "varied": _of_choices,
    "style": _of_styles,
}


def _in_brackets(number: dict[str, Any], form: str) -> str:
    value = number["value"] if "value" in number else number["estimate"]
    return f"{value:{form}} [{number['low']:{form}}, {number['high']:{form}}]"


def _of_test(effect: dict[str, Any]) -> str:
    return f"p = {effect['p']:.2g} (over listeners and prompts; {effect['pairs']} comparisons)"


def _steadiness(given: list[Answer]) -> float | None:
    """Share of repeated answers that are as the first: the same choice, or ratings at most one point apart."""

    def place(a: Answer) -> tuple[str, str, str, str]:
        return a.listener, a.prompt, a.question, a.policy

    before = {place(a): a for a in given if not a.repeat}
    again = [(a, before[place(a)]) for a in given if a.repeat and place(a) in before]
    apart = [abs(a.value - b.value) <= (a.question == "rating") and a.heard == b.heard for a, b in again]
    return float(np.mean(apart)) if apart else None


def _mean_over_listeners(given: list[Answer]) -> dict[str, float]:
    """Mean of the listeners' means, with Student's t interval over listeners."""
    by_listener: dict[str, list[float]] = defaultdict(list)
    for a in given:
        by_listener[a.listener].append(a.value)
    means = np.array([np.mean(values) for values in by_listener.values()])
    half = 0.0
    if len(means) > 1:
        half = stats.t.ppf(0.5 + LEVEL / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    return {"value": float(means.mean()), "low": float(means.mean() - half), "high": float(means.mean() + half)}
