"""Tokens a second of fastsmart's samplers beside transformers' `generate`, in one interleaved run.

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

import torch
from results import write_result

from fastsmart.policy.checkpoint import save_policy
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.sampling import SamplingSettings
from fastsmart.sampling.native import NativeEngine
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
    engines = {"native": native(policy), "transformers generate": generate(policy)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for run in range(options.runs + 1):
        for name, draw in engines.items():
            start = time.perf_counter()
            tokens = draw(run)
            if run:  # the first of each is its warm-up
                seconds[name].append((time.perf_counter() - start) / tokens)
    rates = {name: 1.0 / statistics.median(s) for name, s in seconds.items()}
    for name, rate in rates.items():
        spread = f"{1 / max(seconds[name]):.0f} - {1 / min(seconds[name]):.0f}"
        print(f"{name:24} {rate:7.0f} tokens/s (median of {options.runs}; {spread})")
    ratios = [t / n for t, n in zip(seconds["transformers generate"], seconds["native"], strict=True)]
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"native / generate, pair by pair: {median:.2f} ({low:.2f} - {high:.2f})")
    if options.out:
        write_result(options.out, {"tokens_per_s": rates, "seconds_per_token": seconds, "native_over_generate": ratios})


def native(policy: Policy) -> Callable[[int], int]:
    engine = NativeEngine(policy)
    engine.eos = -1  # no such token
    settings = SamplingSettings(group=GROUP, max_tokens=NEW_TOKENS)
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
