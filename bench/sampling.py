"""Tokens a second of the native sampler, vLLM and transformers' `generate`, in one interleaved run; and how long the
first two take to take over new weights.

    python bench/sampling.py --out bench/results/sampling.json

The policy has the shape of the paper's (4 layers, 512 wide, 2048 feed-forward, 8 heads, 413 tokens) and fresh weights;
64 sequences of 256 new tokens from four-token prompts, fp32. EOS never ends a piece, so every engine draws as many.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from results import write_result

from fastsmart.policy.checkpoint import save_policy
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.sampling import SamplingSettings, make_engine
from fastsmart.tokens.prompts import procedural
from fastsmart.tokens.vocabulary import load_vocabulary

PROMPTS, GROUP, NEW_TOKENS = 8, 8, 256


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--runs", type=int, default=5, help="counted runs of each engine, in turn")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    vocab = load_vocabulary("smart")
    size = PolicySize(len(vocab), 512, 2048, 4, 8, 8)
    policy = Policy(size, vocab).initialise(torch.Generator().manual_seed(0)).eval()
    settings = SamplingSettings(group=GROUP, max_tokens=NEW_TOKENS, max_rows=PROMPTS * GROUP)
    samplers = {name: make_engine(replace(settings, engine=name), policy) for name in ("native", "vllm")}
    engines = {name: stream(sampler, policy, settings) for name, sampler in samplers.items()}
    engines["transformers generate"] = generate(policy)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    syncs: dict[str, list[float]] = {name: [] for name in samplers}
    for run in range(options.runs + 1):
        for name, draw in engines.items():
            start = time.perf_counter()
            tokens = draw(run)
            if run:  # the first of each is its warm-up
                seconds[name].append((time.perf_counter() - start) / tokens)
        for name, sampler in samplers.items():
            start = time.perf_counter()
            sampler.load(policy, run)
            if run:
                syncs[name].append(time.perf_counter() - start)
    for sampler in samplers.values():
        sampler.close()
    rates = {name: 1.0 / statistics.median(s) for name, s in seconds.items()}
    for name, rate in rates.items():
        spread = f"{1 / max(seconds[name]):.0f} - {1 / min(seconds[name]):.0f}"
        print(f"{name:24} {rate:7.0f} tokens/s (median of {options.runs}; {spread})")
    ratios = {}
    for fast, slow in (("native", "transformers generate"), ("vllm", "transformers generate"), ("native", "vllm")):
        pairs = [s / f for f, s in zip(seconds[fast], seconds[slow], strict=True)]
        ratios[f"{fast}_over_{slow.removeprefix('transformers ')}"] = pairs
        print(f"{fast} / {slow}, pair by pair: {statistics.median(pairs):.2f} ({min(pairs):.2f} - {max(pairs):.2f})")
    for name, each in syncs.items():
        print(
            f"{name} takes over {policy.num_parameters / 1e6:.1f} M weights in {statistics.median(each) * 1e3:.0f} ms"
        )
    if options.out:
        write_result(
            options.out, {"tokens_per_s": rates, "seconds_per_token": seconds, **ratios, "seconds_per_sync": syncs}
        )


def stream(engine: Any, policy: Policy, settings: SamplingSettings) -> Callable[[int], int]:
    engine.eos = -1  # no such token
    prompts = procedural(policy.vocab, PROMPTS, seed=0).tokens
    return lambda run: sum(len(c.ids) for c in engine.stream(prompts, settings, (run,)))


def generate(policy: Policy) -> Callable[[int], int]:
    from transformers import Phi3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, folder)
        model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = procedural(policy.vocab, PROMPTS, seed=0).tokens
    ids = torch.stack([torch.from_numpy(prompts.row(i // GROUP)).long() for i in range(PROMPTS * GROUP)])

    @torch.no_grad()
    def draw(run: int) -> int:
        torch.manual_seed(run)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            temperature=1.0,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=policy.vocab.pad_id,
        )
        return out[:, ids.shape[1] :].numel()

    return draw


if __name__ == "__main__":
    main()
