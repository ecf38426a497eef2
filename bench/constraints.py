"""How many clips meet what a musician has stated, before and after training on it, and how varied those are.

    python bench/constraints.py --out bench/results/constraints-2core-xeon.json
    python bench/constraints.py --stages 40+40 20+40 --work runs/shorter

Key, metre, range and density at once, by the shipped policy. It is trained in stages, each a run that begins from the
last one's policy: some steps of credit for single notes, which find what is asked, and then some of tilted
fine-tuning on the most diverse of the clips that have it, which gives back what credit has cost. After training base
and tuned policy play test openings. Diversity is compared within what is asked: of as many outputs that meet
everything as both have, at most --compared, at equal size. The base plays more, for few of its outputs meet it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result

from fastsmart.config import Config, with_overrides
from fastsmart.machine.packed_linear import bfloat16_is_fast
from fastsmart.music.bootstrap import Draws, mean_draws, resample_weights
from fastsmart.music.diversity import prompt_numbers
from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.transformer import Policy
from fastsmart.presets import demo
from fastsmart.run.display import Silent
from fastsmart.run.folder import RunFolder
from fastsmart.study.evaluate import OutputStore
from fastsmart.study.measures import BOOTSTRAP_SEED, Ruler
from fastsmart.study.outputs import Outputs
from fastsmart.trainer.loop import train

POLICY = "pop909-tiny"
ASKED = (
    *('reward.constraint.key="G major"', 'reward.constraint.metre="4/4"'),
    *("reward.constraint.key_share=0.85", "reward.constraint.lowest=36", "reward.constraint.highest=96"),
    *("reward.constraint.least_density=2", "reward.constraint.most_density=8"),
)
DTYPE = "bfloat16" if bfloat16_is_fast() else "float32"
STAGES = ((40, 40), (40, 40))  # steps of credit and of tilt
TRAINED = (
    *ASKED,
    *("reward.terms={constraint=1}", 'reward.normalize="none"', "train.prompts=32", "sampling.group=8"),
    *('train.algorithm="credit"', 'train.schedule="constant"', "train.eval_every=0", "train.save_every=0"),
    *("train.eval_prompts=16", "train.listen=0"),
    *("credit.prompts=160", "credit.clips=64", "credit.round_steps=20", "credit.window=3", "credit.alternatives=4"),
    *("credit.strength=5", 'credit.neutral=["notes", "mean_pitch", "mean_velocity"]'),
    *("tilt.prompts=256", 'tilt.weights="diverse"', "tilt.gain=2", "tilt.best_of=4"),
)
KEPT = ("rarefied_effective_outputs", "rarefied_effective_embeddings_order_2")


def meeting(outputs: Outputs) -> np.ndarray:
    """Whether each output meets everything, bool [N]."""
    return next(iter(outputs.scores.values())).terms["constraint"] == 1.0


def share(outputs: Outputs) -> dict[str, float]:
    """The share of outputs that meet everything, with its interval."""
    opening = prompt_numbers(outputs.prompts)
    found = mean_draws(meeting(outputs).astype(np.float64), resample_weights(opening, BOOTSTRAP_SEED)).estimate()
    return asdict(found) | {"outputs": len(outputs), "openings": len(np.unique(opening))}


def varied(base: Outputs, tuned: Outputs, policy: Policy, seconds: float, most: int) -> dict[str, Any]:
    """Diversity of as many outputs that meet everything of both policies, at most `most` of each: the ratios of the
    second to the first with their intervals, of which the two are drawn one independently of the other.

    policy  : the base
    seconds : of each output that count
    """
    chosen = [outputs.select(np.flatnonzero(meeting(outputs))) for outputs in (base, tuned)]
    count = min(most, *map(len, chosen))
    ruler, found, notes = Ruler.fit(chosen[0].select(np.arange(count)), base=policy), [], []
    for seed, outputs in enumerate(chosen):
        outputs = outputs.select(np.arange(count))
        weights = resample_weights(prompt_numbers(outputs.prompts), BOOTSTRAP_SEED + seed)
        played = outputs.notes(policy.vocab, seconds)
        found.append(replace(ruler, weights=weights, measured=[]).diversity(outputs, played))
        notes.append(float(played.counts.mean()))
    random = np.random.default_rng(BOOTSTRAP_SEED)
    kept = {}
    for name in KEPT:
        first, second = (measured[name] for measured in found)
        kept[name] = asdict(
            Draws(second.value / first.value, random.permutation(second.draws) / first.draws).estimate()
        )
    return {"compared": count, "kept": kept, "notes": {"base": notes[0], "tuned": notes[1]}}


def stage(text: str) -> tuple[int, int]:
    """Steps of credit and of tilt from "40+40". Raises ValueError."""
    credit, tilt = map(int, text.split("+"))
    return credit, tilt


def configs(stages: Sequence[tuple[int, int]], seed: int, settings: Sequence[str]) -> list[Config]:
    """Of each stage, with a seed of its own."""
    found = []
    for number, (credit, tilt) in enumerate(stages, 1):
        steps = (f"train.steps={credit + tilt}", f"merge.tilt_steps={tilt}", f"train.seed={100 * seed + number}")
        found.append(with_overrides(demo(), [*TRAINED, f"policy.dtype={DTYPE}", *steps, *settings]))
    return found


def trained(stages: Sequence[Config], work: Path) -> str:
    """Train in stages, each from the policy of the one before; the last one's checkpoint."""
    source = POLICY
    for number, config in enumerate(stages, 1):
        run = work / f"stage-{number}"
        train(replace(config, policy=replace(config.policy, source=source)), run, RunFolder.begun(run), Silent())
        source = str(RunFolder.read(run).checkpoints.all()[-1])
    return source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run")
    parser.add_argument(
        "--stages", nargs="+", type=stage, default=STAGES, metavar="CREDIT+TILT", help="steps of each stage"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", help="a checkpoint to measure in place of training one")
    parser.add_argument("--base", type=Path, help="folder that keeps what the base plays; default: --work")
    parser.add_argument("--base-prompts", type=int, default=11000)
    parser.add_argument("--prompts", type=int, default=308, help="outputs of the tuned policy, on test openings")
    parser.add_argument("--compared", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("constraints"))
    parser.add_argument("--out", type=Path, default=Path("constraints.json"))
    options = parser.parse_args()
    stages = configs(options.stages, options.seed, options.set)
    begun = time.perf_counter()
    tuned = options.tuned or trained(stages, options.work)
    took = None if options.tuned else round(time.perf_counter() - begun, 1)
    result: dict[str, Any] = {"seconds_of_training": took, "stages": options.stages, "asked": ASKED}
    played, result["shares"] = {}, {}
    for label, source, prompts in (("base", POLICY, options.base_prompts), ("tuned", tuned, options.prompts)):
        store = OutputStore(options.base if label == "base" and options.base else options.work, stages[0], prompts)
        *_, played[label] = store.play(label, source, lambda stage, done, total: None)
        result["shares"][label] = share(played[label])
        print(label, result["shares"][label], flush=True)
    policy, seconds = load_policy(POLICY), stages[0].audio.max_seconds
    result["within"] = varied(played["base"], played["tuned"], policy, seconds, options.compared)
    print(result["within"])
    write_result(options.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
