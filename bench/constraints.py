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
from dataclasses import replace
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
from results import write_result

from fastsmart.config import Config, with_overrides
from fastsmart.machine.packed_linear import bfloat16_is_fast
from fastsmart.policy.hf_format import load_policy
from fastsmart.presets import demo
from fastsmart.run.display import Silent
from fastsmart.run.folder import RunFolder
from fastsmart.study.evaluate import evaluate
from fastsmart.study.evaluation import outputs_path
from fastsmart.study.measures import Ruler
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
    """Numbers of the outputs that meet everything."""
    return np.flatnonzero(next(iter(outputs.scores.values())).terms["constraint"] == 1.0)


def varied(config: Config, folder: Path, labels: tuple[str, str], most: int) -> dict[str, Any]:
    """Diversity of as many outputs that meet everything of both policies, and the ratios of the second to the first."""
    policy, seconds = load_policy(POLICY), config.audio.max_seconds
    chosen = {}
    for label in labels:
        outputs = Outputs.load(outputs_path(folder / label, label))
        assert outputs is not None
        chosen[label] = outputs.select(meeting(outputs))
    count = min(most, *map(len, chosen.values()))
    first, second = (outputs.select(np.arange(count)) for outputs in chosen.values())
    ruler = Ruler.fit(first, base=policy)
    found = [ruler.diversity(outputs, outputs.notes(policy.vocab, seconds)) for outputs in (first, second)]
    ratios = {name: found[1][name].value / found[0][name].value for name in KEPT}
    notes = [float(outputs.notes(policy.vocab, seconds).counts.mean()) for outputs in (first, second)]
    return {"compared": count, "kept": ratios, "notes": dict(zip(labels, notes, strict=True))}


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
    parser.add_argument("--base-prompts", type=int, default=3000)
    parser.add_argument("--prompts", type=int, default=308, help="outputs of the tuned policy, on test openings")
    parser.add_argument("--compared", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("constraints"))
    parser.add_argument("--out", type=Path, default=Path("constraints.json"))
    options = parser.parse_args()
    stages = configs(options.stages, options.seed, options.set)
    begun = time.perf_counter()
    tuned = trained(stages, options.work)
    seconds = time.perf_counter() - begun
    sources = {"base": (POLICY, options.base_prompts), "tuned": (tuned, options.prompts)}
    shares, result = {}, {"seconds_of_training": round(seconds, 1), "stages": options.stages, "asked": ASKED}
    for label, (source, prompts) in sources.items():
        found = evaluate([f"{label}={source}"], options.work / label, stages[0], prompts, 0)
        met = found.metric("share", "outputs that meet every constraint").values[label]
        shares[label] = {
            "value": met.value,
            "low": met.low,
            "high": met.high,
            "openings": found.record["distinct_prompts"],
        }
        print(label, shares[label], flush=True)
    result |= {"shares": shares, "within": varied(stages[0], options.work, ("base", "tuned"), options.compared)}
    print(result["within"])
    write_result(options.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
