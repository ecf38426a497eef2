"""A run that listens, on what a bare GPU machine has: no FluidSynth, no soundfont. Started with a folder that holds a
policy, `tiny`, and Audiobox weights, `ears.pt`."""

import sys
from dataclasses import replace
from pathlib import Path

import synthetic_piano

from fastsmart import presets, train
from fastsmart.audio import RenderSettings
from fastsmart.config import merged

synthetic_piano.PARTIALS = 1
folder = Path(sys.argv[1])
audio = synthetic_piano.write_piano(folder, RenderSettings(max_seconds=1.0, workers=1))
config = merged(
    presets.load_preset("smart-paper"),
    {
        "policy": {"source": str(folder / "tiny"), "vocabulary": ""},
        "sampling": {"group": 2, "max_tokens": 20},
        "reward": {"terms": {"variety": 1.0, "audiobox": 1.0}, "audiobox_checkpoint": str(folder / "ears.pt")},
        "train": {"steps": 2, "prompts": 1, "eval_prompts": 2, "listen": 0, "threads": 1},
    },
)
assert train(replace(config, audio=audio), folder / "run").step == 2
