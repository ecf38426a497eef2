"""Checks of gpu_first.py, kernel by kernel: beside its twin, and its time beside its floor, at the shapes of training.

Twins compute in float32 from the same numbers, so "apart" is what 16 bit and another order of summation make of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_look import Finding, Look, apart
from harness import Work

from fastsmart.grpo.fused import fused_policy_loss
from fastsmart.grpo.losses import loss_denominator, policy_loss
from fastsmart.grpo.settings import LossSettings
from fastsmart.kernels.attention import KEYS, gated_attention
from fastsmart.kernels.convolution import convolution_gelu
from fastsmart.kernels.decode_product import added_product, gated_product, normalised_product
from fastsmart.kernels.decode_step import add_normalised, attend_next, gated
from fastsmart.kernels.jit import INTERPRETED, triton
from fastsmart.kernels.logprob import logprob
from fastsmart.kernels.moments import window_moments
from fastsmart.kernels.sample import sample_tokens

HEADS, HEAD, WIDTH, UNITS, VOCABULARY = 8, 64, 512, 2048, 413  # of the paper's policy
ROWS = 64  # completions of a step
FRAMES, EARS, EAR_WIDTH = 499, 12, 768  # of Audiobox: frames of a window, heads, width


def machine(look: Look) -> Iterator[Finding]:
    """The rates that floors are made of, a launch from Python, and a kernel of nothing inside a graph."""
    version = triton.__version__ if triton is not None else None
    yield {"case": "versions", "torch": torch.__version__, "triton": version, "interpreted": INTERPRETED}
    name = torch.cuda.get_device_name() if look.on_gpu else "cpu"
    yield {"case": "device", "name": name, "cores": len(os.sched_getaffinity(0))}
    for dtype in (torch.bfloat16, torch.float32) if look.on_gpu else (torch.float32,):
        rates = look.ceilings(dtype)
        yield {
            "case": str(dtype),
            "tflop_per_s": rates.gemm_gflop_per_s / 1e3,
            "copy_tb_per_s": rates.copy_gb_per_s / 1e3,
        }
    x = look.normal(1)
    yield look.finding("launch", us=look.launched_us(lambda: [x.add_(1) for _ in range(200)]) / 200)
    yield look.finding("graph node", us=look.replayed_us(lambda: x.add_(1), 500))


def sample(look: Look) -> Iterator[Finding]:
    """Draws of kernel and twin from the same numbers; one on a border may fall on either side of it."""
    rows = look.size(4096, 64)
    logits, uniform = 3 * look.normal(rows, VOCABULARY), torch.rand(rows, device=look.device)
    drawn, twin = (sample_tokens(logits, uniform, 0.9, kernel) for kernel in (look.kernel, "torch"))
    same = drawn[0] == twin[0]
    yield look.finding("share of other tokens", apart=1 - float(same.float().mean()), limit=2e-3)
    gap = float((drawn[1] - twin[1])[same].abs().max())
    few = logits[:ROWS], uniform[:ROWS]
    work = [Work("logits", gbyte=4e-9 * few[0].numel())]
    yield look.finding(
        f"log-probs, {ROWS} rows",
        us=look.replayed_us(lambda: sample_tokens(*few, 1.0, look.kernel)),
        work=work,
        apart=gap,
        limit=1e-4,
    )


def decode(look: Look) -> Iterator[Finding]:
    """What a decode step does between its products, at the first slot, at borders of the kernel's loop, and late."""
    rows, slots, dtype = look.size(ROWS, 2), 320, look.dtype(torch.bfloat16)
    kv = look.normal(2, rows, HEADS, slots, HEAD, dtype=dtype)
    qkv = look.normal(rows, 3 * HEADS * HEAD, dtype=dtype)
    qkv[:, : HEADS * HEAD] *= HEAD**-0.5
    angle = torch.randn(slots, HEAD // 2)
    turn = torch.stack([angle.cos(), angle.sin()], -1).to(look.device)
    padding = torch.randint(0, 4, (rows,), device=look.device)
    for at in (0, 3, 64, 131, 259) if not look.quick else (0, 65):
        slot, left = torch.tensor([at], device=look.device), padding.clamp(max=at)
        found = attend_next(qkv, kv.clone(), turn, slot, left, HEADS, look.kernel)
        exact = attend_next(qkv.float(), kv.float(), turn, slot, left, HEADS, "torch")
        cache = kv.clone()
        us = look.replayed_us(lambda c=cache, s=slot, p=left: attend_next(qkv, c, turn, s, p, HEADS, look.kernel))
        work = [Work("keys and values", gbyte=2e-9 * rows * HEADS * (at + 1) * HEAD * dtype.itemsize)]
        yield look.finding(f"attend, slot {at}", us=us, work=work, apart=apart(found, exact), limit=2e-2)
    x, more = (look.normal(rows, WIDTH, dtype=dtype) for _ in range(2))
    norm = add_normalised(x.clone(), more, 1e-5, dtype, look.kernel)
    exact = add_normalised(x.float(), more.float(), 1e-5, torch.float32, "torch")
    us = look.replayed_us(lambda: add_normalised(x, more, 1e-5, dtype, look.kernel))
    work = [Work("rows", gbyte=4e-9 * x.numel() * dtype.itemsize)]
    yield look.finding("norm of the sum", us=us, work=work, apart=apart(norm, exact), limit=2e-2)
    pair = look.normal(rows, 2 * UNITS, dtype=dtype)
    off = apart(gated(pair, look.kernel), gated(pair.float(), "torch"))
    work = [Work("units", gbyte=1.5e-9 * pair.numel() * dtype.itemsize)]
    yield look.finding("gate", us=look.replayed_us(lambda: gated(pair, look.kernel)), work=work, apart=off, limit=2e-2)


def decode_products(look: Look) -> Iterator[Finding]:
    """The products of a decode step, with the norm before or the sum after them, and the library's without."""
    rows, epsilon, dtype = look.size(ROWS, 4), 1e-5, look.dtype(torch.bfloat16)
    x, y, units = (3 * look.normal(rows, k, dtype=dtype) for k in (WIDTH, WIDTH, UNITS))

    def weight(n: int, k: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (look.normal(n, k) / k**0.5).to(dtype)

    products: dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...]]] = {
        "qkv": (normalised_product, (x, weight(3 * WIDTH, WIDTH), epsilon, None, None)),
        "out": (added_product, (x.clone(), y, weight(WIDTH, WIDTH), None)),
        "gate and up": (gated_product, (x, weight(2 * UNITS, WIDTH), epsilon)),
        "down": (added_product, (x.clone(), units, weight(WIDTH, UNITS), None)),
        "head": (normalised_product, (x, weight(VOCABULARY, WIDTH, torch.float32), epsilon, None, None)),
    }
    for name, (product, given) in products.items():
        left, right = given[:2] if product is not added_product else given[1:3]
        copies = [(g.clone(), g.float().clone()) if isinstance(g, torch.Tensor) else (g, g) for g in given]
        mine, wide = zip(*copies, strict=True)  # a sum is made in place
        off = apart(product(*mine, look.kernel), product(*wide, "torch"))
        (n, k), item = right.shape, right.dtype.itemsize
        work = [Work(name, 2e-9 * rows * k * n, 1e-9 * item * (k * n + rows * (k + n)))]
        limit = 2e-2 if item == 2 else 2e-6
        us = look.replayed_us(lambda p=product, g=given: p(*g, look.kernel))
        yield look.finding(name, us=us, work=work, dtype=right.dtype, apart=off, limit=limit)
        turned, left = right.t(), left.to(right.dtype)
        us = look.replayed_us(lambda x=left, w=turned: x @ w)
        yield look.finding(f"{name}, library", us=us, work=work, dtype=right.dtype)


