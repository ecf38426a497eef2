"""Checks of gpu_first.py, stage by stage: mixdown, sampler, encoder, update, each right and beside its floor."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import synthetic_piano
import torch
import update as update_bench
from gpu_look import Finding, Look
from harness import Work
from mixdown import random_clips
from policies import playing_policy
from score import GFLOP, HEARD, TRUTH, WEIGHTS, agreement, clips
from stages import decoding_work, paper_policy, update_work

from fastsmart.audio import RenderSettings
from fastsmart.audio.bank_renderer import BankRenderer
from fastsmart.audio.events import piece_arrays
from fastsmart.audio.gpu_mixdown import DeviceMixer
from fastsmart.config import Config
from fastsmart.kernels.mixdown import mixdown as mix_kernel
from fastsmart.reward.audiobox import AudioboxReward, make_random_weights
from fastsmart.reward.audiobox.architecture import Size
from fastsmart.reward.audiobox.gpu import BatchEncoder
from fastsmart.sampling import Rollout, SamplingSettings
from fastsmart.sampling.cuda_graph_batch import GraphBatch
from fastsmart.sampling.native import NativeEngine
from fastsmart.tokens.prompts import procedural
from fastsmart.trainer.parity import LIMITS, token_mult_prob_error

GROUP, PROMPT = 8, 4
SMALL = Size(channels=16, width=32, ffn=64, heads=4, layers=2, pos_taps=16, pos_groups=4, head_layers=3)


def mixdown(look: Look) -> Iterator[Finding]:
    """Clips of a synthetic piano, mixed here and by the CPU's renderer; twice: the same notes give the same bits."""
    seconds, count = look.size(10, 1), look.size(64, 1)
    if look.quick:
        synthetic_piano.PARTIALS = 1
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTSMART_CACHE"] = folder
        settings = synthetic_piano.write_piano(Path(folder), RenderSettings(max_seconds=float(seconds)))
        notes = random_clips(count)
        with DeviceMixer(settings, look.device, look.kernel) as mixer, BankRenderer(settings) as cpu:
            mixed, _ = mixer.render(notes)
            again, _ = mixer.render(notes)
            exact = np.empty((count, settings.max_samples), np.float32)
            for i, out in enumerate(exact):
                cpu.render_into(out, piece_arrays(notes, i))
            off = float(np.abs(mixed.cpu().numpy() - exact).max() / np.abs(exact).max())
            work = [Work("clips", gbyte=12e-9 * exact.size)]
            us = look.launched_us(lambda: mixer.render(notes))
            yield look.finding(
                f"{count} clips", us=us, work=work, apart=off, limit=1e-5, same_again=torch.equal(mixed, again)
            )
            slices, *_ = mixer._slices(notes)
            yield look.finding("plan and copies", us=look.launched_us(lambda: mixer._slices(notes)))
            kernel = partial(mix_kernel, slices, mixer._waves, settings.max_samples, True, look.kernel)
            yield look.finding("kernel", us=look.launched_us(kernel), work=work)


