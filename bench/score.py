"""Scoring: our Audiobox beside the `audiobox_aesthetics` package, in one interleaved run.

    python bench/score.py --peer all --out bench/results/score.json

Random weights of the published size: scores mean nothing, the work is the same; a window of ten seconds is 148 GFLOP.
The ceilings are those of the first of --dtypes, so int8 may pass the floor; "int8_floor" is its own, in which what is
multiplied in 8 bit has the rate of a large 8-bit product, and the rest that of a large product in float32. Memory is
what a forward pass adds at its peak to a process of its own. Windows are where the scorer reads them in training: on a
GPU, in its memory.

What a GPU runs, its twin in 16 bit, and 8 bit are held against the float32 encoder of a CPU: "encoder_error" is how far
the mean over time of every layer is from that, relative to its length, and decides whether the result has passed. The
engines among the peers (`peers/engines.py`) are held against it too before they have a turn, "peer_error", and one that
errs by more than ours may is left out.

    python bench/score.py --dtypes float32 bfloat16 int8 --real FOLDER --out bench/results/score.json

also says how each of them, and each peer, ranks real pieces; OpenVINO's 8-bit ranges are then taken from such pieces,
otherwise from made sounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import torch
from harness import REFERENCE, Job, Work, interleaved, measured_ceilings, parser, report, timed
from memory import added_mib, peak_in_own_process
from peers.engines import ENGINES, Engines
from stages import finish, made, parse, run, tried
from torch import Tensor

from fastsmart.audio import AudioBatch, render
from fastsmart.audio.batch import DeviceAudio
from fastsmart.errors import UserError
from fastsmart.notes import MIDI_SUFFIXES, NoteBatch, read_midi
from fastsmart.reward import Clips
from fastsmart.reward.audiobox import AudioboxReward, make_random_weights, read_weights
from fastsmart.reward.audiobox.encoder import encoder_weights
from fastsmart.reward.settings import AUDIOBOX_AXES

RATE_HZ, WINDOW = 16_000, 160_000
GFLOP = 148.0  # of one window
EIGHT_BIT_GFLOP = 129.0  # of that: the second to the fourth convolution and the linear layers
WEIGHTS = 95e6  # numbers that a pass reads
PEERS = ("upstream", *ENGINES)
CALIBRATION = 16  # windows that ranges of 8 bit are taken from
TRUTH = 3  # windows that the float32 encoder of a CPU hears too, the first cut to HEARD samples
HEARD = 37_001
# Four times what the twins (4.5e-4 and 3.6e-3) and 8 bit (2.2e-2) err on a CPU with random weights; convolutions of a
# GPU are TF32
ENCODER_LIMITS = {"float16": 2e-3, "bfloat16": 1.5e-2, "int8": 0.1, "float32": 2e-3}
Rate = Callable[[np.ndarray | Tensor], np.ndarray]  # windows [B, 160000] -> ratings [B, 4]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    options = parser(__doc__, 5, PEERS)
    options.add_argument("--batches", type=int, nargs="+", help="windows at once (1 4 16; on a GPU 1 8 16 32 64)")
    options.add_argument("--dtypes", nargs="+", help="of our scorer (float32 int8; on a GPU float16)")
    options.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the peak")
    options.add_argument("--real", default="", help="folder of MIDI files whose first ten seconds all dtypes rate")
    options.add_argument("--clips", type=int, default=200, help="of --real; default 200")
    options.add_argument("--peak", help=argparse.SUPPRESS)
    given = parse(options, {"batches": [1], "runs": 3, "memory": False}, arguments)
    on_gpu = given.device.startswith("cuda")
    given.dtypes = given.dtypes or (["float16"] if on_gpu else ["float32", "int8"])
    given.batches = given.batches or ([1, 8, 16, 32, 64] if on_gpu else [1, 4, 16])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_random_weights(Path(folder, "checkpoint.pt"))
        if given.peak:
            rate, one = scorer(given.peak, checkpoint, given), clips(1)
            print(added_mib(lambda: rate(one), given.device))
            return None
        refused: dict[str, str] = {}
        found = {name: tried(name, partial(scorer, name, checkpoint, given), refused) for name in given.dtypes}
        scorers = {name: rate for name, rate in found.items() if rate}
        if not scorers:
            raise UserError("; ".join(refused.values()))
        given.dtypes = list(scorers)
        more: dict[str, Any] = {"weights": "random"} | agreement(given.dtypes, checkpoint, given.device)
        real = real_clips(given.real, given.clips) if given.real else None
        more["peer_error"] = {}
        makers = {"upstream": lambda: {"upstream": upstream(checkpoint, given.device)}}
        makers |= engine_makers(checkpoint, given, real, more["peer_error"])
        peers, left_out = made(makers, given)  # type: ignore[arg-type]
        del makers  # and with them a copy of the weights
        if real:
            more["real_clips"] = on_real_clips(real, given.dtypes, peers, checkpoint, given.device)  # type: ignore[arg-type]
    ceilings = measured_ceilings(given.device, getattr(torch, given.dtypes[0]))
    cases: dict[str, Any] = {}
    more["left_out"] = refused | left_out
    for batch in given.batches:
        cases[f"batch {batch}"] = compare(scorers | peers, batch, given, ceilings)  # type: ignore[operator]
        figures = finish("score", cases, given, **more)
    if given.memory:
        own = ["--device", given.device, "--threads", str(given.threads)]
        names = [*given.dtypes, *(name for name in peers if name == "upstream")]
        more["peak_mib_of_one_window"] = {name: peak_in_own_process(__file__, [*own, "--peak", name]) for name in names}
        print("peak memory, MiB:", {name: f"{mib:.0f}" for name, mib in more["peak_mib_of_one_window"].items()})
        figures = finish("score", cases, given, **more)
    return figures


def agreement(dtypes: Sequence[str], checkpoint: Path, device: str) -> dict[str, Any]:
    """`encoder_error` of each of our dtypes that a GPU runs or its twin does, and whether all are within their limits
    (`passed`); empty where there is none."""
    chosen = [name for name in dtypes if name in ENCODER_LIMITS and (device != "cpu" or name != "float32")]
    if not chosen:
        return {}
    windows = [window[: HEARD if i == 0 else None] for i, window in enumerate(clips(TRUTH))]
    errors: dict[str, float] = {}
    with torch.inference_mode():
        exact = AudioboxReward(checkpoint).encoder(windows)  # float32 on a CPU
        for name in chosen:
            encoder = AudioboxReward(checkpoint, device=device, dtype=name).encoder
            error = 0.0
            for _ in range(2):  # on a GPU recorded, then replayed
                there = [torch.from_numpy(window).to(device) for window in windows] if device != "cpu" else windows
                error = max(error, relative_error(encoder(there).cpu(), exact))
            errors[name] = error
            print(f"  {name}: error of the encoder {error:.2g}, limit {ENCODER_LIMITS[name]:.2g}")
    passed = all(error <= ENCODER_LIMITS[name] for name, error in errors.items())
    return {"encoder_error": errors, "passed": passed}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest distance of the mean of a layer [B, L + 1, D] from the exact one, relative to its length."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def real_clips(folder: str, count: int) -> AudioBatch:
    """The first ten seconds of pieces spread over a folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in MIDI_SUFFIXES)
    if len(paths) < 2:
        raise UserError(f"--real {folder} has {len(paths)} MIDI files; at least 2 are compared")
    chosen = paths[:: max(1, len(paths) // count)][:count]
    pieces: dict[int, list[NoteBatch]] = {}
    for piece in (read_midi(path, WINDOW / RATE_HZ) for path in chosen):
        pieces.setdefault(piece.ticks_per_beat, []).append(piece)
    rendered = [render(NoteBatch.concat(batch), workers=0) for batch in pieces.values()]
    samples, lengths = (np.concatenate([getattr(a, name) for a in rendered]) for name in ("samples", "lengths"))
    return AudioBatch(samples, lengths, RATE_HZ)


def on_real_clips(
    audio: AudioBatch, dtypes: Sequence[str], peers: dict[str, Rate], checkpoint: Path, device: str
) -> dict[str, Any]:
    """How every dtype, and every peer, rates real clips beside the first dtype: by axis the spread of ratings, the
    largest difference and Spearman's rank correlation; and the processor seconds of a clip. Peers rate those that are
    whole windows."""
    from scipy.stats import spearmanr  # GPU machines may be without it

    heard = Clips(range(len(audio)), audio)  # type: ignore[arg-type]
    whole = np.flatnonzero(audio.lengths == WINDOW)
    ratings: dict[str, np.ndarray] = {}
    found: dict[str, Any] = {"clips": len(audio), "whole": len(whole), "processor_s": {}, "of": {}}

    def timed(name: str, rate: Callable[[], np.ndarray]) -> None:
        start = time.process_time()
        ratings[name] = rate()
        found["processor_s"][name] = (time.process_time() - start) / len(ratings[name])

    for name in dtypes:
        timed(name, partial(rated, AudioboxReward(checkpoint, device=device, dtype=name), heard))
    for name, peer in peers.items() if len(whole) > 1 else ():
        timed(name, partial(one_by_one, peer, audio.samples[whole]))
    for name, other in list(ratings.items())[1:]:
        exact = ratings[dtypes[0]] if len(other) == len(audio) else ratings[dtypes[0]][whole]
        found["of"][name] = {
            axis: {
                "spread": float(exact[:, i].std()),
                "largest_difference": float(np.abs(other[:, i] - exact[:, i]).max()),
                "rank_correlation": float(spearmanr(exact[:, i], other[:, i]).statistic),
            }
            for i, axis in enumerate(AUDIOBOX_AXES)
        }
        worst = min(axis["rank_correlation"] for axis in found["of"][name].values())
        print(f"  {name}: least rank correlation with {dtypes[0]} {worst:.5f} on {len(other)} real clips")
    return found


def one_by_one(rate: Rate, windows: np.ndarray) -> np.ndarray:
    return np.concatenate([rate(windows[i : i + 1]) for i in range(len(windows))])


def rated(reward: AudioboxReward, clips: Clips) -> np.ndarray:
    """All four axes, [N, 4]."""
    ratings = reward.rate(clips)
    return np.stack([ratings[axis] for axis in AUDIOBOX_AXES], axis=1)


def engine_makers(
    checkpoint: Path, options: argparse.Namespace, real: AudioBatch | None, errors: dict[str, float]
) -> dict[str, Callable[[], dict[str, Rate]]]:
    """Makers of the contenders that are engines. Each is held against our float32 encoder first; `errors` is told."""

    @cache
    def shared() -> tuple[Engines, AudioboxReward, np.ndarray, Tensor]:
        ours, windows = AudioboxReward(checkpoint), clips(TRUTH)
        heard = [] if real is None else [real.samples[i, :WINDOW] for i in np.flatnonzero(real.lengths == WINDOW)]
        heard = heard[:: max(1, len(heard) // CALIBRATION)][:CALIBRATION] or list(clips(CALIBRATION, seed=1))
        weights = encoder_weights(read_weights(checkpoint).state)
        return Engines(weights, checkpoint.parent, options.threads, heard), ours, windows, ours.encoder(list(windows))

    def make(name: str) -> dict[str, Rate]:
        if options.device != "cpu":
            raise UserError(f"{name} is measured on a CPU, not on {options.device}")
        with torch.no_grad():  # and no inference mode, whose tensors cannot be exported
            engines, ours, windows, exact = shared()
        encode, heads = engines.encoder(name), ours.heads

        def encoded(windows: Any) -> Tensor:
            return torch.from_numpy(np.concatenate([encode(windows[i : i + 1]) for i in range(len(windows))]))

        errors[name] = error = relative_error(encoded(windows), exact)
        limit = ENCODER_LIMITS.get(name.rpartition("-")[2], ENCODER_LIMITS["float32"])
        print(f"  {name}: error of the encoder {error:.2g}, limit {limit:.2g}")
        if not error <= limit:
            raise UserError(f"its encoder errs by {error:.2g}, more than {limit:.2g}, so that its speed says nothing")
        return {name: torch.inference_mode()(lambda windows: heads(encoded(windows)).numpy())}

    return {name: partial(make, name) for name in ENGINES}


def compare(scorers: dict[str, Rate], batch: int, options: argparse.Namespace, ceilings: Any) -> dict[str, Any]:
    windows = torch.from_numpy(clips(batch)).to(options.device) if options.device != "cpu" else clips(batch)
    ratings: dict[str, np.ndarray] = {}

    def job(name: str) -> Job:
        return lambda: ratings.update({name: scorers[name](windows)})

    seconds = interleaved({name: job(name) for name in scorers}, options.runs, options.device)
    itemsize = getattr(torch, options.dtypes[0]).itemsize
    work = [Work("matrix products and convolutions", batch * GFLOP, 1e-9 * itemsize * WEIGHTS)]
    case = report(f"score, batch {batch}", seconds, options.dtypes[0], work, ceilings)
    case["windows_per_s"] = {n: batch / statistics.median(s) for n, s in seconds.items() if n != REFERENCE}
    if "int8" in seconds and options.device == "cpu":
        case["int8_floor"] = int8_floor(batch, statistics.median(seconds["int8"]))
    truth = ratings.get("upstream", ratings[options.dtypes[0]])
    case["spread_of_ratings"] = dict(zip(AUDIOBOX_AXES, truth.std(0).tolist(), strict=True))
    case["largest_difference"] = {
        name: dict(zip(AUDIOBOX_AXES, np.abs(r - truth).max(0).tolist(), strict=True)) for name, r in ratings.items()
    }
    for name, rate in case["windows_per_s"].items():
        worst = max(case["largest_difference"][name].values())
        print(f"  {name}: {rate:.2f} windows/s, {rate * GFLOP:.0f} GFLOP/s, largest difference of a rating {worst:.2g}")
    return case


def int8_floor(batch: int, seconds: float) -> dict[str, float]:
    """The floor of so many windows in 8 bit, and the share of it that was reached in `seconds`."""
    whole, eight = measured_ceilings().gemm_gflop_per_s, eight_bit_rate()
    floor = batch * (EIGHT_BIT_GFLOP / eight + (GFLOP - EIGHT_BIT_GFLOP) / whole)
    print(f"  int8: products at {eight:.0f} GFLOP/s, floor {floor:.3g} s, {floor / seconds:.0%} of it reached")
    return {"gflop_per_s": eight, "floor_s": floor, "share_of_floor": floor / seconds}


def eight_bit_rate(side: int = 2048, runs: int = 7) -> float:
    """GFLOP/s of the best of some runs of a large square product of bytes, by the call that the scorer makes."""
    x = torch.randint(0, 255, (side, side), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.randint(-64, 64, (side, side), dtype=torch.int8), None)
    scales, zeros = torch.full((side,), 0.01), torch.zeros(side, dtype=torch.int32)

    def product() -> Tensor:
        after = (1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(x, 0.01, 127, weight, scales, zeros, None, *after)

    return 2e-9 * side**3 / min(timed(product) for _ in range(runs))


def clips(count: int, seed: int = 0) -> np.ndarray:
    """Ten-second chords over noise, float32 [count, 160000], no two alike."""
    rng = np.random.default_rng(seed)
    t = np.arange(WINDOW) / RATE_HZ
    windows = np.empty((count, WINDOW), np.float32)
    for i in range(count):
        tones = [np.sin(2 * np.pi * hz * t) * np.exp(-((t * 2) % 1) * 3) for hz in rng.uniform(80, 2000, 5)]
        windows[i] = 0.15 * sum(tones) + rng.uniform(0, 0.1) * rng.normal(size=WINDOW)
    return windows


def scorer(name: str, checkpoint: Path, options: argparse.Namespace) -> Rate:
    if name == "upstream":
        return upstream(checkpoint, options.device)
    reward = AudioboxReward(checkpoint, device=options.device, dtype=name, batch_size=max(options.batches))

    def rate(windows: np.ndarray | Tensor) -> np.ndarray:
        on_device = isinstance(windows, Tensor)
        audio = (DeviceAudio if on_device else AudioBatch)(windows, np.full(len(windows), WINDOW), RATE_HZ)  # type: ignore[arg-type]
        return rated(reward, Clips(range(len(windows)), audio))  # type: ignore[arg-type]

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
    def rate(windows: np.ndarray | Tensor) -> np.ndarray:
        wav = torch.as_tensor(windows)[:, None].to(device)
        predicted = model({"wav": wav, "mask": torch.ones_like(wav, dtype=torch.bool)})
        return np.stack(
            [predicted[a].float().cpu().numpy() * target[a]["std"] + target[a]["mean"] for a in AUDIOBOX_AXES], axis=1
        )

    return rate


if __name__ == "__main__":
    run(main)
