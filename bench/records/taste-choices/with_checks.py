"""taste_listeners.py with the pairs of today, every fourth of which is a check: run it with bench on PYTHONPATH.

PYTHONPATH=bench python bench/records/taste-choices/with_checks.py --out taste-listeners-checks-2core-xeon.json
"""

import sys
from pathlib import Path

import simulated_listeners

sys.modules["fastsmart.taste.listeners"] = simulated_listeners  # where they were at the study's commit

import taste_listeners  # noqa: E402

taste_listeners.CLIPS = Path(__file__).parent / "taste-clips.npz"

if __name__ == "__main__":
    sys.exit(taste_listeners.main())
