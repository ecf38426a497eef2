"""Findings of an evaluation, in sentences: what changed, by how much, how sure, and at what price in diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastsmart.music.bootstrap import Estimate
from fastsmart.music.diversity import LESS_IS_MORE
from fastsmart.study.evaluation import Evaluation, Metric

MOST = 3  # features named in a sentence


@dataclass(frozen=True)
class Findings:
    """The sentences about one policy, against the first; "" where there is nothing to say."""

    label: str
    reward: str
    baseline: str
    music: str
    price: str
    faults: str


def findings(evaluation: Evaluation) -> list[Findings]:
    """The findings about every policy after the first."""
    return [_about(evaluation, p.label) for p in evaluation.policies[1:]]


def _about(evaluation: Evaluation, label: str) -> Findings:
    first = evaluation.labels[0]
    reward = evaluation.metric("reward", "reward")
    old, new, change = reward.values[first], reward.values[label], reward.changes[label]
    unit = reward.spread[first]
    scaled = f", {change.value / unit:+.2f} standard deviations" if unit else ""
    sure = "" if change.is_sure else "; the interval includes no change at all"
    return Findings(
        label,
        f"Reward went from {old.value:.2f} to {new.value:.2f}: {_interval(change, '+.2f')}{scaled}{sure}.",
        _baseline(evaluation, label),
        _music(evaluation, label),
        _price(evaluation, label),
        _faults(evaluation, label),
    )


def _baseline(evaluation: Evaluation, label: str) -> str:
    curve, margin = evaluation.record["best_of"], evaluation.record["against_best_of"].get(label)
    if not curve or margin is None:
        return ""
    best, e = curve[-1], Estimate(margin["value"], margin["low"], margin["high"])
    verdict = "does not differ from" if not e.is_sure else "beats" if e.value > 0 else "falls short of"
    return (
        f"It {verdict} the best of {best['n']} outputs of {evaluation.labels[0]} for each prompt, which reach "
        f"{best['reward']['value']:.2f} without any training: {_interval(e, '+.2f')}."
    )


def _music(evaluation: Evaluation, label: str) -> str:
    first = evaluation.labels[0]

    def size(metric: Metric) -> float:
        return abs(metric.changes[label].value) / (metric.spread[first] or math.inf)

    moved = [m for m in evaluation.metrics if m.group == "feature" and m.changes[label].is_sure]
    moved = sorted(moved, key=size, reverse=True)[:MOST]
    if not moved:
        return "No feature of the music changed beyond chance."
    parts = [f"{_words(m)} {_from_to(m, first, label)}" for m in moved]
    return f"What changed most in the music: {'; '.join(parts)}."


def _price(evaluation: Evaluation, label: str) -> str:
    """Diversity metrics that fell beyond chance, and those that rose."""
    first = evaluation.labels[0]
    known = [
        m
        for m in evaluation.diversity()
        if math.isfinite(m.changes[label].value)  # some need the training pieces
    ]
    lost: list[str] = []
    gained: list[str] = []
    for m in known:
        if m.changes[label].is_sure:
            more = (m.changes[label].value > 0) != (m.name in LESS_IS_MORE)
            (gained if more else lost).append(f"{_words(m)} {_from_to(m, first, label)}")
    price = f"{len(lost)} of {len(known)} diversity metrics fell beyond chance"
    price += f": {'; '.join(lost)}." if lost else "."
    return price + (f" More diverse by: {'; '.join(gained)}." if gained else "")


def _faults(evaluation: Evaluation, label: str) -> str:
    shares = [m for m in evaluation.metrics if m.group == "share" and m.values[label].value > 0]
    parts = [f"{_words(m)} {_from_to(m, evaluation.labels[0], label, '.1%')}" for m in shares]
    return f"Faults: {'; '.join(parts)}." if parts else "No output was empty and none failed to be scored."


def _from_to(metric: Metric, first: str, label: str, form: str = "#.3g") -> str:
    return f"{metric.values[first].value:{form}} → {metric.values[label].value:{form}}"


def _words(metric: Metric) -> str:
    return metric.name.replace("_", " ") + (" (less is more diverse)" if metric.name in LESS_IS_MORE else "")


def _interval(e: Estimate, form: str) -> str:
    return f"{e.value:{form}} (95 % interval {e.low:{form}} to {e.high:{form}})"
