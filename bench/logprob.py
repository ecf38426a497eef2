"""The loss part of an update, from hidden states to their gradient: fastsmart's kernels beside what others use.

    pip install --no-deps liger-kernel                            # TRL is a development dependency; Liger is by hand
    python bench/logprob.py --peer all --out bench/results/logprob.json

Every peer computes the log-probs of the same tokens, with entropies, and the same bnpo loss with k3 and its gradient in
hidden states and head; Liger has its own loss and gives no entropies. Memory is the peak of a process of its own.
"products" are the three matrix products alone, the floor on a CPU as it can be reached; on a GPU the floor is those or
the bytes of logits that must move.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import torch
from harness import Ceilings, Job, Work, interleaved, measured_ceilings, parser, report
from memory import added_mib, peak_in_own_process
from stages import finish, made, parse, run
from torch import Tensor

from fastsmart.grpo.fused import fused_policy_loss
from fastsmart.grpo.losses import loss_denominator, policy_loss
from fastsmart.grpo.settings import LossSettings
from fastsmart.kernels.jit import choose_kernel
from fastsmart.kernels.logprob import LogProb, logprob

PEERS = ("eager", "compile", "trl", "liger")
SETTINGS = LossSettings()
SMART = (32, 256, 512, 413)  # completions, tokens of each, hidden width, vocabulary
LLM = {"cpu": (4, 64, 64, 151_936), "cuda": (32, 256, 896, 151_936)}
Loss = Callable[["Problem"], Tensor]


@dataclass(frozen=True)
class Problem:
    """Hidden states [M, D] of N completions of T tokens, head [V, D], and what the loss wants to know of each token."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    sampler_logprobs: Tensor
    reference: Tensor
    advantage: Tensor
    lengths: Tensor

    @staticmethod
    def of(shape: Sequence[int], device: str) -> Problem:
        """Made where it is measured: the log-probs of size llm are 2 TFLOP."""
        n, t, d, v = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        hidden, weight = normal(n * t, d), normal(v, d) / d**0.5
        ids = torch.randint(v, (n * t,), generator=generator, device=device)
        sampled = logprob(hidden, weight, ids, kernel="torch").logprob + 0.1 * normal(2, n * t)
        lengths = torch.full((n,), t, device=device)
        return Problem(hidden.requires_grad_(), weight.requires_grad_(), ids, *sampled, normal(n), lengths)


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
    given = (out.logprob, p.sampler_logprobs, p.reference, p.advantage)
    denominator = loss_denominator(p.lengths, SETTINGS)
    if fused:
        offsets = torch.nn.functional.pad(p.lengths.cumsum(0), (1, 0))
        return fused_policy_loss(*given, offsets, SETTINGS, denominator, out.entropy.detach())[0]
    sequence = torch.arange(len(p.lengths), device=p.ids.device).repeat_interleave(len(p.ids) // len(p.lengths))
    return policy_loss(*given, sequence, SETTINGS, denominator, out.entropy.detach())[0]


def liger_loss(p: Problem, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n = len(p.lengths)
    loss = LigerFusedLinearGRPOLoss(
        beta=SETTINGS.beta, compiled=compiled, use_ref_model=True, loss_type="bnpo", chunk_size=n
    )
    rows = [x.view(n, -1) for x in (p.ids, p.reference, p.sampler_logprobs)]
    mask = torch.ones_like(rows[0])
    hidden = p.hidden.view(n, mask.shape[1], -1)
    return loss(hidden, p.weight, rows[0], mask, p.advantage, None, rows[1], rows[2])[0]


def products(p: Problem) -> None:
    """What every loss has to multiply, its gradients included."""
    with torch.no_grad():
        logits = p.hidden @ p.weight.t()
        logits @ p.weight
        logits.t() @ p.hidden


def contenders(p: Problem, peer: str) -> dict[str, Callable[[], float | None]]:
    """Jobs of ours ("fastsmart") or of a peer, by name, each loss and gradient once; raises ImportError for a peer that
    is not installed."""
    if peer in ("trl", "liger"):
        importlib.import_module({"trl": "trl", "liger": "liger_kernel"}[peer])
    compiled, triton = torch.compile(whole_logits), choose_kernel("auto", p.ids.device) == "triton"

    def with_gradient(loss: Loss) -> Callable[[], float]:
        def job() -> float:
            p.hidden.grad = p.weight.grad = None
            value = loss(p)
            value.backward()
            return float(value.detach())

        return job

    losses: dict[str, dict[str, Loss]] = {
        "fastsmart": {"fastsmart": lambda p: loss_of(p, logprob, fused=triton)},
        "eager": {"torch eager": lambda p: loss_of(p, whole_logits)},
        "compile": {"torch.compile": lambda p: loss_of(p, compiled)},
        "trl": {"trl": lambda p: loss_of(p, trl_logprob)},
        "liger": {
            "liger eager": lambda p: liger_loss(p, compiled=False),
            "liger compiled": lambda p: liger_loss(p, compiled=True),
        },
    }
    if peer == "products":
        return {"products": lambda: products(p)}
    return {name: with_gradient(loss) for name, loss in losses[peer].items()}


def work(shape: Sequence[int], device: str) -> Work:
    """The three products; beside them the bytes of what comes in and of the gradients, on a GPU those of the logits and
    their gradient too: written, and read by kernel and products."""
    n, t, d, v = shape
    m = n * t
    numbers = 2 * d * (m + v) + (6 * m * v if device.startswith("cuda") else 0)
    return Work("products of hidden states, head and logits", 6e-9 * m * d * v, 4e-9 * numbers)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    options = parser(__doc__, 15, PEERS)
    options.add_argument("--sizes", nargs="+", default=["smart", "llm"], choices=["smart", "llm"])
    options.add_argument("--completions", type=int, default=SMART[0], help=f"of size smart ({SMART[0]})")
    options.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the peak")
    options.add_argument("--peak", nargs=2, metavar=("PEER", "NAME"), help=argparse.SUPPRESS)
    given = parse(options, {"sizes": ["smart"], "runs": 5, "memory": False}, arguments)
    shapes = {"smart": (given.completions, *SMART[1:]), "llm": LLM[given.device.split(":")[0]]}
    if given.peak:
        job = contenders(Problem.of(shapes[given.sizes[0]], given.device), given.peak[0])[given.peak[1]]
        print(added_mib(job, given.device))
        return None
    ceilings, cases, left_out = measured_ceilings(given.device), {}, {}
    for size in given.sizes:
        cases[size], left_out = measured(size, shapes[size], given, ceilings)
        figures = finish("logprob", cases, given, left_out=left_out)
    return figures


def measured(
    size: str, shape: Sequence[int], options: argparse.Namespace, ceilings: Ceilings
) -> tuple[dict[str, Any], dict[str, str]]:
    p = Problem.of(shape, options.device)
    found = {peer: contenders(p, peer) for peer in ("fastsmart", "products")}

    def maker(peer: str) -> Callable[[], dict[str, Job]]:
        return lambda: found.setdefault(peer, contenders(p, peer))

    peers, left_out = made({peer: maker(peer) for peer in PEERS}, options)
    jobs = found["fastsmart"] | peers | found["products"]
    losses = {name: job() for name, job in jobs.items()}  # compiles, where there is something to compile
    seconds = interleaved(jobs, options.runs, options.device)
    case = report(f"logprob, {size}", seconds, "fastsmart", [work(shape, options.device)], ceilings)
    print("  loss:", {name: round(loss, 6) for name, loss in losses.items() if loss is not None})
    case |= {"shape": list(shape), "losses": losses}
    if options.memory:
        own = ["--device", options.device, "--threads", str(options.threads), "--sizes", size]
        own += ["--completions", str(options.completions)]
        case["peak_mib"] = {
            name: peak_in_own_process(__file__, [*own, "--peak", peer, name]) for peer in found for name in found[peer]
        }
        print("  peak memory, MiB:", {name: round(mib) for name, mib in case["peak_mib"].items()})
    return case, left_out


if __name__ == "__main__":
    run(main)
