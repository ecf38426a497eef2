"""Real vLLM leaves the process it runs in, and the machine, as they were."""

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from processes import started
from vllm_policy import make_vllm_policy

from fastsmart.policy.hf_format import save_policy
from fastsmart.sampling import sample
from fastsmart.tokens.token_batch import TokenBatch

PROMPTS = TokenBatch.pack([[21, 400, 180, 330], [1]])


def process_state():
    logger = logging.getLogger("vllm")
    return {
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)},
        "python random": random.getstate(),
        "numpy random": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch random": torch.get_rng_state().tolist(),
        "logging": (logging.root.handlers, logging.root.level, logging.root.manager.disable, logger.handlers),
        "records": logging.getLogRecordFactory(),
        "process group": torch.distributed.is_initialized(),
        "children": psutil.Process().children(),
    }


def test_the_process_is_left_as_it_was_and_nobody_called(vocab, capfd, monkeypatch):
    policy = make_vllm_policy(vocab)
    called: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: called.append(address) or [])
    before = process_state()
    rollout = sample(policy, PROMPTS, group=2, max_tokens=10, engine="vllm")
    assert len(rollout) == 4
    after = process_state()
    for key, value in before.items():
        assert after[key] == value, key
    torch.set_num_threads(before["threads"] + 1)
    assert torch.get_num_threads() == before["threads"] + 1
    torch.set_num_threads(before["threads"])
    assert capfd.readouterr() == ("", "")
    assert called == []


WITH_A_GROUP = """
import sys, torch, fastsmart
store = torch.distributed.FileStore(sys.argv[1] + "/store", 1)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)  # as torchrun's ranks do
policy = fastsmart.load_policy(sys.argv[1] + "/policy")
for _ in range(2):
    prompts = fastsmart.prompts.procedural(policy.vocab, 2)
    assert len(fastsmart.sample(policy, prompts, max_tokens=5, engine="vllm")) == 2
    value = torch.ones(1)
    torch.distributed.all_reduce(value)  # the group outlives the engine
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "ending", ["success", *(pytest.param(e, marks=pytest.mark.slow) for e in ("error", "interrupt"))]
)
def test_no_process_and_no_complaint_is_left_however_it_ends(vocab, tmp_path, ending):
    save_policy(make_vllm_policy(vocab), tmp_path / "policy")
    if ending == "success":
        command = [sys.executable, "-c", WITH_A_GROUP, str(tmp_path)]
    else:
        tokens = {"error": "2045", "interrupt": "2000"}[ending]
        command = [sys.executable, "-m", "fastsmart", "sample", "--policy", str(tmp_path / "policy"), "-n", "64"]
        command += ["--engine", "vllm", "--out", str(tmp_path / "songs"), "--max-tokens", tokens]
    seen: dict[int, psutil.Process] = {}
    interrupt_at = float("inf")
    with started(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                seen |= {child.pid: child for child in psutil.Process(process.pid).children(recursive=True)}
                loaded = "vllm/_C" in Path(f"/proc/{process.pid}/maps").read_text()
            except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                break
            if ending == "interrupt" and loaded:  # vLLM's kernels are there: it starts, and soon it samples
                interrupt_at = min(interrupt_at, time.monotonic() + 3.0)
            if time.monotonic() > interrupt_at:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.05)
        _, err = process.communicate(timeout=60)
        left = [child for child in seen.values() if child.is_running()]
    assert process.returncode == {"success": 0, "error": 2, "interrupt": 130}[ending], err
    assert ("lower sampling.max_tokens" in err) == (ending == "error")
    assert len(err.splitlines()) == (ending == "error"), err
    assert not left