def attention(look: Look) -> Iterator[Finding]:
    """The encoder's attention with gated bias: slices of one product whose rows are as the encoder has them."""
    frames, dtype = look.size(FRAMES, 70), look.dtype(torch.float16)
    for batch in (2, 8, 64) if not look.quick else (1,):
        packed = look.normal(batch, frames, 3 * EAR_WIDTH + 2 * EARS + 8, dtype=dtype)
        q, k, v = packed[..., : 3 * EAR_WIDTH].view(batch, frames, 3, EARS, HEAD).permute(2, 0, 3, 1, 4)
        raw, gate = packed[..., 3 * EAR_WIDTH : -8], 2 * torch.rand(EARS, device=look.device)
        bias = look.normal(EARS, frames, -(-frames // KEYS) * KEYS, dtype=dtype)
        lengths = torch.randint(1, frames + 1, (batch,), device=look.device, dtype=torch.int32)
        off = None
        if batch <= 2:
            found = gated_attention(q, k, v, raw, gate, bias, lengths, look.kernel)
            exact = gated_attention(*(x.float() for x in (q, k, v, raw)), gate, bias, lengths, "torch")
            off = apart(found, exact)
        lengths.fill_(frames)
        us = look.replayed_us(lambda a=(q, k, v, raw, gate, bias, lengths): gated_attention(*a, look.kernel), 10)
        products = 4e-9 * batch * EARS * frames**2 * HEAD
        work = [Work("products", products, 4e-9 * batch * frames * EAR_WIDTH * dtype.itemsize)]
        case = f"{batch} windows, rows of {packed.shape[-1]}"
        yield look.finding(case, us=us, work=work, dtype=dtype, apart=off, limit=5e-3, tflop_per_s=1e3 * products / us)


def convolution(look: Look) -> Iterator[Finding]:
    """The encoder's first convolution, whose work is to write its output."""
    samples, channels, dtype = look.size(160_000, 2_000), look.size(512, 128), look.dtype(torch.float16)
    for batch in (2, 8, 64) if not look.quick else (1,):
        given = look.normal(batch, samples), look.normal(batch, 10, channels), look.normal(batch, channels)
        off = None
        if batch <= 2:
            found = convolution_gelu(*given, 5, dtype, look.kernel)
            off = apart(found, convolution_gelu(*given, 5, torch.float32, "torch"))
        us = look.replayed_us(lambda g=given: convolution_gelu(*g, 5, dtype, look.kernel), 5)
        outputs = (samples - 10) // 5 + 1
        work = [Work("output", gbyte=1e-9 * batch * outputs * channels * dtype.itemsize)]
        yield look.finding(f"{batch} windows", us=us, work=work, apart=off, limit=2e-3)


def moments(look: Look) -> Iterator[Finding]:
    """Of the windows that the encoder's first convolution sees, for the norm after it; the work is to read samples."""
    samples, batches = (160_000, (2, 64)) if not look.quick else (500, (1,))
    for batch in batches:
        x = look.normal(batch, samples)
        count = (samples - 10) // 5 + 1
        found, exact = (window_moments(x, 10, 5, count, kernel) for kernel in (look.kernel, "torch"))
        us = look.replayed_us(lambda x=x, n=count: window_moments(x, 10, 5, n, look.kernel), 5)
        off = max(apart(a, b) for a, b in zip(found, exact, strict=True))
        work = [Work("samples", gbyte=4e-9 * x.numel())]
        yield look.finding(f"{batch} windows", us=us, work=work, apart=off, limit=1e-10)


def log_probs(look: Look) -> Iterator[Finding]:
    """Log-probs, entropies and their gradients; a number of rows that is a multiple of 16, and one that is not."""
    for m in (8192, 8177) if not look.quick else (32, 31):
        hidden = look.normal(m, WIDTH).requires_grad_()
        weight = (look.normal(VOCABULARY, WIDTH) / WIDTH**0.5).requires_grad_()
        ids, slope = torch.randint(VOCABULARY, (m,), device=look.device), look.normal(m)
        results = []
        for kernel in (look.kernel, "torch"):
            hidden.grad = weight.grad = None
            out = logprob(hidden, weight, ids, 1.0, kernel)
            (out.logprob * slope + 0.1 * out.entropy).sum().backward()
            assert hidden.grad is not None
            assert weight.grad is not None
            results.append([*out, hidden.grad.clone(), weight.grad.clone()])
        off = max(apart(a, b) for a, b in zip(*results, strict=True))

        # leaves of their own: those above have been in a pass on another stream, which a recording may not touch
        h, w = (x.detach().requires_grad_() for x in (hidden, weight))

        def both_passes(h: torch.Tensor = h, w: torch.Tensor = w, i: torch.Tensor = ids) -> None:
            with torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
                torch.autograd.grad(logprob(h, w, i, 1.0, look.kernel).logprob.sum(), [h, w])

        work = [Work("three products", 6e-9 * m * WIDTH * VOCABULARY, 24e-9 * m * VOCABULARY)]
        yield look.finding(f"{m} tokens", us=look.replayed_us(both_passes, 5), work=work, apart=off, limit=1e-4)


def objective(look: Look) -> Iterator[Finding]:
    """The fused loss beside the readable one in float64 sums: value, gradient, statistics."""
    lengths = torch.tensor([look.size(256, 20)] * look.size(31, 3) + [1])
    m, n = int(lengths.sum()), len(lengths)
    sampled = -3 * torch.rand(m)
    now, anchor = (sampled + 0.1 * torch.randn(m) for _ in range(2))
    entropy, advantage = 3 * torch.rand(m), torch.randn(n)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    sequence = torch.arange(n).repeat_interleave(lengths)
    plain = LossSettings()
    for settings in (plain, replace(plain, loss="gspo", kl_ratio=True, mask_low=0.5, mask_high=2.0)):
        results = []
        fused = fused_policy_loss if look.kernel == "triton" else policy_loss
        for loss, where in ((policy_loss, sequence), (fused, offsets if fused is fused_policy_loss else sequence)):
            device = look.device if loss is fused_policy_loss else "cpu"
            given = [x.clone().to(device) for x in (now, sampled, anchor, advantage, where)]
            given[0].requires_grad_()
            value, stats = loss(*given, settings, loss_denominator(lengths, settings), entropy.to(device))
            value.backward()
            results.append((value, given[0].grad, stats.sums))
        off = max(apart(b, a) for a, b in zip(*results, strict=True))
        yield look.finding(settings.loss, apart=off, limit=1e-4)
