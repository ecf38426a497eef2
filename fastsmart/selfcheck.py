"""Whether fastsmart computes here what it should: each stage on small inputs, held to figures known beforehand.

Expected figures are of the shipped policy and of sounds made by formula, so they hold on every machine, within
tolerances that cover other processors' rounding. What depends on the soundfont is held to what is true of any piano.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastsmart.audio import AudioBatch, find_soundfont, render
from fastsmart.audio.bank_tools import snr_db
from fastsmart.config import Config, merged
from fastsmart.machine.files import JsonLines
from fastsmart.notes import MIDI_TICKS_PER_BEAT, NoteBatch
from fastsmart.policy.hf_format import load_policy
from fastsmart.presets import demo
from fastsmart.reward import Clips, load_reward
from fastsmart.run.folder import METRICS_FILE
from fastsmart.sampling import sample
from fastsmart.tokens.decode import decode
from fastsmart.tokens.prompts import procedural
from fastsmart.trainer.loop import train

RATE_HZ = 16_000
MIDDLE_A, MIDDLE_A_HZ = 69, 440.0
CHORD = (60, 64, 67, 72)
LEAD_S = 1.0  # of rest before the rendered notes
SMALL_RUN = {
    "sampling": {"group": 4, "max_tokens": 60},
    "reward": {"terms": {"variety": 1.0, "polyphony_rate": 1.0}},
    "train": {"steps": 2, "prompts": 2, "eval_every": 0, "eval_prompts": 4, "save_every": 1, "listen": 0},
}
UNTIMED = ("time", "health")


@dataclass(frozen=True)
class Finding:
    """A figure measured here beside the one expected: right where they differ by at most `tolerance`."""

    what: str
    here: float
    expected: float
    tolerance: float
    unit: str = ""

    @property
    def right(self) -> bool:
        """Whether it is as expected; NaN is not."""
        return abs(self.here - self.expected) <= self.tolerance


def check() -> int:
    """Print a table of figures; 0 when all are as expected, else 1.

    Raises UserError when FluidSynth, a soundfont or the shipped policy is missing (see `fastsmart doctor`).
    """
    began = time.perf_counter()
    findings = [finding for part in PARTS for finding in part()]
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "here", "expected", "within"):
        table.add_column(heading, overflow="fold")
    for f in findings:
        mark = Text("ok", "green") if f.right else Text("differs", "red")
        table.add_row(mark, Text(f.what), _shown(f.here, f.unit), _shown(f.expected, f.unit), f"{f.tolerance:g}")
    Console().print(table)
    wrong = [f.what for f in findings if not f.right]
    verdict = (
        f"{len(wrong)} of {len(findings)} differ: {', '.join(wrong)}" if wrong else f"all {len(findings)} as expected"
    )
    print(f"{verdict}; {time.perf_counter() - began:.0f} s with {find_soundfont()}")
    return 1 if wrong else 0


def rendering() -> Iterator[Finding]:
    """A note sounds when it is written, at its pitch, and the same from the bank as from FluidSynth."""
    notes = _piece([(LEAD_S, 2.0, MIDDLE_A)])
    from_bank, reference = (render(notes, backend=name, max_seconds=4.0) for name in ("bank", "fluidsynth"))
    clip = reference.clip(0)
    start = round(LEAD_S * RATE_HZ)
    yield Finding("loudest sample before the first note", float(np.abs(clip[: start - 1]).max()), 0.0, 1e-4)
    heard = clip[start + RATE_HZ // 10 : start + RATE_HZ]
    yield Finding("pitch of the A above middle C", 1200 * math.log2(_peak_hz(heard) / MIDDLE_A_HZ), 0.0, 12.0, "cents")
    again = render(notes, backend="bank", max_seconds=4.0).clip(0)
    yield Finding(
        "the same notes once more, largest difference", float(np.abs(again - from_bank.clip(0)).max()), 0.0, 0.0
    )
    chord = _piece([(LEAD_S, 1.5, pitch) for pitch in CHORD])
    raw = {"max_seconds": 3.0, "normalize": "none"}
    bank, fluid = (render(chord, backend=name, **raw) for name in ("bank", "fluidsynth"))  # type: ignore[arg-type]
    noise_db = snr_db(fluid.clip(0), bank.clip(0))
    yield Finding("noise of a chord from the bank beside FluidSynth", max(-noise_db, -200.0), -120.0, 80.0, "dB")


def scoring() -> Iterator[Finding]:
    """Rewards of sounds and notes that a formula makes."""
    seconds = np.arange(2 * RATE_HZ) / RATE_HZ
    tones = [440.0, 440.0 * 2 ** (1 / 12)]
    both = sum(0.2 * np.sin(2 * np.pi * hz * seconds) for hz in tones)
    samples = np.stack([0.4 * np.sin(2 * np.pi * 440.0 * seconds), both]).astype(np.float32)
    clips = Clips(NoteBatch.empty(2), AudioBatch(samples, np.array([len(seconds)] * 2), RATE_HZ))
    for name, expected in EXPECTED_OF_TONES.items():
        for label, here, value in zip(("a tone", "a semitone"), load_reward(name)(clips), expected, strict=True):
            yield Finding(f"{name} of {label}", float(here), value, 2e-3)
    scale = Clips(_piece([(0.25 * i, 0.25, 60 + step) for i, step in enumerate((0, 2, 4, 5, 7, 9, 11, 12) * 4)]))
    for name, value in EXPECTED_OF_SCALE.items():
        yield Finding(f"{name} of a scale", float(load_reward(name)(scale)[0]), value, 1e-3)


def sampling() -> Iterator[Finding]:
    """Tokens that the shipped policy plays with a fixed seed."""
    policy = load_policy("pop909-tiny")
    rollout = sample(policy, procedural(policy.vocab, 4, 0, ["4/4"]), 2, 64, seed=0)
    logprobs = [rollout.logprobs[i, : rollout.lengths[i]].mean() for i in range(len(rollout))]
    # of first tokens: a rounding that once decides a draw changes all that follow
    yield Finding(
        "first log-probs of 8 samples, mean", float(rollout.logprobs[:, 0].mean()), EXPECTED_FIRST, 1e-3, "nats"
    )
    yield Finding("log-probs of 8 samples, mean", float(np.mean(logprobs)), EXPECTED_LOGPROB, 0.15, "nats")
    again = sample(policy, procedural(policy.vocab, 4, 0, ["4/4"]), 2, 64, seed=0)
    yield Finding("tokens that differ in a second draw", float((again.ids != rollout.ids).sum()), 0.0, 0.0)
    notes = decode(rollout.sequences(), policy.vocab)
    yield Finding("notes of 8 samples of 64 tokens", float(notes.counts.sum()), EXPECTED_NOTES, 12.0)


def training() -> Iterator[Finding]:
    """One step of the demo's policy, and that a run which goes on after it ends as one that never stopped."""
    config = merged(replace(Config(), policy=demo().policy, prompts=demo().prompts), SMALL_RUN)
    with tempfile.TemporaryDirectory() as folder:
        whole, halved = Path(folder) / "whole", Path(folder) / "halved"
        train(config, whole)
        train(replace(config, train=replace(config.train, steps=1)), halved)
        train(config, halved, resume=True, changes={"train.steps": 2})
        lines, resumed = (JsonLines(run / METRICS_FILE).lines() for run in (whole, halved))
    first = next(line for line in lines if "reward" in line)
    yield Finding("KL to the base policy before the first step", float(first["kl"]), 0.0, 1e-4, "nats")
    yield Finding("norm of the first gradient", float(first["grad_norm"]), EXPECTED_GRADIENT, 0.2 * EXPECTED_GRADIENT)
    last, last_resumed = (_numbers(found[-1]) for found in (lines, resumed))
    differing = [key for key in last if last[key] != last_resumed.get(key)]
    yield Finding("figures of step 2 that resuming changed", float(len(differing)), 0.0, 0.0)


