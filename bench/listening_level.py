"""How often a listening test finds what is not there, and how often what is: simulated listeners, our analysis.

    .venv/bin/python bench/listening_level.py --out bench/results/listening-level-2core-xeon.json

Listeners, prompts, tastes and clips are drawn anew for every test, so a test that takes one of them for fixed finds
differences that are not there. Ratings are continuous unless a case says otherwise. What is
to be found is `--effect` points of rating, or a chance of `--preference` to be chosen.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from functools import cache

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result
from scipy import special

from fastsmart.study.mixed import choice_power, crossed_mean, rating_power, sign_test

PROMPTS = 15
LISTENERS = (8, 20, 60)
TRUTHS = {"nothing differs": (0, 0), "clips differ": (0, 1), "tastes differ": (1, 0), "both differ": (1, 1)}
RATING_SD, CHOICE_SD = 0.4, 1.0  # of tastes and clips: points a policy, and log-odds
RESIDUAL_SD, LISTENER_SD, PROMPT_SD = 0.8, 0.5, 0.4


@dataclass(frozen=True)
class Case:
    """A kind of test to simulate.

    design  : "rating" or "ab"
    answers : "all"; "80 %", of ratings or choices at random; "stopped early", after a random share of the trials; or
              "rounded", to whole points from 1 to 5
    """

    design: str
    truth: str
    listeners: int
    answers: str
    effect: float


def simulated(case: Case, random: np.random.Generator) -> np.ndarray:
    """The differences of one simulated test, [L, P]; NaN where there is none."""
    listeners, (taste, clip) = case.listeners, TRUTHS[case.truth]
    if case.design == "ab":
        effects = CHOICE_SD * (taste * random.normal(size=(listeners, 1)) + clip * random.normal(size=(1, PROMPTS)))
        chance = special.expit(log_odds(case.effect, taste, clip) + effects)
        made = np.where(random.random(chance.shape) < chance, 1.0, -1.0)
        return np.where(heard(case, made.shape, random), made, np.nan)
    sds = RATING_SD * taste, RATING_SD * clip, RESIDUAL_SD
    ratings = (
        3.0
        + LISTENER_SD * random.normal(size=(listeners, 1, 1))
        + PROMPT_SD * random.normal(size=(1, PROMPTS, 1))
        + sds[0] * random.normal(size=(listeners, 1, 2))
        + sds[1] * random.normal(size=(1, PROMPTS, 2))
        + sds[2] * random.normal(size=(listeners, PROMPTS, 2))
        + case.effect * np.array([-0.5, 0.5])
    )
    if case.answers == "rounded":
        ratings = np.clip(np.round(ratings), 1, 5)
    ratings[~heard(case, ratings.shape, random)] = np.nan
    return ratings[..., 1] - ratings[..., 0]


@cache
def log_odds(preference: float, taste: float, clip: float) -> float:
    """The log-odds at which chances average to `preference` over tastes and clips, by bisection on fixed draws."""
    effects = CHOICE_SD * np.hypot(taste, clip) * np.random.default_rng(0).standard_normal(200_000)
    low, high = -10.0, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if special.expit(middle + effects).mean() < preference else (low, middle)
    return (low + high) / 2 if preference != 0.5 else 0.0


def heard(case: Case, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Which answers there are, of the shape asked for."""
    if case.answers == "80 %":
        return random.random(shape) < 0.8
    if case.answers == "stopped early":
        order = random.random(shape).reshape(shape[0], -1).argsort(1).argsort(1)
        return (order < order.shape[1] * random.uniform(0.3, 1.0, (shape[0], 1))).reshape(shape)
    return np.ones(shape, bool)


def over_all_choices(differences: np.ndarray) -> float:
    """p of the sign test over all choices, as if all were independent."""
    return sign_test(int((differences > 0).sum()), int((differences < 0).sum()))


def measure(case: Case, tests: int, seed: int) -> dict:
    """Shares of tests that find a difference at .05, and what the power function says of them."""
    random = np.random.default_rng([seed, case.listeners, list(TRUTHS).index(case.truth), case.design == "ab"])
    made = [simulated(case, random) for _ in range(tests)]
    found = float(np.mean([crossed_mean(d).p < 0.05 for d in made]))
    result = asdict(case) | {"found": found, "error": float(np.sqrt(found * (1 - found) / tests))}
    taste, clip = TRUTHS[case.truth]
    if case.answers == "all" and case.design == "rating":
        spread = {"taste": RATING_SD * taste, "clip": RATING_SD * clip, "residual": RESIDUAL_SD}
        result["predicted"] = rating_power(case.effect, spread, case.listeners, PROMPTS)
    elif case.answers == "all":
        spread = {"taste": CHOICE_SD * taste, "clip": CHOICE_SD * clip}
        result["predicted"] = choice_power(case.effect, spread, case.listeners, PROMPTS)
    if case.design == "ab":
        result["found_by_sign_test_over_all_choices"] = float(np.mean([over_all_choices(d) < 0.05 for d in made]))
    return result


def cases(effect: float, preference: float) -> list[Case]:
    """All that is measured: the level with all answers and with some missing, and the power."""
    asked: list[Case] = []
    for design, none, some in (("rating", 0.0, effect), ("ab", 0.5, preference)):
        for truth in TRUTHS:
            for n in LISTENERS:
                asked += [Case(design, truth, n, answers, none) for answers in ("all", "80 %")]
                asked.append(Case(design, truth, n, "all", some))
            asked.append(Case(design, truth, 20, "stopped early", none))
            asked += [Case(design, truth, 20, "rounded", none)] if design == "rating" else []
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=2000, help="simulated tests of each case; default 2000")
    parser.add_argument("--effect", type=float, default=0.3, help="points of rating to find; default 0.3")
    parser.add_argument("--preference", type=float, default=0.6, help="chance to be chosen to find; default 0.6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="write the results here as JSON")
    options = parser.parse_args()
    began, measured = time.perf_counter(), []
    for case in cases(options.effect, options.preference):
        row = measure(case, options.tests, options.seed)
        measured.append(row)
        predicted = f", predicted {row['predicted']:.3f}" if "predicted" in row else ""
        what = f"{case.design:6} {case.truth:16} {case.listeners:2} listeners, {case.answers:13}"
        print(f"{what} effect {case.effect:.1f}: found {row['found']:.3f}{predicted}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    if options.out:
        setting = {"tests": options.tests, "prompts": PROMPTS, "rating_sd": RATING_SD, "choice_sd": CHOICE_SD,
                   "residual_sd": RESIDUAL_SD, "seed": options.seed}  # fmt: skip
        write_result(options.out, {"setting": setting, "cases": measured})


if __name__ == "__main__":
    main()
