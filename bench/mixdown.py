"""64 clips of 10 s from a note bank, mixed on a GPU and on one CPU core; how far they are apart.

    python bench/mixdown.py --soundfont FluidR3_GM.sf2 --out bench/results/mixdown.json

The work at least: each sample of each note read once, 2 bytes, and each sample of a clip written and brought to its
level. Without a GPU the kernel's twin in torch takes its place, and says nothing about speed.
"""

from __future__ import annotations

from dataclasses import replace

import as_commands  # noqa: F401  # isort: skip  # before torch

import numpy as np
import torch
from harness import Work, interleaved, measured_ceilings, parser, report
from results import write_result
from stages import parse

from fastsmart.audio import RenderSettings
from fastsmart.audio.bank_renderer import BankRenderer
from fastsmart.audio.events import piece_arrays
from fastsmart.audio.gpu_mixdown import DeviceMixer
from fastsmart.audio.mixdown import pair, slice_notes
from fastsmart.notes import NoteBatch

SECONDS, NOTES = 10.0, 50
GOAL_S, GOAL_DIFFERENCE = 2e-3, 1e-5


def main() -> None:
    options = parser(__doc__, runs=20)
    options.add_argument("--clips", type=int, default=64)
    options.add_argument("--soundfont", default="", help="default: the first one installed")
    given = parse(options, {"clips": 2, "runs": 1})
    clips = random_clips(given.clips)
    settings = RenderSettings(given.soundfont, max_seconds=SECONDS)
    with DeviceMixer(settings, given.device) as gpu, BankRenderer(settings) as cpu:
        one = np.empty((len(clips), settings.max_samples), np.float32)
        pieces = [piece_arrays(clips, i) for i in range(len(clips))]
        name = f"mixdown on {torch.device(given.device).type}"
        jobs = {
            name: lambda: gpu.render(clips),
            "one CPU core": lambda: [cpu.render_into(out, piece) for out, piece in zip(one, pieces, strict=True)],
        }
        seconds = interleaved(jobs, given.runs, given.device)
        difference = float(np.abs(gpu.render(clips)[0].cpu().numpy() - one).max() / np.abs(one).max())
        read = sum(sounding(cpu, clips, i) for i in range(len(clips)))
    work = [Work("notes", 2e-9 * read, 2e-9 * read), Work("clips", gbyte=3 * 4e-9 * one.size)]
    figures = report("mixdown", seconds, name, work, measured_ceilings(given.device))
    median = figures["contenders"][name]["median_s"]
    print(f"largest difference from the CPU's, of the loudest sample: {difference:.2g}")
    figures |= {
        "figure": f"{given.clips} clips in {1e3 * median:.2f} ms, apart by {difference:.1g}",
        "largest_difference": difference,
        "passed": difference <= GOAL_DIFFERENCE and (median < GOAL_S or given.device == "cpu"),
    }
    if given.out:
        write_result(given.out, figures)


def random_clips(count: int) -> NoteBatch:
    """Pieces of `NOTES` notes that end at `SECONDS`."""
    rng = np.random.default_rng(0)
    m = count * NOTES
    return replace(
        NoteBatch.empty(count),
        onset_s=np.sort(rng.uniform(0.0, SECONDS - 0.1, (count, NOTES)), axis=1).ravel(),
        duration_s=rng.uniform(0.1, 1.0, m),
        pitch=rng.integers(36, 96, m).astype(np.uint8),
        velocity=rng.integers(40, 110, m).astype(np.uint8),
        offsets=np.arange(count + 1) * NOTES,
        end_s=np.full(count, SECONDS),
    )


def sounding(renderer: BankRenderer, clips: NoteBatch, i: int) -> int:
    """Samples of stored notes that a clip is made of."""
    rate, rows = renderer.settings.synth_rate, clips.rows(i)
    start, end = clips.onset_s[rows], clips.onset_s[rows] + clips.duration_s[rows]
    times = (np.rint(t * rate).astype(np.int64) for t in (start, end))
    on, off = pair(*times, clips.pitch[rows], np.zeros(0, np.int64), np.zeros(0, bool))
    slices = slice_notes(on, off, clips.pitch[rows], clips.velocity[rows], renderer.bank.tables)
    return int(np.minimum(slices.length, renderer.settings.max_samples - slices.start).sum())


if __name__ == "__main__":
    main()
