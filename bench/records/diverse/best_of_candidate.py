"""The best of 2 and 4 of the candidate's own outputs: python best_of_candidate.py EVALUATION CANDIDATE --out JSON

By the rulers of the evaluation, fitted on its base, and on its prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastsmart.audio import find_soundfont
from fastsmart.policy.hf_format import load_policy
from fastsmart.study.evaluation import Evaluation
from fastsmart.study.measures import Ruler, best_of_point
from fastsmart.study.outputs import Player

MOST = 4
DIVERSITY = ("rarefied_effective_outputs", "rarefied_effective_embeddings_order_2", "rarefied_effective_good_outputs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("candidate")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    evaluation = Evaluation.open(options.evaluation)
    config, base = evaluation.config, evaluation.outputs("base")
    ruler = Ruler.fit(base, base=load_policy("pop909-tiny"))
    font = find_soundfont(config.audio.soundfont)
    candidate = load_policy(options.candidate)
    said = ""

    def progress(stage: str, done: int, of: int) -> None:
        nonlocal said
        if stage != said:
            print(stage, done, of, flush=True)
        said = stage

    played = {1: evaluation.outputs("candidate")}
    played |= Player(config, {font.stem: font}).best_of(candidate, len(base), MOST, progress)
    start = best_of_point(1, base, evaluation.vocab, config, ruler)
    points = [best_of_point(k, outputs, evaluation.vocab, config, ruler) for k, outputs in played.items()]
    found = [
        {
            "n": point["n"],
            "reward": point["reward"],
            "notes": point["notes"],
            "over_base": {m: point["diversity"][m]["value"] / start["diversity"][m]["value"] for m in DIVERSITY},
        }
        for point in points
    ]
    record = {"seed": config.train.seed, "base_reward": start["reward"], "candidate": found}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
