"""The process that trains beside the page: an order a line on standard input, an answer a line on standard output."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from fastsmart.errors import UserError

LOWEST_PRIORITY = 19


def main() -> None:
    """Serve until standard input ends, which it does when the server dies, however it dies."""
    with suppress(OSError):
        os.nice(LOWEST_PRIORITY)
    run, orders = Path(sys.argv[1]), queue.Queue[str]()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    answers = sys.stdout
    while True:
        order = json.loads(orders.get())
        answer: dict[str, Any]
        try:
            with redirect_stdout(sys.stderr):
                answer = {"step": _train(run, order)}
        except UserError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _read(orders: queue.Queue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)  # in the middle of a step, perhaps: whatever is on the disk is whole


def _train(run: Path, order: dict[str, Any]) -> int:
    """Train one round; returns the step of its checkpoint."""
    from fastsmart.live.config import config_for
    from fastsmart.policy.hf_format import step_of
    from fastsmart.taste.training import train_round

    config = config_for(order["policy"], order["max_tokens"], order["seconds"])
    return step_of(train_round(run, config, order["taste"], order["steps"], order["beta"]))


if __name__ == "__main__":
    main()
