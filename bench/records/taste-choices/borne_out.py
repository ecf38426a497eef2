"""What of a taste's predictions is borne out, by listeners who have a taste and by chance.

PYTHONPATH=bench python bench/records/taste-choices/borne_out.py --out borne-out.json

Simulated listeners choose between pairs as the page makes them, without lessons. After so many choices: the slope of
what came true on what was foretold, the winnings of a stake on it, and `Taste.borne_out`, which is made of both. Of
listeners who answer at random none of the three should amount to anything.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result
from simulated_listeners import HIDDEN, Listener

from fastsmart.reward.taste import ENOUGH, Taste
from fastsmart.reward.taste_features import Standard
from fastsmart.taste.choices import Choice
from fastsmart.taste.pairs import next_pair

BASE, FINISHED = 256, 48  # clips that features are standardised on, and clips to choose among
AFTER = (10, 20, 40, 60)  # choices
LISTENERS = {"at random": 300, "slow, sparse, low": 50, "fast, loud, dense": 50, "fast where high": 50}


def one_listener(table: np.ndarray, hidden: str, seed: int) -> dict[str, Any]:
    """What was borne out after so many choices of a listener, and her largest winnings up to then."""
    random = np.random.default_rng([seed, list(HIDDEN).index(hidden)])
    order = random.permutation(len(table))
    standard = Standard.of(table[order[:BASE]])
    listener = Listener(standard, hidden)
    clips = {f"c{i}": table[i] for i in order[BASE:]}
    finished, waiting = list(clips)[:FINISHED], iter(list(clips)[FINISHED:])
    taste, seen, choices, most = Taste.unknown(standard), set[str](), list[Choice](), 1.0
    found: dict[str, Any] = {"listener": hidden, "seed": seed}
    while len(choices) < AFTER[-1]:
        pair = next_pair(taste, {name: clips[name] for name in finished}, seen)
        assert pair is not None
        seen |= set(pair)
        finished = [name for name in finished if name not in pair] + [next(waiting), next(waiting)]
        answer = listener.answer(clips[pair[0]], clips[pair[1]], random)
        choices.append(Choice(str(len(choices)), 0.0, "", *pair, answer))
        taste = Taste.fit(choices, clips, standard, taste)
        most = max(most, taste.winnings)
        if len(choices) in AFTER:
            slope = taste.borne_out / min(1.0, taste.winnings / ENOUGH)
            found[str(len(choices))] = {
                "slope": round(slope, 4),
                "winnings": float(f"{taste.winnings:.4g}"),
                "most_winnings": float(f"{most:.4g}"),
                "borne_out": round(taste.borne_out, 4),
                "agreement": round(taste.agreement, 4),
            }
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By listener and number of choices: means, tenths, and shares above a tenth and three tenths."""
    about: dict[str, Any] = {}
    for hidden in dict.fromkeys(run["listener"] for run in runs):
        own = [run for run in runs if run["listener"] == hidden]
        about[hidden] = {"listeners": len(own)}
        for count in map(str, AFTER):
            told = {}
            for name in ("slope", "borne_out"):
                values = np.array([run[count][name] for run in own])
                told[name] = {
                    "mean": values.mean(),
                    "tenth": np.quantile(values, 0.1),
                    "nineteen in twenty at most": np.quantile(values, 0.95),
                    "above .1": (values > 0.1).mean(),
                    "above .3": (values > 0.3).mean(),
                }
                told[name] = {key: round(float(value), 4) for key, value in told[name].items()}
            told["ever enough"] = float(np.mean([run[count]["most_winnings"] >= ENOUGH for run in own]))
            about[hidden][count] = told
    return about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("borne-out.json"))
    options = parser.parse_args()
    with np.load(Path(__file__).parent / "taste-clips.npz", allow_pickle=False) as file:
        table = file["features"].astype(np.float64)
    runs: list[dict[str, Any]] = []
    for hidden, count in LISTENERS.items():
        runs += [one_listener(table, hidden, options.first_seed + number) for number in range(count)]
        write_result(options.out, {"enough": ENOUGH, "summary": summary(runs), "runs": runs})
        print(hidden, summary(runs)[hidden], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
