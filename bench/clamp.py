"""Clips as vectors of CLaMP's encoder of music, random weights of the published shape, beside the matrix products.

    python bench/clamp.py --clips 64 --out clamp.json

Clips are windows of 10 s of made pieces; the text is made within the time. Floor: two operations a weight of the layers
and patch, and attention over the patches of each clip.
"""

from __future__ import annotations

import json
from pathlib import Path

import as_commands  # noqa: F401  # isort: skip  # before torch
import numpy as np
import torch
from harness import Work, interleaved, measured_ceilings, parser

import fastsmart
from fastsmart.notes import NoteBatch
from fastsmart.reward.clamp3 import MusicReader
from fastsmart.reward.clamp3.architecture import Size
from fastsmart.reward.clamp3.mtf import notes_text, patches


def made_clips(count: int) -> NoteBatch:
    """Clips of at most 10 s that the shipped policy plays."""
    policy = fastsmart.load_policy("pop909-tiny")
    prompts = fastsmart.prompts.procedural(policy.vocab, count, seed=0)
    rollout = fastsmart.sample(policy, prompts, group=1, max_tokens=400)
    return fastsmart.decode(rollout.sequences(), policy.vocab, max_seconds=10.0)


def layer_gflop(lengths: np.ndarray, size: Size) -> float:
    """Operations of the layers for segments of these lengths, in units of 10^9."""
    weights = size.layers * (4 * size.width**2 + 2 * size.width * size.ffn)
    attention = 4 * size.layers * size.width * (lengths.astype(np.float64) ** 2).sum()
    return float(2 * weights * lengths.sum() + attention) / 1e9


def main() -> None:
    options = parser(__doc__ or "", runs=5)
    options.add_argument("--clips", type=int, default=64)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    clips = made_clips(chosen.clips)
    reader = MusicReader("random", chosen.device)
    lengths = np.array([len(patches(notes_text(clips, i))) for i in range(len(clips))])
    gflop = layer_gflop(lengths, Size())
    floor = measured_ceilings(chosen.device).floor_s([Work("layers", gflop)])
    rows = np.arange(len(clips))
    seconds = interleaved({"clamp": lambda: reader.read(clips.select(rows))}, chosen.runs, chosen.device)["clamp"]
    result = {"clips": len(clips), "patches": lengths.tolist(), "gflop": gflop, "floor_s": floor, "seconds": seconds}
    median = float(np.median(seconds))
    print(f"{len(clips)} clips, {lengths.sum()} patches, {gflop:.0f} GFLOP; floor {floor:.2f} s, {median:.2f} s")
    if chosen.out:
        Path(chosen.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
