"""What the scripts of the stages share: their options, the policy they measure, the pieces they work on, the least that
a forward pass takes, and how a contender that this machine cannot run is left out.

Every script prints a table for each of its cases and writes them as `cases` of its JSON, beside machine and versions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from harness import Job, Work, chosen_peers
from results import write_result

from fastsmart.errors import UserError
from fastsmart.policy.device import resolved_dtype
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.policy.settings import PolicySettings
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.sampling import Rollout, SamplingSettings
from fastsmart.sampling.native import NativeEngine
from fastsmart.tokens.vocabulary import load_vocabulary

T = TypeVar("T")
Makers = Mapping[str, Callable[[], dict[str, Job]]]  # peer -> a function that makes its contenders


def parse(
    parser: argparse.ArgumentParser, quick: Mapping[str, Any], arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options, with those of `quick` as defaults under --quick; sets the number of threads."""
    shown = ", ".join(f"{name} {value}" for name, value in quick.items())
    parser.add_argument("--quick", action="store_true", help=f"a look in a minute; defaults are then: {shown}")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**quick)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return options


def run(main: Callable[[], object]) -> None:
    """Call a script's `main`; what a user can mend ends it with one sentence and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def made(makers: Makers, options: argparse.Namespace) -> tuple[dict[str, Job], dict[str, str]]:
    """The contenders of the chosen peers, and why those that this machine lacks are left out."""
    jobs: dict[str, Job] = {}
    left_out: dict[str, str] = {}
    for peer in chosen_peers(options, list(makers)):
        jobs |= tried(peer, makers[peer], left_out) or {}
    return jobs, left_out


def tried(name: str, make: Callable[[], T], left_out: dict[str, str]) -> T | None:
    """A contender, or None where this machine refuses or lacks it; `left_out` is then told why, under its name."""
    try:
        return make()
    except (ImportError, UserError) as error:
        left_out[name] = str(error)
        print(f"{name} is left out: {error}")
        return None


def one_pass(seconds: Mapping[str, Sequence[float]], passes: Mapping[str, int]) -> dict[str, list[float]]:
    """Seconds of one pass of each contender that repeats its work in a turn, because one pass is too short to time."""
    return {name: [s / passes.get(name, 1) for s in each] for name, each in seconds.items()}


def finish(stage: str, cases: dict[str, Any], options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The result of a script: a report for each case, what it measured beside them; written where --out says."""
    figures = {"stage": stage, "quick": options.quick, "device": options.device, "cases": cases, **more}
    if options.out:
        write_result(options.out, figures)
    return figures


def paper_policy(device: str) -> Policy:
    """A policy of the paper's shape, 17.2 M parameters, with fresh weights."""
    vocab = load_vocabulary("smart")
    policy = Policy(PolicySize(len(vocab), 512, 2048, 4, 8, 8), vocab).initialise(torch.Generator().manual_seed(0))
    return policy.to(device).eval()


def phi3(policy: Policy, dtype: torch.dtype | None = None) -> Any:
    """The policy as transformers' Phi3ForCausalLM, by way of its checkpoint."""
    from transformers import Phi3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, folder)
        return Phi3ForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32).eval().to(policy.device)


def compute_dtype(device: str) -> torch.dtype:
    """In which the policy computes on this device."""
    return resolved_dtype(PolicySettings(device=device))


def matrix_parameters(policy: Policy) -> int:
    """Parameters in matrices that every token is multiplied with; the embedding is only looked up."""
    return sum(p.numel() for name, p in policy.named_parameters() if p.dim() == 2 and "embed" not in name)


def decoding_work(policy: Policy, rows: int, prompt: int, tokens: int, itemsize: int) -> list[Work]:
    """The least that drawing `tokens` of `rows` sequences takes, `itemsize` bytes a number."""
    size, matrices = policy.size, matrix_parameters(policy)
    seen = size.num_layers * rows * tokens * (prompt + (tokens + 1) / 2)  # keys that all tokens look at
    width = size.num_kv_heads * size.head_size
    return [
        Work("weights times tokens", 2e-9 * matrices * rows * tokens, 1e-9 * itemsize * matrices * tokens),
        Work("keys and values looked at", 4e-9 * size.hidden_size * seen, 2e-9 * itemsize * width * seen),
    ]


def update_work(policy: Policy, rows: int, length: int) -> list[Work]:
    """The least that an optimizer step on `rows` sequences of `length` tokens takes, the reference's pass included."""
    size = policy.size
    causal = 2e-9 * size.num_layers * size.hidden_size * rows * length**2  # of one pass: half of all pairs
    return [
        Work("matrix products: reference 2, forward 2, backward 4", 8e-9 * matrix_parameters(policy) * rows * length),
        Work("attention, likewise", 4 * causal),
        Work("Adam: weight, gradient, two moments read, three written", gbyte=28e-9 * policy.num_parameters),
    ]


def played(pieces: int, tokens: int = 256) -> tuple[Rollout, Any]:
    """Pieces of the shipped policy in slow 4/4, always the same, and their vocabulary: music to decode and render."""
    from fastsmart.tokens.prompts import procedural

    policy = load_policy("pop909-tiny")
    prompts = procedural(policy.vocab, pieces, seed=0, time_signatures=["4/4"], tempo_range=(60.0, 90.0)).tokens
    engine, settings = NativeEngine(policy), SamplingSettings(group=1, max_tokens=tokens, ignore_eos=True)
    return Rollout.gather(engine.stream(prompts, settings, (0,)), prompts, 1), policy.vocab
