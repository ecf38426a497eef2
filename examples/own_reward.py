"""Tune the shipped piano model on a reward of your own: here, notes that are short beside the gaps between them.

python examples/own_reward.py                            # any section.key=value of the configuration may follow
"""

import sys

import numpy as np

import fastsmart as fs
from fastsmart.config import with_overrides
from fastsmart.reward import register


@register
class Staccato:
    """Short notes: 1 - the mean duration in seconds, from 0 up. Hacked by playing few notes, all of them short."""

    name = "staccato"
    needs_audio = False  # reads notes only; with True, clips.audio holds what was rendered

    def __call__(self, clips: fs.Clips) -> np.ndarray:
        notes = clips.notes
        parts = np.split(notes.duration_s, notes.offsets[1:-1])
        return np.array([max(0.0, 1.0 - part.mean()) if len(part) else 0.0 for part in parts], np.float32)


if __name__ == "__main__":
    terms = ["reward.terms={staccato=5, presence=3, variety=1}"]  # the others hold against the hack
    run = fs.train(with_overrides(fs.presets.demo(), terms + sys.argv[1:]), out="runs/staccato")
    if run.exit_code:  # Ctrl-C or SIGTERM ended the training
        sys.exit(run.exit_code)
    print(f"runs/staccato/before_after.md has every term before and after {run.step} steps")
