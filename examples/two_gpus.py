"""Tune on two GPUs, one rank on each; without GPUs the same line runs on two CPU processes. Not yet run on GPUs.

torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/two_gpus.py
"""

import sys
from pathlib import Path

import fastsmart as fs
from fastsmart.config import with_overrides
from fastsmart.run.folder import RunFolder

OUT = Path("runs/two-gpus")

if __name__ == "__main__":
    settings = ["train.prompts=16", "train.micro_batch=64"]  # 64 completions for each of the two
    config = with_overrides(fs.presets.demo(), settings + sys.argv[1:])
    # every rank runs this line; torchrun starts all again when one dies, and they go on from the last checkpoint
    run = fs.train(config, out=OUT, resume=RunFolder.begun(OUT))
    sys.exit(run.exit_code)