def sampler(look: Look) -> Iterator[Finding]:
    """The decode step, recorded and launched, and what the trainer makes of the log-probs that it gives."""
    policy, tokens = playing_policy().to(look.device), look.size(256, 12)
    rows = GROUP * look.size(8, 1)
    prompts = procedural(policy.vocab, rows // GROUP, seed=0).tokens
    settings = SamplingSettings(group=GROUP, max_tokens=tokens)
    for dtype in (torch.float32, torch.bfloat16) if look.on_gpu else (torch.float32,):
        engine = NativeEngine(policy, 0, dtype, static_cache=True)
        rollout = Rollout.gather(engine.stream(prompts, settings, (0,)), prompts, GROUP)
        error = token_mult_prob_error(policy, rollout, Config(), dtype)
        yield look.finding(f"token_mult_prob_error, {dtype}", apart=error - 1, limit=LIMITS[dtype] - 1)
        start = time.perf_counter()
        drawn = sum(len(c.ids) for c in engine.stream(prompts, replace(settings, ignore_eos=True), (1,)))
        us = 1e6 * (time.perf_counter() - start)
        work = decoding_work(policy, rows, PROMPT, tokens, dtype.itemsize)
        case = f"{rows} x {tokens}, {dtype}"
        yield look.finding(case, us=us, work=work, dtype=dtype, tokens_per_s=1e6 * drawn / us)
        (batch,) = engine.graph_batches.values()
        yield from _decode_steps(look, batch, dtype, min(16, tokens - 2))


@torch.inference_mode()
def _decode_steps(look: Look, batch: GraphBatch, dtype: torch.dtype, steps: int) -> Iterator[Finding]:
    """Microseconds of a decode step at slots of a rollout, replayed, and launched by Python."""

    def some(draw: Callable[[int], None], at: int) -> None:
        batch.place[0], batch.place[1] = at, 1
        draw(steps)

    def launched(count: int) -> None:
        for _ in range(count):
            batch.step()

    for at in (5, 130, 240) if not look.quick else (5,):
        us = look.launched_us(partial(some, batch.draw, at), 5) / steps
        yield look.finding(f"step at slot {at}, {dtype}", us=us)
    yield look.finding(f"step launched, {dtype}", us=look.launched_us(partial(some, launched, 5), 3) / steps)
    look.kernel_table(partial(some, batch.draw, 130), f"{steps} decode steps, {dtype}")


def encoder(look: Look) -> Iterator[Finding]:
    """Audiobox with random weights: the layers beside the float32 encoder of a CPU, then its time by batch."""
    size, dtypes = (SMALL, ["float16"]) if look.quick else (Size(), ["float16", "bfloat16", "float32"])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        checkpoint = make_random_weights(Path(folder, "checkpoint.pt"), size=size)
        for dtype in dtypes:
            found = agreement([dtype], checkpoint, look.device)
            yield {"case": f"{TRUTH} windows, {dtype}", "apart": found["encoder_error"][dtype], "ok": found["passed"]}
        reward = AudioboxReward(checkpoint, device=look.device, dtype="float16", batch_size=64)
    assert isinstance(reward.encoder, BatchEncoder)
    for count in (1, 8, 32, 64) if not look.quick else (1,):
        windows = list(torch.from_numpy(clips(count)).to(look.device))
        with torch.inference_mode():
            us = look.launched_us(partial(reward.encoder, windows), 5)
            work = [Work("products", count * GFLOP, 2e-9 * WEIGHTS)] if not look.quick else []
            yield look.finding(f"{count} windows, float16", us=us, work=work, dtype=look.dtype(torch.float16))
            look.kernel_table(partial(reward.encoder, windows), f"encoder, {count} windows, float16")


def recorded_elsewhere(look: Look) -> Iterator[Finding]:
    """A graph recorded by a thread that has ended since: what is replayed must be what was recorded."""
    size, found = SMALL if look.quick else Size(), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_random_weights(Path(folder, "checkpoint.pt"), size=size)
        reward = AudioboxReward(checkpoint, device=look.device, dtype="float16", batch_size=look.size(8, 1))
    windows = list(torch.from_numpy(clips(look.size(8, 1))).to(look.device))
    windows[0] = windows[0][:HEARD]

    def job() -> None:
        with torch.inference_mode():
            found.append(reward.encoder(windows).cpu())

    for _ in range(2):
        thread = threading.Thread(target=job)
        thread.start()
        thread.join()
        _ = [look.normal(2**20) for _ in range(look.size(50, 1))]  # over what the thread may have left
        job()
    same = all(torch.equal(found[0], other) for other in found[1:])
    yield {"case": f"{len(windows)} windows", "runs": len(found), "ok": same}


def update(look: Look) -> Iterator[Finding]:
    """One optimizer step, the reference's log-probs included, in micro-batches of 16 and of 64."""
    count, tokens, dtype = look.size(64, 8), look.size(256, 12), look.dtype(torch.bfloat16)
    policy = playing_policy().to(look.device) if look.quick else paper_policy(look.device)
    rollout, advantage = update_bench.made_up(policy, count, tokens), torch.randn(count)
    work = update_work(policy, count, PROMPT + tokens - 1)
    for size in (16, 64) if not look.quick else (4,):
        update_bench.MICRO_BATCH = size
        job = update_bench.ours(policy, rollout, advantage, dtype)
        first = job()
        finite = bool(np.isfinite([first.stats["loss"], first.grad_norm]).all()) and not first.skipped
        us = look.launched_us(job, 5)
        case = f"{count} x {tokens} in {size}, {dtype}"
        yield look.finding(case, us=us, work=work, dtype=dtype, grad_norm=first.grad_norm, ok=finite)
        look.kernel_table(job, f"update, {case}")
