"""Keep of a study over seeds what its runs and evaluations left.

    python bench/records/collect.py bench/records/diverse runs 22 23 --runs u=unconstrained c=candidate

The second folder holds, of seed 22, the runs u22 and c22 and their evaluation, e22. `seed-22/` of the first gets the
evaluation as `fastsmart.study.evaluation` reads it, the configs, and the metrics, compressed. A seed's second
evaluation goes with `--into NAME` to a folder of its own in there.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--runs", nargs="+", required=True, metavar="LETTERS=LABEL")
    parser.add_argument("--into", default="", metavar="NAME", help="of a folder in that of the seed")
    given = parser.parse_args()
    for seed in given.seeds:
        kept, evaluation = given.record / f"seed-{seed}" / given.into, given.folder / f"e{seed}"
        kept.mkdir(parents=True, exist_ok=True)
        text = (evaluation / "evaluation.json").read_text()
        (kept / "evaluation.json").write_text(text.replace(f"{given.folder.resolve()}/", "runs/"))
        for name in ("config.toml", "tokenizer.json"):
            shutil.copy(evaluation / name, kept / name)
        for letters, label in (pair.split("=") for pair in given.runs):
            if (run := given.folder / f"{letters}{seed}").is_dir():
                shutil.copy(run / "config.toml", kept / f"{label}.toml")
                (kept / f"{label}.jsonl.xz").write_bytes(lzma.compress((run / "metrics.jsonl").read_bytes(), preset=9))


if __name__ == "__main__":
    main()
