"""Sampling: the native engine beside transformers' `generate` and vLLM, in one interleaved run.

    python bench/sampling.py --peer all --out bench/results/sampling.json

The policy has the shape of the paper's (4 layers, 512 wide, 2048 feed-forward, 8 heads, 413 tokens) and fresh weights;
64 sequences of 256 new tokens from four-token prompts. EOS never ends a piece, so every engine draws as many. Once
vLLM's worker for CPUs has started it slows the whole process: compare with `generate` in a run of their own.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import torch
from harness import REFERENCE, Job, interleaved, measured_ceilings, parser, report
from stages import compute_dtype, decoding_work, finish, made, paper_policy, parse, phi3, run

from fastsmart.policy.transformer import Policy
from fastsmart.sampling import Engine, SamplingSettings, make_engine
from fastsmart.tokens.prompts import procedural
from fastsmart.tokens.token_batch import TokenBatch

PEERS = ("generate", "vllm")
GROUP = 8


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, 5, PEERS)
    options.add_argument("--prompts", type=int, default=8, help=f"of which {GROUP} sequences each are drawn (8)")
    options.add_argument("--tokens", type=int, default=256, help="new ones of each sequence (256)")
    given = parse(options, {"tokens": 64, "runs": 5}, arguments)
    policy, dtype = paper_policy(given.device), compute_dtype(given.device)
    rows, prompts = given.prompts * GROUP, procedural(policy.vocab, given.prompts, seed=0).tokens
    settings = SamplingSettings(group=GROUP, max_tokens=given.tokens, max_rows=rows, ignore_eos=True)
    engines: list[Engine] = []

    def engine(name: str) -> dict[str, Job]:
        engines.append(make_engine(replace(settings, engine=name), policy, dtype=dtype))
        return {name: draws(engines[-1], prompts, settings)}

    makers = {"generate": lambda: generate(policy, prompts, given.tokens, dtype), "vllm": lambda: engine("vllm")}
    peers, left_out = made(makers, given)
    own = engine("native")
    if given.device == "cuda":
        engines.append(make_engine(settings, policy, dtype=dtype))
        own["native, no graph"] = draws(engines[-1], prompts, replace(settings, cuda_graph=False))
    seconds = interleaved(own | peers, given.runs, given.device)
    for each in engines:
        each.close()
    work = decoding_work(policy, rows, 4, given.tokens, dtype.itemsize)
    case = report("sampling", seconds, "native", work, measured_ceilings(given.device, dtype))
    rates = {name: rows * given.tokens / statistics.median(s) for name, s in seconds.items() if name != REFERENCE}
    print("  tokens/s:", ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    shape = f"{rows} x {given.tokens}"
    return finish("sampling", {shape: case | {"tokens_per_s": rates}}, given, left_out=left_out, dtype=str(dtype))


def draws(engine: Any, prompts: TokenBatch, settings: SamplingSettings) -> Job:
    seeds = itertools.count()

    def job() -> None:
        drawn = sum(len(c.ids) for c in engine.stream(prompts, settings, (next(seeds),)))
        assert drawn == len(prompts) * settings.group * settings.max_tokens

    return job


def generate(policy: Policy, prompts: TokenBatch, tokens: int, dtype: torch.dtype) -> dict[str, Job]:
    model = phi3(policy, dtype)
    ids = torch.stack([torch.from_numpy(row).long() for row in prompts for _ in range(GROUP)]).to(policy.device)
    seeds = itertools.count()

    @torch.no_grad()
    def job() -> None:
        torch.manual_seed(next(seeds))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            temperature=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=policy.vocab.pad_id,
        )
        assert out.shape == (len(ids), ids.shape[1] + tokens)

    return {"transformers generate": job}


if __name__ == "__main__":
    run(main)
