"""The loss part of an update, from hidden states to their gradient: fastsmart's kernels beside what others use.

    pip install --no-deps liger-kernel                            # TRL is a development dependency; Liger is by hand
    python bench/logprob.py --out bench/results/logprob.json

Every peer computes the log-probs of the same tokens, with entropies, and the same bnpo loss with k3 and its gradient in
hidden states and head; Liger has its own loss and gives no entropies. They take turns in one process; figures are
medians, and memory is the peak of a process of its own. "products" are the three matrix products alone, the floor on a
CPU; on a GPU it is those or the bytes of logits that must move at the measured copy bandwidth.

The update is that of a policy of the paper's size (17.2 M parameters) on 32 completions of 256 tokens in micro-batches
of 16, once with our log-probs and once with log_softmax + gather on the whole logits.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from results import write_result
from torch import Tensor

import fastsmart.train.update as training
from fastsmart.grpo.fused import fused_policy_loss
from fastsmart.grpo.losses import loss_denominator, policy_loss
from fastsmart.grpo.settings import LossSettings
from fastsmart.kernels.jit import choose_kernel
from fastsmart.kernels.logprob import LogProb, logprob
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.sampling.rollout import Rollout
from fastsmart.tokens.vocabulary import load_vocabulary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = LossSettings()
# completions, tokens of each, hidden width, vocabulary
SIZES = {
    "smart": (32, 256, 512, 413),
    "llm": (32, 256, 896, 151_936) if DEVICE.type == "cuda" else (4, 64, 64, 151_936),
}


@dataclass(frozen=True)
class Problem:
    """Hidden states [M, D] of N completions of T tokens, head [V, D], and what the loss wants to know of each token."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    behaviour: Tensor
    reference: Tensor
    advantage: Tensor
    lengths: Tensor

    @staticmethod
    def of(name: str) -> Problem:
        n, t, d, v = SIZES[name]
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(n * t, d, generator=generator)
        weight = torch.randn(v, d, generator=generator) / d**0.5
        ids = torch.randint(v, (n * t,), generator=generator)
        noise = 0.1 * torch.randn(2, n * t, generator=generator)
        sampled = logprob(hidden, weight, ids, kernel="torch").logprob + noise
        advantage = torch.randn(n, generator=generator)
        tensors = (hidden.requires_grad_(), weight.requires_grad_(), ids, *sampled, advantage, torch.full((n,), t))
        return Problem(*(x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in tensors))


def whole_logits(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0, kernel: str = "") -> LogProb:
    """What a trainer without a kernel does."""
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return LogProb(log_p.gather(1, ids[:, None])[:, 0], entropy, torch.empty(0))


def trl_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> LogProb:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    chosen, entropy = selective_log_softmax_and_entropy(hidden @ weight.t(), ids, entropy_requires_grad=False)
    return LogProb(chosen, entropy, torch.empty(0))


