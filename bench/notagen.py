"""NotaGen: patches drawn by the sampler with caches, 32 pieces side by side, beside the public way to draw one piece.

    python bench/notagen.py --out bench/results/notagen.json

The weights are random, of the published small shape, and made so that no patch ends early: both draw sixteen
characters of each. A contender's job is one patch (of each of its pieces) after a prefix of so many; both are timed at
the same prefixes, in turn. What a whole piece takes is a projection, linear between these prefixes and on beyond the
last of them, which favours the public procedure, whose attention grows with the square. `--whole` also draws whole
pieces with ours, which the projection can be held against.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import torch
from harness import Job, Work, interleaved, measured_ceilings, parser, report
from public_notagen import PublicNotaGen, random_choice
from stages import finish, parse, run

from fastsmart.errors import UserError
from fastsmart.machine.cuda_graph import GraphCapture
from fastsmart.notagen.char_loop import DRAW, CharLoop
from fastsmart.notagen.model import BOS, EOS, PATCH_CHARS, NotaGen, NotaGenSize
from fastsmart.notagen.packed import packed, sampling_dtype
from fastsmart.notagen.patch_cache import PatchCache
from fastsmart.notagen.patches import encode_prompt
from fastsmart.notagen.sampler import AS_THE_AUTHORS, PatchSampler
from fastsmart.notagen.weights import LARGE, MEDIUM, SMALL, WORDS, random_model

SHAPES = {"small": SMALL, "medium": MEDIUM, "large": LARGE, "tiny": NotaGenSize(2, 1, 64, 64)}
OURS, PUBLIC = "fastsmart", "public procedure, one piece"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, 3)
    options.add_argument("--shape", choices=list(SHAPES), default="small", help="of the network (small)")
    options.add_argument("--rows", type=int, default=32, help="pieces that ours draws side by side (32)")
    options.add_argument("--prefixes", type=int, nargs="+", default=[1, 256, 512, 1024], help="patches before the one")
    options.add_argument("--patches", type=int, default=1024, help="of the pieces that are projected (1024)")
    options.add_argument("--whole", action="store_true", help="draw whole pieces with ours, too")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="of ours (as it samples here)")
    given = parse(options, {"prefixes": [1, 64, 128], "runs": 1}, arguments)
    prefixes = sorted(set(given.prefixes))
    if len(prefixes) < 2:
        raise UserError("--prefixes needs two numbers or more, to tell how the time grows")
    dtype = getattr(torch, given.dtype) if given.dtype else sampling_dtype(given.device)
    plain = endless_model(SHAPES[given.shape])
    public = PublicNotaGen(copy.deepcopy(plain).to(given.device))
    model = plain.to(given.device, dtype)
    ceilings = measured_ceilings(given.device, dtype)
    cases, medians = {}, []
    for prefix in prefixes:
        seconds = timed(model, public, given, prefix)
        work = drawing_work(model.size, given.rows, prefix, dtype.itemsize)
        cases[f"after {prefix}"] = report(f"notagen, a patch after {prefix}", seconds, OURS, work, ceilings)
        medians.append({name: statistics.median(seconds[name]) for name in (OURS, PUBLIC)})
    figures = projected(prefixes, medians, given.rows, given.patches)
    print(
        f"  projection, pieces of {given.patches} patches: ours {figures['ours_chars_per_s']:.0f} characters/s, public "
        f"{figures['public_chars_per_s']:.2f}, {figures['times_as_fast']:.0f} times as fast"
    )
    if given.whole:
        figures["whole_chars_per_s"] = whole(model, given.rows, given.patches)
        print(f"  ours, whole pieces: {figures['whole_chars_per_s']:.0f} characters/s")
    more = {"shape": given.shape, "rows": given.rows, "prefixes": prefixes, "dtype": str(dtype)}
    return finish("notagen", cases, given, projection=figures, **more)


def timed(model: NotaGen, public: PublicNotaGen, given: Any, prefix: int) -> dict[str, list[float]]:
    """Seconds of a patch of each contender after so many; what it takes to know the prefix is given back."""
    jobs = {OURS: next_patches(model, given.rows, prefix), PUBLIC: public_patch(public, prefix)}
    return interleaved(jobs, given.runs, given.device)


def endless_model(size: NotaGenSize) -> NotaGen:
    """Random weights that draw neither EOS nor BOS."""
    model = random_model(size)
    words = dict(model.named_parameters())[WORDS]
    with torch.no_grad():
        away = words[EOS] / words[EOS].norm() + words[BOS] / words[BOS].norm()
        model.char_level_decoder.network.ln_f.bias.sub_(40.0 * away)
    return model


def next_patches(model: NotaGen, rows: int, prefix: int) -> Job:
    """Ours: a patch of each row after `prefix` patches, whose keys and values are in the cache."""
    device = model.char_level_decoder.network.wte.weight.device
    model = packed(model, rows)
    cache = PatchCache(model, rows)
    loop = CharLoop(model, AS_THE_AUTHORS, rows, GraphCapture() if device.type == "cuda" else None)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(3, 128, (rows, PATCH_CHARS), generator=generator).to(device)
    slot = torch.full((rows,), prefix - 1, device=device)
    uniform = torch.rand(rows, PATCH_CHARS, generator=generator).to(device)
    draw = torch.full((rows, PATCH_CHARS), DRAW, device=device)

    @torch.inference_mode()
    def job() -> None:
        drawn = loop(cache.step(patches, slot), uniform, draw)
        assert bool((drawn > EOS).all())

    return job


def public_patch(public: PublicNotaGen, prefix: int) -> Job:
    patches = np.random.default_rng(0).integers(3, 128, (prefix, PATCH_CHARS))
    choose = random_choice(AS_THE_AUTHORS, np.random.default_rng(1))
    return lambda: public.patch(patches, choose)


def drawing_work(size: NotaGenSize, rows: int, prefix: int, itemsize: int) -> list[Work]:
    """The least that one patch of each row takes, `itemsize` bytes a number."""
    patch, char = (12 * layers * size.hidden**2 for layers in (size.patch_layers, size.char_layers))
    head = 128 * size.hidden
    seen = size.patch_layers * rows * prefix * size.hidden
    return [
        Work("patch level: weights times patches", 2e-9 * patch * rows, 1e-9 * itemsize * patch),
        Work("patch level: keys and values looked at", 4e-9 * seen, 2e-9 * itemsize * seen),
        Work(
            "char level: weights times characters, sixteen times",
            2e-9 * (char + head) * rows * PATCH_CHARS,
            1e-9 * itemsize * (char + head) * PATCH_CHARS,
        ),
    ]


def projected(prefixes: Sequence[int], medians: Sequence[dict[str, float]], rows: int, patches: int) -> dict[str, Any]:
    """What whole pieces of so many patches take, from the time of a patch at each of the prefixes."""
    at = np.arange(1, patches + 1)
    seconds = {}
    for name in (OURS, PUBLIC):
        each = [median[name] for median in medians]
        slope = (each[-1] - each[-2]) / (prefixes[-1] - prefixes[-2])
        beyond = np.maximum(at - prefixes[-1], 0) * slope
        seconds[name] = float((np.interp(at, prefixes, each) + beyond).sum())
    ours = rows * patches * PATCH_CHARS / seconds[OURS]
    public = patches * PATCH_CHARS / seconds[PUBLIC]
    return {
        "patches": patches,
        "seconds": seconds,
        "ours_chars_per_s": ours,
        "public_chars_per_s": public,
        "times_as_fast": ours / public,
    }


def whole(model: NotaGen, rows: int, patches: int) -> float:
    """Characters a second of pieces of so many patches, by the sampler itself."""
    prompt = encode_prompt(["%"])
    settings = replace(AS_THE_AUTHORS, max_rows=rows, max_tokens=(patches - len(prompt)) * PATCH_CHARS)
    start = time.perf_counter()
    written = sum(len(piece.text) for piece in PatchSampler(model, settings)([prompt] * rows, (0,)))
    return written / (time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
