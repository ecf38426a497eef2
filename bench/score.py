"""Ten-second windows a second of our Audiobox scorer beside the `audiobox_aesthetics` package, in one interleaved run.

    python bench/score.py --out bench/results/score-cpu.json

Random weights of the published size: scores mean nothing, the work is the same. `gemm` is the rate of a square product
in float32 between the runs; a window is 148 GFLOP. Memory is what a forward pass adds to the process at its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_result

from fastsmart.audio import AudioBatch
from fastsmart.reward import Clips
from fastsmart.reward.audiobox import AudioboxReward, make_random_weights
from fastsmart.reward.settings import AUDIOBOX_AXES

RATE, WINDOW = 16_000, 160_000
GFLOP = 148.0  # of one window
GEMM = 2048
Rate = Callable[[np.ndarray], np.ndarray]  # windows [B, 160000] -> ratings [B, 4]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="windows at once")
    arguments.add_argument("--runs", type=int, nargs="+", default=[9, 5, 3], help="counted runs of each batch, in turn")
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "int8"], help="of our scorer")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", default="", help="JSON file for the result")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_random_weights(Path(folder, "checkpoint.pt"))
        names = ["upstream", *options.dtypes]
        memory = {name: peak_memory(name, checkpoint, options) for name in names} if options.device == "cpu" else {}
        scorers = {name: scorer(name, checkpoint, options) for name in names}
    results: dict[str, Any] = {"unit": "windows of 10 s per second", "gflop_per_window": GFLOP, "weights": "random"}
    for batch, runs in zip(options.batches, options.runs, strict=True):
        results[f"batch {batch}"] = compare(scorers, batch, runs, options.device)
    if memory:
        print("peak memory, MiB:", {name: f"{mib:.0f}" for name, mib in memory.items()})
        results["peak_memory_of_one_window_MiB"] = memory
    if options.out:
        write_result(options.out, results)


def compare(scorers: dict[str, Rate], batch: int, runs: int, device: str) -> dict[str, Any]:
    windows = clips(batch)
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    gemm: list[float] = []
    ratings: dict[str, np.ndarray] = {}
    for run in range(runs + 1):
        gemm.append(gemm_rate(device))
        for name, rate in scorers.items():
            start = time.perf_counter()
            ratings[name] = rate(windows)
            if run:  # the first of each is its warm-up
                seconds[name].append((time.perf_counter() - start) / batch)
    figures: dict[str, Any] = {"gemm_gflop_per_s": statistics.median(gemm), "gemm_runs": gemm}
    for name, s in seconds.items():
        ratios = [u / own for u, own in zip(seconds["upstream"], s, strict=True)]
        rate = GFLOP / statistics.median(s)
        error = np.abs(ratings[name] - ratings["upstream"])
        figures[name] = {
            "windows_per_s": 1 / statistics.median(s),
            "over_upstream": [statistics.median(ratios), min(ratios), max(ratios)],
            "share_of_gemm": rate / figures["gemm_gflop_per_s"],
            "largest_difference": dict(zip(AUDIOBOX_AXES, error.max(0).tolist(), strict=True)),
            "seconds_per_window": s,
        }
        print(
            f"batch {batch:2}  {name:9} {1 / statistics.median(s):6.2f} windows/s, {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} - {max(ratios):.2f}) of upstream, {rate:5.0f} GFLOP/s = "
            f"{rate / figures['gemm_gflop_per_s']:.2f} of gemm, largest difference {error.max():.2g}",
            flush=True,
        )
    figures["spread_of_ratings"] = dict(zip(AUDIOBOX_AXES, ratings["upstream"].std(0).tolist(), strict=True))
    return figures


def clips(count: int) -> np.ndarray:
    """Ten-second chords over noise, float32 [count, 160000], no two alike."""
    rng = np.random.default_rng(0)
    t = np.arange(WINDOW) / RATE
    windows = np.empty((count, WINDOW), np.float32)
    for i in range(count):
        tones = [np.sin(2 * np.pi * hz * t) * np.exp(-((t * 2) % 1) * 3) for hz in rng.uniform(80, 2000, 5)]
        windows[i] = 0.15 * sum(tones) + rng.uniform(0, 0.1) * rng.normal(size=WINDOW)
    return windows


def scorer(name: str, checkpoint: Path, options: argparse.Namespace) -> Rate:
    return upstream(checkpoint, options.device) if name == "upstream" else ours(name, checkpoint, options)


def ours(dtype: str, checkpoint: Path, options: argparse.Namespace) -> Rate:
    reward = AudioboxReward(checkpoint, device=options.device, dtype=dtype, batch_size=max(options.batches))

    def rate(windows: np.ndarray) -> np.ndarray:
        audio = AudioBatch(windows, np.full(len(windows), WINDOW), RATE)
        ratings = reward.rate(Clips(range(len(windows)), audio))  # type: ignore[arg-type]
        return np.stack([ratings[axis] for axis in AUDIOBOX_AXES], axis=1)

    return rate


def upstream(checkpoint: Path, device: str) -> Rate:
    """The package's model as its own predictor builds and calls it, without torchaudio, which that file imports."""
    from audiobox_aesthetics.model.aes import AesMultiOutput

    content = torch.load(checkpoint, weights_only=True)
    target = content["target_transform"]
    model = AesMultiOutput(**content["model_cfg"], target_transform=target)
    model.load_state_dict({key.removeprefix("model."): tensor for key, tensor in content["state_dict"].items()})
    model = model.to(device).eval()

    @torch.inference_mode()
    def rate(windows: np.ndarray) -> np.ndarray:
        wav = torch.from_numpy(windows)[:, None].to(device)
        predicted = model({"wav": wav, "mask": torch.ones_like(wav, dtype=torch.bool)})
        return np.stack(
            [predicted[a].float().cpu().numpy() * target[a]["std"] + target[a]["mean"] for a in AUDIOBOX_AXES], axis=1
        )

    return rate


def gemm_rate(device: str) -> float:
    a, b = torch.randn(GEMM, GEMM, device=device), torch.randn(GEMM, GEMM, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM**3 / best / 1e9


def peak_memory(name: str, checkpoint: Path, options: argparse.Namespace) -> float:
    """MiB that scoring one window adds to a fresh process at its peak."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(send, name, checkpoint, options))
    process.start()
    peak = receive.recv()
    process.join()
    return peak


def _peak_memory(send: Any, name: str, checkpoint: Path, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    rate = scorer(name, checkpoint, options)
    windows = clips(1)
    rate(windows)  # libraries make the buffers of their threads
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is handed back
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    rate(windows)
    send.send((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
