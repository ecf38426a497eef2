"""Keep what runs and evaluations of a seed left: python bench/records/diverse/collect.py RUNS SEED ...

RUNS holds, of seed 22, the folders u22 and c22 (runs of unconstrained tuning and of the candidate) and e22 (their
evaluation). Here `seed-22/` gets the evaluation as bench/diversity_claim.py reads it, the configs, and the metrics,
compressed.
"""

from __future__ import annotations

import lzma
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = {"u": "unconstrained", "c": "candidate"}


def main() -> None:
    runs = Path(sys.argv[1])
    for seed in sys.argv[2:]:
        kept, evaluation = HERE / f"seed-{seed}", runs / f"e{seed}"
        kept.mkdir(exist_ok=True)
        text = (evaluation / "evaluation.json").read_text()
        (kept / "evaluation.json").write_text(text.replace(f"{runs.resolve()}/", "runs/"))
        for name in ("config.toml", "tokenizer.json"):
            shutil.copy(evaluation / name, kept / name)
        for letter, label in RUNS.items():
            if (run := runs / f"{letter}{seed}").is_dir():
                shutil.copy(run / "config.toml", kept / f"{label}.toml")
                (kept / f"{label}.jsonl.xz").write_bytes(lzma.compress((run / "metrics.jsonl").read_bytes(), preset=9))


if __name__ == "__main__":
    main()
