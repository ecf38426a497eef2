"""Whether what is read from a run folder has the form that a run writes.

Power cuts, full disks and editors leave other things there; readers skip those and say how many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

LARGEST = 1e100  # also refuses NaN
_TIMES = ("step", "tokens_per_s", "clips_per_s")
_SHOWN = ("kl", "kl_per_completion", "entropy")


def whole_metrics(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl has all that `top`, the curves and the tables read of it."""
    if "reward" in line and not _whole_step(line):
        return False
    if "eval" in line and not _whole_evaluation(line["eval"]):
        return False
    return "health" not in line or _whole_health(line["health"])


def whole_live(live: object) -> bool:
    """Whether live.json has what `top` reads of it."""
    if not isinstance(live, Mapping):
        return False
    if not (
        type(live.get("pid")) is int
        and 0 < live["pid"] < 2**31
        and isinstance(live.get("host"), str)
        and is_number(live.get("time"))
    ):
        return False
    if "stage" in live and not (isinstance(live["stage"], str) and {"done", "total"} <= live.keys()):
        return False
    return _each(live.get("workers", []), _whole_worker)


def is_number(value: object) -> bool:
    """Whether it is a number that can be calculated with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_value(value: object) -> bool:
    """A number, or null, which stands for one that is not finite."""
    return value is None or is_number(value)


def _whole_step(line: Mapping[str, Any]) -> bool:
    time, terms = line.get("time"), line.get("terms")
    return (
        _is_value(line["reward"])
        and is_number(line.get("notes"))
        and all(_is_value(line.get(key)) for key in _SHOWN)
        and isinstance(terms, Mapping)
        and all(map(_is_value, terms.values()))
        and isinstance(line.get("styles", {}), Mapping)
        and all(isinstance(of, Mapping) and all(map(_is_value, of.values())) for of in line.get("styles", {}).values())
        and isinstance(time, Mapping)
        and all(is_number(time.get(key)) for key in _TIMES)
        and all(is_number(value) for key, value in time.items() if key != "idle")
        and isinstance(time.get("idle", {}), Mapping)
        and all(map(is_number, time.get("idle", {}).values()))
    )


def _whole_evaluation(evaluation: object) -> bool:
    if not isinstance(evaluation, Mapping) or type(evaluation.get("clips")) is not int:
        return False
    tables = [evaluation.get("terms"), evaluation.get("features")]
    if not all(isinstance(table, Mapping) for table in tables) or not _are_moments(evaluation.get("reward")):
        return False
    diversity = evaluation.get("diversity", {})
    return (
        all(_are_moments(moments) for table in tables for moments in table.values())  # type: ignore[union-attr]
        and "notes" in evaluation["features"]
        and isinstance(diversity, Mapping)
        and all(map(_is_value, diversity.values()))
    )


def _whole_health(health: object) -> bool:
    if not isinstance(health, Mapping) or not all(is_number(health.get(key)) for key in ("rss_mb", "files")):
        return False
    counts = (value for key, value in health.items() if key != "notes")
    return all(map(is_number, counts)) and _each(health.get("notes", []), lambda note: isinstance(note, str))


def _whole_worker(worker: object) -> bool:
    keys = ("pid", "in_hand", "silent_s")
    return isinstance(worker, Mapping) and all(is_number(worker.get(key)) for key in keys)


def _are_moments(moments: object) -> bool:
    return isinstance(moments, Mapping) and all(key in moments and _is_value(moments[key]) for key in ("mean", "std"))


def _each(values: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(values, list) and all(map(holds, values))
