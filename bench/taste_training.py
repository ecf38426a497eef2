"""What training on a listener's choices does: simulated listeners choose while the policy learns, as beside the page.

    python bench/taste_training.py --out bench/results/taste-training-2core-xeon.json
    python bench/taste_training.py --listeners "at random" --seeds 3

A listener with a hidden utility makes 40 choices between clips of the policy as it then is, in pairs as the page makes
them. After every twentieth there is a lesson on the taste as it then is (the page gives more of them). Then base and
tuned policy play the same test openings: the gain in hidden utility, in standard deviations of the base's clips, and
the share of the base's diversity that is kept. Of a listener who answers at random there is no gain, and features
should not move. Lessons are kept in --work, and found there again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result
from simulated_listeners import HIDDEN, Listener

from fastsmart.config import Config, with_overrides
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.transformer import Policy
from fastsmart.reward.taste import Taste
from fastsmart.reward.taste_features import Standard, features
from fastsmart.run.display import Silent
from fastsmart.sampling import sample
from fastsmart.study.evaluate import evaluate
from fastsmart.study.evaluation import outputs_path
from fastsmart.study.outputs import Outputs
from fastsmart.taste.choices import Choice
from fastsmart.taste.lessons import lesson_config, teach
from fastsmart.taste.pairs import next_pair
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import make_prompts

POLICY = "pop909-tiny"
CHOICES, EVERY = 40, 20
STANDARD_CLIPS, FINISHED = 256, 48
KEPT = ("rarefied_effective_outputs", "rarefied_effective_embeddings_order_2", "notes")


def one_listener(hidden: str, seed: int, goal: float, work: Path, settings: list[str], prompts: int) -> dict[str, Any]:
    """Have one listener choose and the policy learn; what came of it."""
    config = with_overrides(lesson_config(POLICY, work / "taste.json", goal, seed), settings)
    random = np.random.default_rng([seed, list(HIDDEN).index(hidden)])
    base = load_policy(POLICY)
    standard = Standard.of(np.stack(list(_played(base, STANDARD_CLIPS, seed, config, 0, 0).values())))
    listener = Listener(standard, hidden)
    clips: dict[str, np.ndarray] = {}
    finished = _played(base, FINISHED, seed, config, 0, STANDARD_CLIPS)
    choices: list[Choice] = []
    taste, seen, played, begun = Taste.unknown(standard), set[str](), STANDARD_CLIPS + FINISHED, time.perf_counter()
    policy = POLICY
    while len(choices) < CHOICES:
        pair = next_pair(taste, finished, seen)
        assert pair is not None
        seen |= set(pair)
        clips |= {name: finished[name] for name in pair}
        answer = listener.answer(clips[pair[0]], clips[pair[1]], random)
        choices.append(Choice(str(len(choices)), 0.0, "", *pair, answer))
        taste = Taste.fit(choices, clips, standard, taste)
        if len(choices) % EVERY == 0:
            taste.save(work / "taste.json")
            lesson = work / f"after-{len(choices)}"
            taught = lesson / "policy"
            policy = str(taught if taught.is_dir() else teach(lesson, config, work / "taste.json", goal, Silent()))
            finished = _played(load_policy(policy), FINISHED, seed, config, len(choices), played)
            played += FINISHED
    seconds = time.perf_counter() - begun
    found = evaluate([f"base={POLICY}", f"tuned={policy}"], work / "evaluation", config, prompts, 0)
    tables = {label: _features(work / "evaluation", label, base, config) for label in ("base", "tuned")}
    about = {
        "listener": hidden,
        "seed": seed,
        "goal": goal,
        "borne_out": taste.borne_out,
        "seconds": seconds,
        "prequential": taste.agreement,
    }
    utility = {label: listener.utility(table) for label, table in tables.items()}
    unit = utility["base"].std()
    if unit > 0:
        about["gain"] = float((utility["tuned"].mean() - utility["base"].mean()) / unit)
    expected = {label: taste.mean(table) for label, table in tables.items()}
    about["expected_gain"] = float((expected["tuned"].mean() - expected["base"].mean()) / expected["base"].std())
    z = {label: standard(table) for label, table in tables.items()}
    about["moved"] = dict(zip(standard.names, (z["tuned"].mean(0) - z["base"].mean(0)).round(3).tolist(), strict=True))
    values = {metric.name: metric.values for metric in found.metrics if metric.name in KEPT}
    about["kept"] = {name: values[name]["tuned"].value / values[name]["base"].value for name in KEPT}
    return about


def _played(policy: Policy, count: int, seed: int, config: Config, version: int, start: int) -> dict[str, np.ndarray]:
    """Features of new clips by their ids: of training openings from number `start`, one clip each."""
    prompts = make_prompts(config.prompts, policy.vocab, "train", start, count)
    rollout = sample(policy, prompts, 1, config.sampling.max_tokens, config.sampling.temperature, seed)
    table = features(decode(rollout.sequences(), policy.vocab, config.audio.max_seconds))
    return {f"v{version}-{start + i}": vector for i, vector in enumerate(table)}


def _features(folder: Path, label: str, policy: Policy, config: Config) -> np.ndarray:
    outputs = Outputs.load(outputs_path(folder, label))
    assert outputs is not None
    return features(outputs.notes(policy.vocab, config.audio.max_seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listeners", nargs="*", default=list(HIDDEN), choices=list(HIDDEN))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--goal", type=float, default=1.2, help="the page's, where its slider begins")
    parser.add_argument("--prompts", type=int, default=256, help="test openings, one output each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run")
    parser.add_argument("--work", type=Path, default=Path("taste-training"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("taste-training.json"))
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for hidden in options.listeners:
            work = options.work / f"{list(HIDDEN).index(hidden)}-{seed}-{options.goal:g}"
            work.mkdir(parents=True, exist_ok=True)
            runs.append(one_listener(hidden, seed, options.goal, work, options.set, options.prompts))
            print(json.dumps({k: v for k, v in runs[-1].items() if k != "moved"}), flush=True)
            write_result(options.out, {"choices": CHOICES, "runs": runs})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
