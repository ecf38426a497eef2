"""Let vLLM start and stop without a trace in the process it shares."""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastsmart.errors import UserError

# One process, without telemetry
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
SHOW_LOG = "VLLM_LOGGING_LEVEL"  # where the user sets it to show more than errors, vLLM's own log is shown
QUIET_LEVELS = ("ERROR", "CRITICAL")  # TRL, imported beside us, sets the first


@contextmanager
def isolated() -> Iterator[None]:
    """Let vLLM start or stop, and put back what it changes for the whole process: the environment, the number of
    threads and torch's function that sets it, the random states, the level of logging; and keep it quiet."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    set_num_threads = torch.set_num_threads  # vLLM's CPU worker replaces it
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    disabled = logging.root.manager.disable
    os.environ.update(ENVIRONMENT)
    quiet = os.environ.get(SHOW_LOG, "ERROR").upper() in QUIET_LEVELS
    if quiet:
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        logging.getLogger("vllm").setLevel(logging.ERROR)
        logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings(), silent_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)


@contextmanager
def silent_stderr(quiet: bool) -> Iterator[None]:
    """Hold back what C++ code writes to standard error, and let it out only when the block fails."""
    if not quiet:
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception as error:
            if not isinstance(error, UserError):  # which says everything in one sentence
                held.seek(0)
                os.write(before, held.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
