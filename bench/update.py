"""One optimizer update, the reference's log-probs included: ours beside transformers and TRL's GRPOTrainer.

    python bench/update.py --peer all --out bench/results/update.json

A policy of the paper's shape (17.2 M parameters) on 32 completions of 256 tokens: log-probs of the reference, forward,
bnpo loss with k3, backward, clip, AdamW, in micro-batches of 16. "transformers" does so with Phi3ForCausalLM, its
logits whole, log_softmax and gather; "whole-logits" is ours with those in place of our log-probs; "trl" is the trainer
of the public pipeline (bench/peers/public.py) given these completions, as its users run it.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import torch
from harness import Job, interleaved, measured_ceilings, parser, report
from logprob import whole_logits
from stages import compute_dtype, finish, made, paper_policy, parse, phi3, run, update_work
from torch import Tensor

import fastsmart.trainer.update as training
from fastsmart.grpo.settings import LossSettings
from fastsmart.kernels.logprob import LogProb
from fastsmart.policy.hf_format import save_policy
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.policy.transformer import Policy
from fastsmart.sampling.rollout import Rollout
from fastsmart.trainer.batch import micro_batches

PEERS = ("transformers", "trl", "whole-logits")
GROUP, PROMPT, MICRO_BATCH = 8, 4, 16
LEARNING_RATE, MAX_GRAD_NORM, SETTINGS = 1e-5, 1.0, LossSettings()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, 5, PEERS)
    options.add_argument("--completions", type=int, default=32, help="32")
    options.add_argument("--tokens", type=int, default=256, help="of each (256)")
    given = parse(options, {"completions": 16, "tokens": 128, "runs": 3}, arguments)
    policy, dtype = paper_policy(given.device), compute_dtype(given.device)
    rollout = made_up(policy, given.completions, given.tokens)
    advantage = torch.randn(given.completions, generator=torch.Generator().manual_seed(1))
    with ExitStack() as stack:
        makers = {
            "transformers": lambda: {"transformers": plain(policy, rollout, advantage, dtype)},
            "trl": lambda: {"trl": trl(policy, rollout, advantage, given, stack)},
            "whole-logits": lambda: {"ours, whole logits": whole(ours(policy, rollout, advantage, dtype))},
        }
        peers, left_out = made(makers, given)
        jobs = {"fastsmart": ours(policy, rollout, advantage, dtype)} | peers
        seconds = interleaved(jobs, given.runs, given.device)
    work = update_work(policy, given.completions, PROMPT + given.tokens - 1)
    case = report("update", seconds, "fastsmart", work, measured_ceilings(given.device, dtype))
    shape = f"{given.completions} x {given.tokens}"
    return finish("update", {shape: case}, given, left_out=left_out, dtype=str(dtype))


def made_up(policy: Policy, n: int, tokens: int) -> Rollout:
    """Completions of random pitches, all of full length."""
    rng, pitches = np.random.default_rng(0), np.array(policy.vocab.ids_of("Pitch"), np.int32)
    prompts, ids = rng.choice(pitches, (-(-n // GROUP), PROMPT)), rng.choice(pitches, (n, tokens))
    group = np.arange(n, dtype=np.int32) // GROUP
    logprobs = np.full((n, tokens), -np.log(len(policy.vocab)), np.float32)
    lengths = [np.full(n, length, np.int32) for length in (PROMPT, tokens)]
    return Rollout(prompts[group], lengths[0], ids, lengths[1], logprobs, group, 0)


def ours(policy: Policy, rollout: Rollout, advantage: Tensor, dtype: torch.dtype) -> Callable[[], training.Update]:
    """What training does with a rollout; each job has a policy of its own."""
    reference, policy = policy, copy.deepcopy(policy)
    optimizer = make_optimizer(policy, LEARNING_RATE, (0.9, 0.999), 0.0)

    def job() -> training.Update:
        batches = list(micro_batches(rollout, MICRO_BATCH, policy.device))
        ref_logprobs = training.reference_logprobs(reference, batches, 1.0, dtype)
        return training.update(
            policy, optimizer, batches, ref_logprobs, advantage, SETTINGS,
            temperature=1.0, learning_rate=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM, dtype=dtype,
        )  # fmt: skip

    return job


def whole(job: Job) -> Job:
    """The same job with log_softmax and gather on the whole logits in place of our log-probs."""

    def wrapped() -> object:
        with log_probs_by(whole_logits):
            return job()

    return wrapped


@contextmanager
def log_probs_by(f: Callable[..., LogProb]) -> Iterator[None]:
    own, training.logprob = training.logprob, f
    try:
        yield
    finally:
        training.logprob = own


def plain(policy: Policy, rollout: Rollout, advantage: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """The update written down with transformers and torch; the job gives the loss."""
    reference, model = phi3(policy), phi3(policy).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    device, n = policy.device, len(rollout)
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.ids], axis=1)).long().to(device)
    sampler_logprobs, batch_advantage = torch.from_numpy(rollout.logprobs).to(device), advantage[:, None].to(device)

    def logprobs(model: Any, rows: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(rows).logits
        log_p = logits[:, PROMPT - 1 : -1].float().log_softmax(dim=-1)
        return log_p.gather(-1, rows[:, PROMPT:, None])[..., 0]

    def job() -> float:
        starts, total = range(0, n, MICRO_BATCH), 0.0
        with torch.no_grad():
            ref_logprobs = [logprobs(reference, ids[at : at + MICRO_BATCH]) for at in starts]
        for at, ref_logprob in zip(starts, ref_logprobs, strict=True):
            rows = slice(at, at + MICRO_BATCH)
            log_p = logprobs(model, ids[rows])
            ratio = (log_p - sampler_logprobs[rows]).exp()
            clipped = ratio.clamp(1 - SETTINGS.clip_low, 1 + SETTINGS.clip_high)
            kl = (ref_logprob - log_p).exp() - (ref_logprob - log_p) - 1
            loss = (
                SETTINGS.beta * kl - torch.min(ratio * batch_advantage[rows], clipped * batch_advantage[rows])
            ).sum() / sampler_logprobs.numel()
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return job


def trl(policy: Policy, rollout: Rollout, advantage: Tensor, options: argparse.Namespace, stack: ExitStack) -> Job:
    from peers.public import PublicTrainer

    folder, steps = stack.enter_context(tempfile.TemporaryDirectory()), options.runs + 1
    save_policy(policy, folder)
    prompts = rollout.prompt_ids[::GROUP].tolist() * steps
    trainer = PublicTrainer(
        folder, prompts, steps, lambda pieces: advantage.tolist(), defaultdict(float), group=GROUP,
        max_tokens=rollout.ids.shape[1], completions=rollout.ids.tolist(), learning_rate=LEARNING_RATE,
    )  # fmt: skip
    stack.callback(trainer.close)
    return trainer.step


if __name__ == "__main__":
    run(main)
