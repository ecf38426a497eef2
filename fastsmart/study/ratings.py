"""What listeners answered, read back with the key and analysed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from fastsmart.errors import UserError
from fastsmart.music.bootstrap import LEVEL
from fastsmart.study.mixed import (
    EFFECTS,
    Effect,
    MixedResult,
    choice_power,
    linear_mixed,
    logistic_mixed,
    rating_power,
    sign_test,
)

if TYPE_CHECKING:
    import pandas as pd

LISTENERS = (5, 10, 15, 20, 30, 50)  # of the power table
NO_PREFERENCE = "none"


@dataclass(frozen=True)
class Answers:
    """The answers of all listeners, with the key put in.

    table    : DataFrame, a row an answer about music, with `listener`, `prompt`, `repeat` and, for ratings, `policy`,
               `clip` and `rating`; for choices `won`: 1 where the second policy was chosen, 0 the first, NaN neither
    listeners : attention checks passed and asked, by listener
    excluded : listeners left out of `table` because they failed a check
    """

    design: str
    policies: list[str]
    table: pd.DataFrame
    listeners: dict[str, tuple[int, int]]
    excluded: list[str]


def read_answers(files: Sequence[str | Path], key_file: str | Path, keep_inattentive: bool = False) -> Answers:
    """Listeners' files read with the key; of one listener's several files, the one with most answers counts.

    Raises UserError naming the file that cannot be read or belongs to another test.
    """
    import pandas as pd

    key = _json(key_file)
    if not {"study", "clips", "trials", "checks", "policies", "design"} <= key.keys():
        raise UserError(f"{key_file} is not the key of a listening test; it is the key.json that listen make wrote")
    sessions: dict[str, dict[str, Any]] = {}
    for file in files:
        result = _json(file)
        if not {"study", "listener", "answers", "session"} <= result.keys():
            raise UserError(f"{file} holds no answers of a listening test")
        if result["study"] != key["study"]:
            raise UserError(f"{file} answers another listening test than the one of {key_file}")
        kept = sessions.get(result["session"])
        if kept is None or len(result["answers"]) > len(kept["answers"]):
            sessions[result["session"]] = result | {"file": str(file)}
    if not sessions:
        raise UserError("no answers; name the files that listeners sent back")

    rows, listeners, excluded = [], {}, []
    for session, result in sorted(sessions.items()):
        name = f"{result['listener']} {session[:6]}"
        checks = [key["checks"][a["trial"]] == a["answer"] for a in result["answers"] if a["trial"] in key["checks"]]
        listeners[name] = sum(checks), len(checks)
        if not all(checks) and not keep_inattentive:
            excluded.append(name)
            continue
        music = [answer for answer in result["answers"] if answer["trial"] not in key["checks"]]
        rows += [{"listener": name} | _row(answer, key, result["file"]) for answer in music]
    if not rows:
        raise UserError("every listener failed an attention check; add --keep-inattentive to analyse them all the same")
    return Answers(key["design"], key["policies"], pd.DataFrame(rows), listeners, excluded)


def analyse(answers: Answers) -> dict[str, Any]:
    """The analysis as a tree for JSON: means, mixed models with and without clips as an effect, tests, power."""
    first = answers.table[~answers.table["repeat"]]
    common: dict[str, Any] = {
        "design": answers.design,
        "policies": answers.policies,
        "listeners": first["listener"].nunique(),
        "excluded": answers.excluded,
        "prompts": first["prompt"].nunique(),
        "answers": len(first),
        "steadiness": _steadiness(answers),
    }
    return common | (_ratings(answers, first) if answers.design == "rating" else _choices(first))


def _ratings(answers: Answers, table: pd.DataFrame) -> dict[str, Any]:
    base, *others = answers.policies
    prompts = table["prompt"].nunique()
    models = {
        "listeners and prompts": linear_mixed(table, base),
        "listeners, prompts and clips": linear_mixed(table, base, (*EFFECTS, "clip")),
    }
    careful = models["listeners, prompts and clips"]
    return {
        "means": {
            policy: _mean_over_listeners(table[table["policy"] == policy], "rating") for policy in answers.policies
        },
        "models": {name: _tree(model) for name, model in models.items()},
        "power": {
            policy: {n: rating_power(careful.effects[policy].estimate, careful.spread, n, prompts) for n in LISTENERS}
            for policy in others
        },
    }


def _choices(table: pd.DataFrame) -> dict[str, Any]:
    made = table.dropna(subset=["won"])
    won, lost = int((made["won"] == 1).sum()), int((made["won"] == 0).sum())
    share = made.groupby("listener")["won"].mean()
    for_second, for_first = int((share > 0.5).sum()), int((share < 0.5).sum())
    interval = stats.binomtest(won, won + lost).proportion_ci(LEVEL) if won + lost else None
    model = logistic_mixed(made.assign(won=made["won"].astype(int)))
    preference = won / (won + lost) if won + lost else 0.5
    effect = model.intercept
    return {
        "won": won,
        "lost": lost,
        "no_preference": len(table) - len(made),
        "share_won": {"value": preference, "low": interval.low, "high": interval.high} if interval else None,
        "sign_test_p": sign_test(won, lost),
        "listeners_for": {"second": for_second, "first": for_first, "sign_test_p": sign_test(for_second, for_first)},
        "model": _tree(model)
        | {"chance_to_win": dict(zip(("value", "low", "high"), map(_logistic, _triple(effect)), strict=True))},
        "power": {n: choice_power(preference, n, table["prompt"].nunique()) for n in LISTENERS},
    }


def as_text(result: dict[str, Any]) -> str:
    """The analysis in sentences for a person."""
    base, *others = result["policies"]
    lines = [
        f"{result['listeners']} listeners, {result['prompts']} prompts, {result['answers']} answers"
        + (f"; left out for failed attention checks: {', '.join(result['excluded'])}" if result["excluded"] else "")
    ]
    if result["design"] == "rating":
        for policy, m in result["means"].items():
            lines.append(f"  {policy}: mean rating {m['value']:.2f} [{m['low']:.2f}, {m['high']:.2f}]")
        for name, model in result["models"].items():
            for policy, e in model["effects"].items():
                lines.append(
                    f"  {policy} over {base}, mixed model with {name}: {e['estimate']:+.2f} "
                    f"[{e['low']:+.2f}, {e['high']:+.2f}], p = {e['p']:.2g}"
                )
        powers = result["power"]
    else:
        other, share = others[0], result["share_won"]
        lines.append(
            f"  {other} chosen over {base} {result['won']} times, the reverse {result['lost']} times, no preference "
            f"{result['no_preference']} times; sign test p = {result['sign_test_p']:.2g}"
        )
        if share:
            lines.append(
                f"  share of choices for {other}: {share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"
            )
        chance = result["model"]["chance_to_win"]
        lines.append(
            f"  mixed logistic model, chance that {other} is chosen: {chance['value']:.0%} "
            f"[{chance['low']:.0%}, {chance['high']:.0%}], p = {result['model']['intercept']['p']:.2g}"
        )
        powers = {other: result["power"]}
    for policy, table in powers.items():
        shown = ", ".join(f"{n}: {power:.0%}" for n, power in table.items())
        lines.append(f"  power to find this difference of {policy} again, by number of listeners: {shown}")
    if result["steadiness"] is not None:
        lines.append(f"  repeated trials answered alike: {result['steadiness']:.0%}")
    return "\n".join(lines)


def _row(answer: dict[str, Any], key: dict[str, Any], file: str) -> dict[str, Any]:
    trial = key["trials"].get(answer["trial"])
    if trial is None or any(clip not in key["clips"] for clip in answer["clips"]):
        raise UserError(f"{file} has an answer to a trial the key does not know; was it edited?")
    clips = {clip: key["clips"][clip] for clip in answer["clips"]}
    prompt = next(iter(clips.values()))["prompt"]
    if key["design"] == "rating":
        policy = next(iter(clips.values()))["policy"]
        rating = {"policy": policy, "clip": f"{policy} {prompt}", "rating": float(answer["answer"])}
        return {"prompt": prompt, "repeat": trial["repeat"]} | rating
    chosen = answer["answer"]
    won = np.nan if chosen == NO_PREFERENCE else float(clips[chosen]["policy"] == key["policies"][1])
    return {"prompt": prompt, "repeat": trial["repeat"], "won": won}


def _steadiness(answers: Answers) -> float | None:
    """Share of repeated trials answered as the first time: the same choice, or ratings at most one apart."""
    rating = answers.design == "rating"
    by = ["listener", "prompt"] + (["policy"] if rating else [])
    value = "rating" if rating else "won"
    again = answers.table[answers.table["repeat"]].merge(answers.table[~answers.table["repeat"]], on=by)
    if not len(again):
        return None
    pairs = again[[f"{value}_x", f"{value}_y"]].fillna(0.5).to_numpy()
    return float((np.abs(pairs[:, 0] - pairs[:, 1]) <= (1 if rating else 0)).mean())


def _mean_over_listeners(table: pd.DataFrame, column: str) -> dict[str, float]:
    """Mean of the listeners' means, with Student's t interval over listeners."""
    means = table.groupby("listener")[column].mean().to_numpy()
    half = 0.0
    if len(means) > 1:
        half = stats.t.ppf(0.5 + LEVEL / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    return {"value": float(means.mean()), "low": float(means.mean() - half), "high": float(means.mean() + half)}


def _tree(model: MixedResult) -> dict[str, Any]:
    def one(e: Effect) -> dict[str, float]:
        return {"estimate": e.estimate, "error": e.error, "low": e.low, "high": e.high, "p": e.p}

    effects = {policy: one(e) for policy, e in model.effects.items()}
    return asdict(model) | {"intercept": one(model.intercept), "effects": effects}


def _triple(e: Effect) -> tuple[float, float, float]:
    return e.estimate, e.low, e.high


def _logistic(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def _json(file: str | Path) -> dict[str, Any]:
    try:
        tree = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds no answers of a listening test")
    return tree