PARTS: tuple[Callable[[], Iterator[Finding]], ...] = (rendering, scoring, sampling, training)
# Brightness and range follow from their definitions; the others are fastsmart's own, Intel Xeon, torch 2.13
EXPECTED_OF_TONES = {
    "consonance": (1.0, 0.6056),
    "brightness": (math.log2(440 / 125) / 6, math.log2(440 * (1 + 2 ** (1 / 12)) / 2 / 125) / 6),
}
EXPECTED_OF_SCALE = {"scale_consistency": 1.0, "polyphony_rate": 0.0, "pitch_range": 12 / 87}
EXPECTED_FIRST, EXPECTED_LOGPROB, EXPECTED_NOTES, EXPECTED_GRADIENT = -3.84599, -2.29756, 140.0, 0.991


def _piece(notes: list[tuple[float, float, int]]) -> NoteBatch:
    """One piece of (onset s, duration s, pitch), at 120 beats a minute."""
    onset, duration, pitch = (np.array(column, np.float64) for column in zip(*notes, strict=True))
    ticks = MIDI_TICKS_PER_BEAT * 2  # a second
    none = np.zeros(0), np.zeros(0)
    in_ticks = np.rint(onset * ticks), np.rint(duration * ticks)
    return NoteBatch.single(
        *(onset, duration, pitch, np.full(len(notes), 80), in_ticks, MIDI_TICKS_PER_BEAT),
        tempi=none,
        meters=(none[0], np.zeros((0, 2))),
    )


def _peak_hz(samples: np.ndarray) -> float:
    """Frequency of the strongest partial near the A, between bins by a parabola through the logarithms of three."""
    size = 2**17
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), size))
    bins = np.arange(len(spectrum)) * RATE_HZ / size
    near = (bins > 0.9 * MIDDLE_A_HZ) & (bins < 1.1 * MIDDLE_A_HZ)
    return float(bins[np.argmax(np.where(near, spectrum, 0.0))])


def _numbers(line: dict) -> dict:
    return {key: value for key, value in line.items() if key not in UNTIMED}


def _shown(value: float, unit: str) -> str:
    return f"{value:.6g}{' ' * bool(unit)}{unit}"
