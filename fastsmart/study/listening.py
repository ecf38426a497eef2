"""A blind listening test as one page, and its key, which stays with whoever runs it.

The page holds clips under random names, of one length, one loudness and one file size, in random order. Which policy
and prompt a clip comes from is in the key alone. Trials come in blocks, each of a few prompts with the clips of every
policy: whoever stops early has compared the policies on most of what was heard.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastsmart.audio.loudness import loudness_lufs
from fastsmart.audio.rendering import LISTENING_RATE_HZ
from fastsmart.errors import UserError
from fastsmart.machine.files import make_folder, write_atomic
from fastsmart.machine.folder_lock import FolderLock
from fastsmart.music.diversity import prompt_numbers
from fastsmart.study.evaluation import Evaluation
from fastsmart.study.outputs import Progress
from fastsmart.study.report import render_page
from fastsmart.study.sound import data_url, listen_to, mp3
from fastsmart.tokens.prompts import asked_styles
from fastsmart.tokens.token_batch import TokenBatch

PAGE_FILE, KEY_FILE = "listen.html", "key.json"
FADE_S = 0.5
LOUDEST_LUFS = -20.0  # of the clips, unless a peak forbids it
PEAK_DB = -1.5  # highest sample, with room for what MP3 adds
TONE_HZ, TONE_S, TONE_EVERY_S = 880.0, 0.25, 0.8
PAUSE_S = 1.0  # between the clips of a set
BLOCK_PROMPTS = 5
RATINGS = ("1 bad", "2 poor", "3 fair", "4 good", "5 excellent")  # ITU-T P.800, annex B: a scale of quality
QUESTIONS = {
    "rating": "How good is this music? Judge the music itself, not the sound of the recording.",
    "ab": "Which of the two do you enjoy more?",
    "sets": "Which SET of six is more varied?",
    "styles": "Which style is this?",
}
KEEP_QUESTION = "Would you keep one of the six of set"
DESIGNS = tuple(QUESTIONS)
OF_ONE_CLIP = ("rating", "styles")  # designs in which a trial has one clip
PROMPTS = {"rating": 15, "ab": 15, "sets": 36, "styles": 28}  # asked for where nobody says how many
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class ListeningSettings:
    """A blind test.

    design   : "rating", one clip at a time on a scale of five, as in the paper; "ab", two clips of one prompt; "sets",
               two sets of clips of the same prompts: which is more varied, and is one worth keeping; "styles", one
               clip at a time, whose style is to be told
    prompts  : numbers of held-out prompts, which go through the openings in turn; each policy's clip of each is heard;
               of "sets", as many as fill the sets
    seconds  : length of every clip; outputs shorter than that are passed over, for all policies alike
    checks   : attention checks, in which tones are counted
    repeats  : clips (or pairs) that come twice, to see how steady a listener is
    question : put above every trial; "" = the usual one of the design
    set_size : clips of a set

    Raises UserError for a number out of range.
    """

    design: Literal["rating", "ab", "sets", "styles"] = "rating"
    prompts: int = 15
    seconds: float = 10.0
    checks: int = 2
    repeats: int = 2
    question: str = ""
    set_size: int = 6

    def __post_init__(self) -> None:
        if self.design not in QUESTIONS:
            raise UserError(f"a listening test is one of {', '.join(QUESTIONS)}, not {self.design!r}")
        for key, low in {"prompts": 1, "checks": 0, "repeats": 0}.items():
            if getattr(self, key) < low:
                raise UserError(f"--{key} is {getattr(self, key)}; it must be at least {low}")
        if not 5.0 <= self.seconds <= 60.0:
            raise UserError(f"--seconds is {self.seconds:g}; clips last from 5 to 60 seconds")
        if not 2 <= self.set_size <= len(NUMBERS) + 1:
            raise UserError(f"--set-size is {self.set_size}; sets have from 2 to {len(NUMBERS) + 1} clips")
        if self.design == "sets" and self.prompts % self.set_size:
            raise UserError(
                f"--prompts is {self.prompts}, which does not fill sets of {self.set_size}; ask for a multiple of it"
            )

    @property
    def units(self) -> int:
        """Items on which the policies are compared: prompts, or sets of them."""
        return self.prompts // self.set_size if self.design == "sets" else self.prompts

    @property
    def trial_seconds(self) -> float:
        """Length of what is played as one: a clip, or a set with its pauses."""
        return self.set_size * (self.seconds + PAUSE_S) - PAUSE_S if self.design == "sets" else self.seconds

    def asked(self) -> str:
        """The question above every trial."""
        size = NUMBERS[self.set_size - 2]
        return self.question or QUESTIONS[self.design].replace("six", size)


def make_test(
    evaluation: Evaluation,
    out: str | Path,
    settings: ListeningSettings,
    labels: list[str] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Path, Path]:
    """Write `page/listen.html`, to be sent to listeners, and `key.json`, to be kept; returns both paths.

    labels : policies to compare; default: the first two

    Raises UserError when a policy was not evaluated, or too few outputs are long enough.
    """
    labels = labels or [p.label for p in evaluation.policies[:2]]
    unknown = [label for label in labels if label not in evaluation.labels]
    if unknown or len(set(labels)) != len(labels) or len(labels) < 2:
        raise UserError(f"compare at least two of {', '.join(evaluation.labels)}, not {', '.join(labels)}")
    if settings.design not in OF_ONE_CLIP and len(labels) != 2:
        raise UserError(f"a test of pairs compares two policies, not {len(labels)}; name two with --policy")
    out = make_folder(out)
    with FolderLock(out, "making a listening test"):
        if (out / KEY_FILE).exists():
            raise UserError(f"{out} already holds a listening test, whose key would be lost; choose another --out")
        return _make_test(evaluation, out, settings, labels, progress)


def _make_test(
    evaluation: Evaluation, out: Path, settings: ListeningSettings, labels: list[str], progress: Progress
) -> tuple[Path, Path]:
    """`make_test`, with nobody else in the folder."""
    prompts, passed_over = _long_enough(evaluation, labels, settings)
    sounds = [s for label in labels for s in _clips(evaluation, label, prompts, settings.seconds, progress)]
    tones = list(range(1, len(RATINGS) + 1)) if settings.checks else []
    sounds += [_tones(k, settings.seconds) for k in tones]
    sounds, loudness = _equally_loud(sounds)
    asked = evaluation.outputs(labels[0]).prompts
    opening = prompt_numbers(asked)
    origin = [{"policy": label, "prompt": int(opening[i])} for label in labels for i in prompts]
    styles: list[str] = []
    if settings.design == "styles":
        of = _styles(evaluation, asked, prompts)
        origin = [about | {"style": of[k % len(of)]} for k, about in enumerate(origin)]
        styles = sorted(set(of))
    if settings.design == "sets":
        sounds, origin = _in_sets(sounds, origin, settings)
    names = [secrets.token_hex(8) for _ in sounds]
    clips = {name: data_url(mp3(samples, constant=True)) for name, samples in zip(names, sounds, strict=True)}
    trials, answers = trials_of(names, len(labels), settings.units, settings)
    study = secrets.token_hex(8)
    page = _page(study, settings, trials, clips, styles)
    key = {
        "study": study,
        "design": settings.design,
        "policies": labels,
        "styles": styles,
        "evaluation": str(evaluation.path.resolve()),
        "prompts": len(prompts),
        "seconds": settings.seconds,
        "passed_over": passed_over,
        "loudness_lufs": loudness,
        "clips": dict(zip(names, origin, strict=False)),
        "trials": {t["id"]: {k: t[k] for k in ("clips", "repeat")} for t in trials},
        "checks": answers,
    }
    make_folder(out / "page")
    write_atomic(out / KEY_FILE, json.dumps(key, indent=1) + "\n")
    write_atomic(out / "page" / PAGE_FILE, page)
    return out / "page" / PAGE_FILE, out / KEY_FILE


def _styles(evaluation: Evaluation, asked: TokenBatch, prompts: np.ndarray) -> list[str]:
    """The style that each of these prompts asks for; raises UserError where there are no two to tell apart."""
    of = asked_styles(asked, evaluation.vocab)
    found = [of[i] for i in prompts]
    if "" in found or len(set(found)) < 2:
        raise UserError(
            "the outputs are not of two or more styles that were asked for; evaluate with --set prompts.styles=[...]"
        )
    return found


def _page(
    study: str, settings: ListeningSettings, trials: list[dict[str, Any]], clips: dict[str, str], styles: list[str]
) -> str:
    """The listeners' page; of a trial it gets all but whether it is a repeat."""
    return render_page(
        "listen.html",
        "listen.js",
        notes={
            "study": study,
            "design": settings.design,
            "seconds": settings.trial_seconds,
            "check_seconds": settings.seconds,
            "scale": RATINGS,
            "styles": styles,
            "question": settings.asked(),
            "keep_question": KEEP_QUESTION.replace("six", NUMBERS[settings.set_size - 2]),
            "trials": [{k: t[k] for k in ("id", "clips", "check", "block")} for t in trials],
            "clips": dict(sorted(clips.items())),
        },
    )


