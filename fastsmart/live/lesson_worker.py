"""The process that trains beside the page: an order a line on standard input, an answer a line on standard output."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from contextlib import redirect_stdout, suppress
from typing import Any

from fastsmart.errors import UserError
from fastsmart.machine import politeness
from fastsmart.machine.gc_control import give_back_memory

LOWEST_PRIORITY = 19


def main() -> None:
    """Serve until standard input ends, which it does when the server dies, however it dies."""
    with suppress(OSError):
        os.nice(LOWEST_PRIORITY)
    politeness.begin()
    orders = queue.Queue[str]()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    answers = sys.stdout
    while True:
        order = json.loads(orders.get())
        try:
            with redirect_stdout(sys.stderr):
                _train(order)
            answer = {"error": ""}
        except UserError as error:
            answer = {"error": str(error)}
        give_back_memory()  # the next lesson may be hours away
        print(json.dumps(answer), file=answers, flush=True)


def _read(orders: queue.Queue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(0)  # in the middle of a step, perhaps: the lesson is begun anew


def _train(order: dict[str, Any]) -> None:
    """Train one lesson."""
    from fastsmart.live.config import config_for
    from fastsmart.taste.lessons import teach

    config = config_for(order["policy"], order["max_tokens"], order["seconds"])
    teach(order["out"], config, order["taste"], order["goal"])


if __name__ == "__main__":
    main()
