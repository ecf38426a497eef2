"""What a step of the demo takes as waiting threads look for work 1,000 to 300,000 times, idle and beside others.

    python bench/records/waiting/ways.py OUT.json

Run from the project's root. bench/busy.py does the work; here each comparison has the ways that it was about.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, "bench")
import busy

COMPARISONS = (((1000, 4000, 10000), (0, 1, 2), 3), ((6000, 300000), (0,), 6), ((6000, 1000), (0, 1, 2), 3))


def main() -> None:
    """Compare, and write what was found."""
    found = []
    for spins, beside, rounds in COMPARISONS:
        ways: dict[str, int | None] = {f"{count} turns": count for count in spins}
        busy.OURS, busy.OWN = f"{spins[0]} turns", f"{spins[-1]} turns"  # what is divided by what in the last line
        found.append(busy.compare("train", ways, beside, rounds, quick=False))
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