def _in_sets(
    sounds: list[np.ndarray], origin: list[dict[str, Any]], settings: ListeningSettings
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Clips joined to sets with a pause between them, then the tones as they were; a set has its number as `prompt`."""
    size, pause = settings.set_size, np.zeros((round(PAUSE_S * LISTENING_RATE_HZ), 2), np.float32)
    sets, of = [], []
    for start in range(0, len(origin), size):
        parts = [part for clip in sounds[start : start + size] for part in (clip, pause)][:-1]
        sets.append(np.concatenate(parts))
        members = origin[start : start + size]
        number = start // size % settings.units
        of.append({"policy": members[0]["policy"], "prompt": number, "prompts": [m["prompt"] for m in members]})
    return sets + sounds[len(origin) :], of


def _long_enough(evaluation: Evaluation, labels: list[str], settings: ListeningSettings) -> tuple[np.ndarray, int]:
    """The first prompts on which every policy's output lasts as long as a clip, and how many were passed over."""
    ends = [evaluation.outputs(label).notes(evaluation.vocab).end_s for label in labels]
    enough = np.flatnonzero((np.stack(ends) >= settings.seconds).all(axis=0))
    if len(enough) < settings.prompts:
        raise UserError(
            f"only {len(enough)} prompts have outputs of {settings.seconds:g} s from every policy, and --prompts is "
            f"{settings.prompts}; ask for fewer or shorter clips, or evaluate more prompts"
        )
    chosen = enough[: settings.prompts]
    return chosen, int(chosen[-1]) + 1 - len(chosen)


def _clips(
    evaluation: Evaluation, label: str, prompts: np.ndarray, seconds: float, progress: Progress
) -> list[np.ndarray]:
    """The first seconds of a policy's outputs, float32 [T, 2], all of one length, faded out."""
    notes = evaluation.outputs(label).select(prompts).notes(evaluation.vocab, seconds)
    sounds = listen_to(notes, evaluation.config.audio, seconds)
    progress("rendering clips", len(sounds), len(sounds))
    return [_exactly(samples, seconds) for samples in sounds]


def _exactly(samples: np.ndarray, seconds: float) -> np.ndarray:
    length, fade = round(seconds * LISTENING_RATE_HZ), round(FADE_S * LISTENING_RATE_HZ)
    clip = np.zeros((length, 2), np.float32)
    clip[: min(length, len(samples))] = samples[:length]
    clip[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)[:, None]
    return clip


def _tones(count: int, seconds: float) -> np.ndarray:
    """A clip of so many short tones."""
    clip = np.zeros((round(seconds * LISTENING_RATE_HZ), 2), np.float32)
    at = np.arange(round(TONE_S * LISTENING_RATE_HZ)) / LISTENING_RATE_HZ
    tone = np.sin(2 * np.pi * TONE_HZ * at) * np.sin(np.pi * at / TONE_S)
    for k in range(count):
        start = round((0.5 + k * TONE_EVERY_S) * LISTENING_RATE_HZ)
        clip[start : start + len(tone)] = 0.5 * tone[:, None]
    return clip


def _equally_loud(sounds: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """All clips at one integrated loudness (ITU-R BS.1770-4), the loudest that no peak forbids, and it in LUFS."""
    loudness = np.array([loudness_lufs(samples, LISTENING_RATE_HZ) for samples in sounds])
    if not np.isfinite(loudness).all():
        raise UserError("a clip is silent from beginning to end; evaluate more prompts, or raise --seconds")
    peaks_db = np.array([20 * np.log10(np.abs(samples).max()) for samples in sounds])
    target = min(LOUDEST_LUFS, float((loudness - peaks_db).min()) + PEAK_DB)
    gains = 10 ** ((target - loudness) / 20)
    return [(samples * gain).astype(np.float32) for samples, gain in zip(sounds, gains, strict=True)], target


def trials_of(
    names: list[str], policies: int, prompts: int, settings: ListeningSettings
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Questions in random order, and the right answers to the checks by trial.

    names   : of the clips (or sets), policy by policy and prompt by prompt, then of the clips of 1, 2 ... 5 tones
    prompts : on which policies are compared, or sets of them
    """
    chance = secrets.SystemRandom()
    music, tones = names[: policies * prompts], names[policies * prompts :]
    if settings.design in OF_ONE_CLIP:
        questions = [[name] for name in music]
    else:
        questions = [[music[i], music[prompts + i]] for i in range(prompts)]
    order = _shuffled(list(range(prompts)), chance)
    block = {i: place // BLOCK_PROMPTS for place, i in enumerate(order)}
    asked = [(question, block[k % prompts], False) for k, question in enumerate(questions)]
    blocks = [b for _, b, _ in asked]
    again = chance.sample(questions, min(settings.repeats, len(questions)))
    asked += [(question, chance.choice(blocks), True) for question in again]
    trials = [
        {"id": secrets.token_hex(8), "clips": _shuffled(q, chance), "check": False, "repeat": repeat, "block": b}
        for q, b, repeat in asked
    ]
    answers: dict[str, Any] = {}
    for _ in range(settings.checks):
        trial = secrets.token_hex(8)
        few, many = sorted(chance.sample(range(1, len(tones) + 1), 2))
        if settings.design in OF_ONE_CLIP:
            clips, answers[trial] = [tones[many - 1]], many
        else:
            clips, answers[trial] = _shuffled([tones[few - 1], tones[many - 1]], chance), tones[many - 1]
        trials.append({"id": trial, "clips": clips, "check": True, "repeat": False, "block": chance.choice(blocks)})
    return _shuffled(trials, chance), answers


def _shuffled(items: list[Any], chance: secrets.SystemRandom) -> list[Any]:
    return chance.sample(items, len(items))
