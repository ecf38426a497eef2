"""The process in which symusic reads ABC: a text a line of standard input, as JSON; its notes a line of output.

python -m fastsmart.notagen.abc_reader
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def read(text: str) -> dict[str, Any]:
    """Notes (tick, ticks, pitch, velocity), tempi (tick, bpm), metres (tick, numerator, denominator) of one tune."""
    from symusic import Score

    score: Any = Score.from_abc(text)  # its stubs cannot tell that it is in ticks
    return {
        "ticks_per_beat": score.tpq,
        "notes": [[n.time, n.duration, n.pitch, n.velocity] for track in score.tracks for n in track.notes],
        "tempi": [[t.time, t.qpm] for t in score.tempos],
        "meters": [[m.time, m.numerator, m.denominator] for m in score.time_signatures],
    }


def main() -> None:
    """Answer until the input ends. The reader prints what it thinks of a tune, which goes nowhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        try:
            answer = read(json.loads(line))
        except Exception as error:  # whatever the reader raises is of this text alone
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
