"""Choices that a taste needs: simulated listeners with a hidden utility, pairs chosen by information or at random.

python bench/taste_listeners.py --out bench/results/taste-listeners-2core-xeon.json      # features as committed
python bench/taste_listeners.py --sample 2048                                            # sample the base's clips anew

Every condition has its own listener, its own order of clips and its own noise, numbered by the seed. A listener hears
each clip once. Held-out agreement is over pairs of clips that are never played: the probability that she, deciding
for one of two, decides for the one that the taste expects, averaged over the pairs, so that it has no noise of its own.
Its ceiling, the same of her own utility, is what her noise leaves. Of the random listener every taste agrees with half.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastsmart  # noqa: F401  # isort: skip  # before torch

import numpy as np

from fastsmart.machine.files import processor, write_atomic
from fastsmart.music.bootstrap import LEVEL
from fastsmart.reward.taste import Taste
from fastsmart.reward.taste_features import Standard, feature_names
from fastsmart.taste.choices import Choice
from fastsmart.taste.listeners import HIDDEN, Listener
from fastsmart.taste.pairs import next_pair

CLIPS = Path(__file__).parent / "results" / "taste-clips.npz"
BASE = 256  # clips that features are standardised on; none of them is played
HELD_OUT = 800  # clips of the held-out pairs
FINISHED = 48  # clips to choose among
TARGET = 0.85
LONGEST = {"information": 40, "random": 60}  # choices
EVERY = {"information": 2, "random": 4}  # choices between two measurements
RESAMPLES = 2000


@dataclass(frozen=True)
class Condition:
    """A listener who hears pairs that are chosen in one way."""

    table: np.ndarray  # features of all clips
    hidden: str
    pairs: str  # "information" or "random"
    seed: int
    curved: bool = True

    def run(self) -> dict[str, Any]:
        """Agreement after so many choices, and what else is told of a listener."""
        random = np.random.default_rng([self.seed, list(HIDDEN).index(self.hidden)])
        standard = Standard.of(self.table[:BASE])
        listener = Listener(standard, self.hidden)
        order = random.permutation(np.arange(BASE, len(self.table)))
        held_out, queue = self.table[order[:HELD_OUT]], order[HELD_OUT:]
        clips = {f"c{i}": self.table[i] for i in queue}
        finished, waiting = list(clips)[:FINISHED], list(clips)[FINISHED:]
        taste, seen, choices = Taste.unknown(standard), set[str](), list[Choice]()
        utility = listener.utility(held_out)
        curve, ceiling = {}, _agreement(listener, utility, utility)
        while len(choices) < LONGEST[self.pairs]:
            pair = self._pair(taste, {name: clips[name] for name in finished}, seen, random)
            seen |= set(pair)
            finished = [name for name in finished if name not in pair] + [waiting.pop(0), waiting.pop(0)]
            answer = listener.answer(clips[pair[0]], clips[pair[1]], random)
            choices.append(Choice(str(len(choices)), 0.0, "", *pair, answer))
            measured = len(choices) % EVERY[self.pairs] == 0
            if measured or self.pairs == "information":
                taste = Taste.fit(choices, clips, standard, taste, self.curved)
            if measured:
                curve[len(choices)] = _agreement(listener, taste.mean(held_out), utility)
        answers = {name: sum(c.choice == name for c in choices) for name in ("left", "right", "equal", "both_bad")}
        found = [{"feature": e.name, "liked": e.liked, "certainty": e.certainty} for e in taste.explained()[:4]]
        return {
            "listener": self.hidden, "pairs": self.pairs, "seed": self.seed, "curved": self.curved,
            "agreement": curve, "ceiling": ceiling, "prequential": taste.agreement, "answers": answers, "found": found,
        }  # fmt: skip

    def _pair(
        self, taste: Taste, finished: dict[str, np.ndarray], seen: set[str], random: np.random.Generator
    ) -> tuple[str, str]:
        if self.pairs == "random":
            left, right = random.choice(list(finished), 2, replace=False)
            return str(left), str(right)
        pair = next_pair(taste, finished, seen)
        assert pair is not None
        return pair


def _agreement(listener: Listener, expected: np.ndarray, utility: np.ndarray) -> float:
    """Share of decisive answers about held-out pairs that go to the clip with the higher expected utility."""
    p = listener.probabilities(utility[::2], utility[1::2])
    first = np.where(expected[::2] > expected[1::2], p[:, 0], p[:, 1])
    first = np.where(expected[::2] == expected[1::2], (p[:, 0] + p[:, 1]) / 2, first)
    return float(first.sum() / p[:, :2].sum())


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By listener: agreement after 40 choices, and the choices until TARGET and until what random pairs reach in 40."""
    found = {}
    for hidden in HIDDEN:
        own = [r for r in runs if r["listener"] == hidden]
        curves = {p: np.array([list(r["agreement"].values()) for r in own if r["pairs"] == p]) for p in LONGEST}
        if not all(map(len, curves.values())):
            continue
        random = np.random.default_rng(0)
        n = len(curves["random"])
        draws = [random.integers(0, n, n) for _ in range(RESAMPLES)]
        about: dict[str, Any] = {"ceiling": float(np.mean([r["ceiling"] for r in own]))}
        for pairs, rows in curves.items():
            at = rows[:, 40 // EVERY[pairs] - 1]
            about[f"agreement after 40, {pairs}"] = _interval(at.mean(), [at[d].mean() for d in draws])
        if about["ceiling"] <= 0.5:  # there is nothing to learn
            found[hidden] = about
            continue
        for name, target in (("85 %", TARGET), ("random's after 40", None)):
            aims = [target or float(curves["random"][d].mean(axis=0)[40 // EVERY["random"] - 1]) for d in draws]
            aim = target or float(curves["random"].mean(axis=0)[40 // EVERY["random"] - 1])
            needed = {p: _needed(rows.mean(axis=0), EVERY[p], aim) for p, rows in curves.items()}
            about[f"choices until {name}"] = needed
            saved = [1 - _needed(curves["information"][d].mean(axis=0), EVERY["information"], a)
                     / _needed(curves["random"][d].mean(axis=0), EVERY["random"], a)
                     for d, a in zip(draws, aims, strict=True)]  # fmt: skip
            about[f"saved until {name}"] = _interval(1 - needed["information"] / needed["random"], saved)
        found[hidden] = about
    return found


def _needed(curve: np.ndarray, every: int, target: float) -> float:
    """Choices until a curve has reached the target, between two measurements in a straight line; where it never does,
    as many as there were (and then what was saved is a lower bound, or an upper one)."""
    best = np.maximum.accumulate(np.concatenate([[0.5], curve]))
    above = np.flatnonzero(best >= target)
    if not len(above):
        return float(len(curve) * every)
    k = int(above[0])
    return every * (k - 1 + float((target - best[k - 1]) / (best[k] - best[k - 1]))) if k else 0.0


def _interval(value: float, draws: list[float]) -> dict[str, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}


def sample_clips(count: int) -> np.ndarray:
    """Features of new clips of the shipped policy, float64 [count, F]."""
    from fastsmart.policy.hf_format import load_policy
    from fastsmart.taste.training import play_clips, taste_config

    policy, config = load_policy("pop909-tiny"), taste_config("pop909-tiny")
    clips = [c for start in range(0, count, 64) for c in play_clips(policy, 64, 7, config, 0, start)]
    return np.stack([clip.vector for clip in clips])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="sample so many clips into --clips first")
    parser.add_argument("--clips", type=Path, default=CLIPS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=10, help="the model's scales were chosen on seeds below 10")
    parser.add_argument("--listeners", nargs="*", default=list(HIDDEN))
    parser.add_argument("--linear", action="store_true", help="without squares and products of features")
    parser.add_argument("--out", type=Path, default=Path("taste-listeners.json"))
    options = parser.parse_args()
    if options.sample:
        np.savez_compressed(options.clips, features=sample_clips(options.sample), names=np.array(feature_names()))
    with np.load(options.clips, allow_pickle=False) as file:
        table, names = file["features"].astype(np.float64), tuple(file["names"].tolist())
    assert names == feature_names(), "the clips' features are those of another version; --sample them anew"
    runs: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for hidden in options.listeners:
            for pairs in ("information", "random"):
                start = time.process_time()
                runs.append(Condition(table, hidden, pairs, seed, not options.linear).run())
                spent = time.process_time() - start
                print(
                    f"seed {seed}  {hidden}  {pairs}  {list(runs[-1]['agreement'].values())[-1]:.3f}  {spent:.1f} s",
                    flush=True,
                )
        tree = {
            "machine": processor(),
            "command": sys.argv,
            "clips": len(table),
            "summary": summary(runs),
            "runs": runs,
        }
        write_atomic(options.out, json.dumps(tree, indent=1) + "\n")
    print(json.dumps(summary(runs), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