def loss_of(p: Problem, f: Callable[..., LogProb], fused: bool = False) -> Tensor:
    out = f(p.hidden, p.weight, p.ids)
    given = (out.logprob, p.behaviour, p.reference, p.advantage)
    denominator = loss_denominator(p.lengths, SETTINGS)
    if fused:
        offsets = torch.nn.functional.pad(p.lengths.cumsum(0), (1, 0))
        return fused_policy_loss(*given, offsets, SETTINGS, denominator, out.entropy.detach())[0]
    sequence = torch.arange(len(p.lengths), device=DEVICE).repeat_interleave(len(p.ids) // len(p.lengths))
    return policy_loss(*given, sequence, SETTINGS, denominator, out.entropy.detach())[0]


def liger_loss(p: Problem, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n = len(p.lengths)
    loss = LigerFusedLinearGRPOLoss(
        beta=SETTINGS.beta, compiled=compiled, use_ref_model=True, loss_type="bnpo", chunk_size=n
    )
    rows = [x.view(n, -1) for x in (p.ids, p.reference, p.behaviour)]
    mask = torch.ones_like(rows[0])
    hidden = p.hidden.view(n, mask.shape[1], -1)
    return loss(hidden, p.weight, rows[0], mask, p.advantage, None, rows[1], rows[2])[0]


def products(p: Problem) -> None:
    with torch.no_grad():
        logits = p.hidden @ p.weight.t()
        logits @ p.weight
        logits.t() @ p.hidden


def peers() -> dict[str, Callable[[Problem], Tensor | None]]:
    """name -> what it computes of the loss."""
    compiled = torch.compile(whole_logits)
    found: dict[str, Callable[[Problem], Tensor | None]] = {
        "fastsmart": lambda p: loss_of(p, logprob, fused=choose_kernel("auto", DEVICE) == "triton"),
        "torch eager": lambda p: loss_of(p, whole_logits),
        "torch.compile": lambda p: loss_of(p, compiled),
    }
    if importlib.util.find_spec("trl"):
        found["trl"] = lambda p: loss_of(p, trl_logprob)
    if importlib.util.find_spec("liger_kernel"):
        found["liger eager"] = lambda p: liger_loss(p, compiled=False)
        found["liger compiled"] = lambda p: liger_loss(p, compiled=True)
    found["products"] = products
    return found


def run(p: Problem, f: Callable[[Problem], Tensor | None]) -> float | None:
    """Loss and gradient once; gives the loss."""
    p.hidden.grad = p.weight.grad = None
    loss = f(p)
    if loss is None:
        return None
    loss.backward()
    return float(loss.detach())


def seconds(f: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size: str, runs: int) -> dict[str, list[float]]:
    """Seconds of each peer, in turn; also checks that all found the same loss."""
    p, fs = Problem.of(size), peers()
    losses = {name: run(p, f) for name, f in fs.items()}  # compiles, where there is something to compile
    print(size, {name: None if x is None else round(x, 6) for name, x in losses.items()})
    taken: dict[str, list[float]] = {name: [] for name in fs}
    for i in range(runs + 1):
        for name, f in fs.items():
            elapsed = seconds(lambda f=f: run(p, f))
            if i:
                taken[name].append(elapsed)
    return taken


def peak_mib(size: str, name: str) -> float:
    """Peak memory of loss and backward pass above what was there before, in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--peak", size, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(size: str, name: str) -> None:
    p, f = Problem.of(size), peers()[name]
    if DEVICE.type == "cuda":
        run(p, f)
        p.hidden.grad = p.weight.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(p, f)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    run(p, f)  # libraries and compilers take memory once
    p.hidden.grad = p.weight.grad = None
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts again
    before = resident("VmRSS")
    run(p, f)
    print((resident("VmHWM") - before) / 1024)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the GPU copying a GiB."""
    x = torch.empty(2**28, device=DEVICE)
    y = torch.empty_like(x)
    times = [seconds(lambda: y.copy_(x)) for _ in range(10)]
    return 2 * x.nbytes / statistics.median(times[2:])


@contextmanager
def log_probs_by(f: Callable[..., LogProb]) -> Iterator[None]:
    ours, training.logprob = training.logprob, f
    try:
        yield
    finally:
        training.logprob = ours


def measure_update(runs: int) -> dict[str, list[float]]:
    """Seconds of a whole update with our log-probs and with those of whole logits, in turn."""
    n, t, d, v = SIZES["smart"]
    vocab = load_vocabulary("smart")
    policy = Policy(PolicySize(v, d, 2048, 4, 8, 8), vocab).initialise(torch.Generator().manual_seed(0)).to(DEVICE)
    reference = copy.deepcopy(policy)
    rng = np.random.default_rng(0)
    ids = rng.integers(v, size=(n, t), dtype=np.int32)
    prompts = rng.integers(v, size=(n, 4), dtype=np.int32)
    lengths = np.full(n, t, np.int32)
    log_p = np.full((n, t), -6.0, np.float32)
    rollout = Rollout(prompts, np.full(n, 4, np.int32), ids, lengths, log_p, np.arange(n, dtype=np.int32) // 8, 0)
    batches = list(training.micro_batches(rollout, 16, DEVICE))
    anchors = training.reference_logprobs(reference, batches, 1.0, torch.float32)
    advantage = torch.randn(n, generator=torch.Generator().manual_seed(1))
    optimizer = make_optimizer(policy, 1e-5, (0.9, 0.999), 0.0)
    taken: dict[str, list[float]] = {"fastsmart": [], "whole logits": []}
    for i in range(runs + 1):
        for name, f in (("fastsmart", logprob), ("whole logits", whole_logits)):
            with log_probs_by(f):
                elapsed = seconds(
                    lambda: training.update(
                        policy, optimizer, batches, anchors, advantage, SETTINGS,
                        temperature=1.0, learning_rate=1e-5, max_grad_norm=1.0,
                    )
                )  # fmt: skip
            if i:
                taken[name].append(elapsed)
    return taken


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=15, help="counted runs of each, in turn")
    arguments.add_argument("--update-runs", type=int, default=4)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--peak", nargs=2, metavar=("SIZE", "NAME"), help=argparse.SUPPRESS)
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(*options.peak)
        return
    figures: dict[str, object] = {"sizes": SIZES}
    for size in SIZES:
        taken = measure(size, options.runs)
        memory = {name: peak_mib(size, name) for name in taken}
        for name, times in taken.items():
            ratio = statistics.median(a / b for a, b in zip(times, taken["fastsmart"], strict=True))
            print(
                f"{size:6} {name:16} {1e3 * statistics.median(times):9.1f} ms  x {ratio:5.2f} {memory[name]:9.0f} MiB"
            )
        figures[size] = {"seconds": taken, "peak_mib": memory}
        if size == "smart":
            part = statistics.median(taken["fastsmart"])
    update = measure_update(options.update_runs)
    whole = statistics.median(update["fastsmart"])
    ratio = statistics.median(a / b for a, b in zip(update["whole logits"], update["fastsmart"], strict=True))
    print(f"update {whole:.3f} s; with whole logits x {ratio:.3f}; the loss part is {part / whole:.1%} of it")
    figures["update_seconds"] = update
    if DEVICE.type == "cuda":
        n, t, _, v = SIZES["smart"]
        figures["copy_bytes_per_s"] = bandwidth = copy_bandwidth()
        floor = 6 * 4 * n * t * v / bandwidth  # logits and their gradient: written, and read by kernel and products
        print(f"smart: bytes floor {1e3 * floor:.3f} ms at {bandwidth / 1e12:.2f} TB/s")
    if options.out:
        write_result(options.out, json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
