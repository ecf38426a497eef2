"""Lessons: each tunes the first policy to a taste as it is by then, and is a run folder like any other.

config = lesson_config("pop909-tiny")
policy = teach(out / "lessons" / "lesson-0001", config, taste_file, goal=1.0)

A lesson begins from the first policy, so that nothing is left in it of what earlier, poorer tastes asked for. Notes are
credited one by one (`fastsmart.credit`) until a round's clips are as much to the listener's taste as was wanted, which
makes them more alike. Then the policy learns the most diverse of its clips that are a little better yet
(`fastsmart.tilt`), which gives that back. Where held-out clips gained more than was wanted, some of the change of
weights is taken back; where they gained less, it goes further. GRPO, whose reward is never used up, went on until five
notes were left of a clip (docs/log.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastsmart.config import Config, merged
from fastsmart.credit.settings import CreditSettings
from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_folder, make_folder, os_errors_as_user_errors, read_file, write_atomic
from fastsmart.presets import demo
from fastsmart.reward.taste import Taste
from fastsmart.run.display import Display
from fastsmart.run.folder import RunFolder
from fastsmart.tilt.settings import TiltSettings
from fastsmart.trainer.settings import MergeSettings

if TYPE_CHECKING:
    from fastsmart.policy.transformer import Policy

ROUNDS, ROUND_STEPS = 3, 10
ROUND_PROMPTS = 240  # two completions each
STEP_CLIPS = 64
STRENGTH = 2.0
TILT_STEPS, TILT_PROMPTS = 10, 480
TILT_GAIN = 0.25  # of the most diverse of the last round's clips beyond the mean, in their standard deviations
TILT_MOST = 3  # times its share that a clip may weigh: with fewer clips that weigh more, stranger ones are learnt
KEPT = 20  # lessons of a folder
HELD_OUT = 192  # clips of the evaluations that a lesson begins and ends with
TRIES, CLOSE = 4, 0.03  # of the share of the change of weights that gains what was wanted, to so many deviations
FARTHEST = 1.5  # share of it, beyond what was trained
TASTE_FILE, ABOUT_FILE, POLICY, UNDONE = "taste.json", "lesson.json", "policy", "undone"


def lesson_config(policy: str, taste: str | Path = "", goal: float = 1.0, seed: int = 0) -> Config:
    """A lesson's run: the demo's prompts and sampling, the reward `taste` alone, a short evaluation before and after.

    The taste counts without caution, for a lesson ends where it has gained as much as was wanted.

    goal : mean reward that is enough, in standard deviations of the first policy's clips above their mean
    """
    from fastsmart.machine.packed_linear import bfloat16_is_fast

    base = demo()
    dtype = "bfloat16" if bfloat16_is_fast() else base.policy.dtype
    return replace(
        base,
        policy=replace(base.policy, source=policy, dtype=dtype),
        sampling=replace(base.sampling, group=2),
        reward=replace(base.reward, terms={"taste": 1.0}, taste=str(taste), taste_caution=0.0),
        credit=CreditSettings(
            prompts=ROUND_PROMPTS,
            round_steps=ROUND_STEPS,
            clips=STEP_CLIPS,
            window=ROUNDS,
            alternatives=4,
            strength=STRENGTH,
            goal=goal,
        ),
        merge=MergeSettings(tilt_steps=TILT_STEPS),
        tilt=TiltSettings(prompts=TILT_PROMPTS, clips=STEP_CLIPS, weights="diverse", best_of=TILT_MOST, gain=TILT_GAIN),
        train=replace(
            base.train,
            algorithm="credit",
            steps=ROUNDS * ROUND_STEPS + TILT_STEPS,
            prompts=ROUND_PROMPTS,
            schedule="constant",
            eval_every=0,
            eval_prompts=HELD_OUT,
            save_every=0,
            keep=1,
            listen=0,
            seed=seed,
        ),
    )


def teach(out: str | Path, config: Config, taste: str | Path, goal: float, display: Display | None = None) -> Path:
    """Train a lesson in the new folder `out`, which gets a copy of the taste; gives the policy that comes of it, in
    `out/policy`: of the change of weights so much as gives what was wanted, half as much again at most.

    goal : as of `lesson_config`, by a taste all of whose predictions came true; by others that share of it which did
           (`Taste.borne_out`). Where no more is wanted than a lesson can hit, .03, nothing is trained, and the
           policy is the first one

    A stop signal ends it early: then it gives the newest checkpoint, and there is no `out/policy`. Raises UserError as
    `train` does.
    """
    from fastsmart.policy.blend import blended
    from fastsmart.policy.hf_format import load_policy
    from fastsmart.trainer.loop import train

    known, out = Taste.load(taste), Path(out)
    path = (make_folder(out) / TASTE_FILE).resolve()
    write_atomic(path, read_file(taste))
    wanted = goal * known.borne_out
    config = merged(config, {"reward": {"taste": str(path)}, "credit": {"goal": wanted}})
    if wanted <= CLOSE:
        RunFolder.create(out, config)  # whoever repeats the lesson reads its config
        return _kept(load_policy(config.policy.source), out)
    train(config, out, False, display)
    run = RunFolder.read(out)
    newest = run.checkpoints.all()[-1]
    if not run.concluded:  # it was stopped
        return newest
    base, tuned = load_policy(run.config.policy.source), load_policy(newest)
    before, *_, after = (line["eval"]["terms"]["taste"]["mean"] for line in run.metrics.lines() if "eval" in line)
    share = _share(wanted, after - before, lambda tried: _mean_taste(run.config, blended(base, tuned, tried)) - before)
    return _kept(blended(base, tuned, share), out)


def _kept(policy: Policy, out: Path) -> Path:
    """Where a lesson keeps the policy that came of it."""
    from fastsmart.policy.hf_format import write_policy

    with atomic_folder(out / POLICY) as part, os_errors_as_user_errors(out / POLICY):
        write_policy(policy, part)
    return out / POLICY


def _share(wanted: float, whole: float, gain: Callable[[float], float]) -> float:
    """The share of a change of weights that gains what is wanted, by false position: less than 1 where all of it gains
    more, up to `FARTHEST` where it gains less; 0 where it gains nothing.

    whole : what all of it gains
    gain  : what a share gains, which rises with it
    """
    if not whole > 0:  # or nothing could be scored
        return 0.0
    if abs(whole - wanted) <= CLOSE:
        return 1.0
    tried = [(1.0, whole)]
    low, high = ((0.0, 0.0), tried[0]) if whole > wanted else (tried[0], None)
    for _ in range(TRIES):
        if high is None:
            share = min(low[0] * wanted / low[1], FARTHEST)
        else:
            share = low[0] + (wanted - low[1]) / (high[1] - low[1]) * (high[0] - low[0])
        found = gain(share)
        if not abs(found - wanted) > CLOSE:  # or nothing could be scored
            return share
        tried.append((share, found))
        if found > wanted:
            high = tried[-1]
        elif share == FARTHEST or found <= low[1]:  # or more of the change gains no more
            break
        else:
            low = tried[-1]
    return min(tried, key=lambda point: abs(point[1] - wanted))[0]


def _mean_taste(config: Config, policy: Policy) -> float:
    """The reward `taste` in the mean of the held-out clips of a lesson, played by another policy than its own."""
    from fastsmart.policy.device import resolved_device, resolved_dtype
    from fastsmart.run.provenance import statistics_path
    from fastsmart.trainer.evaluate import evaluate
    from fastsmart.trainer.rollout_worker import RolloutWorker

    policy = policy.to(resolved_device(config.policy))
    with RolloutWorker(config, policy, statistics_path(config), resolved_dtype(config.policy)) as worker:
        _, _, summary = evaluate(worker)
    return float(summary["terms"]["taste"]["mean"])


@dataclass(frozen=True)
class Lesson:
    """A lesson of a folder, and what it was taught.

    path     : of its run
    after    : id of the last line of the choices that the taste knew
    choices  : how many choices stood
    goal     : as of `teach`
    listener : whose taste; None = the joint one
    """

    path: Path
    after: str
    choices: int
    goal: float
    listener: str | None = None

    @property
    def number(self) -> int:
        """From 1."""
        return _number(self.path)

    @property
    def policy(self) -> Path:
        """What it came to, which is there once the lesson is finished."""
        return self.path / POLICY


@dataclass
class LessonFolder:
    """Lessons of a listener's folder, `lesson-0001` and so on; nothing is read before it is asked for."""

    path: Path
    _told: dict[Path, Lesson] = field(default_factory=dict)  # finished ones, which do not change any more

    def finished(self) -> list[Lesson]:
        """Those that came to their end, oldest first; raises UserError for one whose description is damaged."""
        read = (self._told.get(path) or _read(path) for path in self._paths())
        found = [lesson for lesson in read if lesson and lesson.policy.is_dir()]
        self._told = {lesson.path: lesson for lesson in found}
        return found

    def begin(self, after: str, choices: int, goal: float, listener: str | None = None) -> Lesson:
        """The next lesson, written down before it is taught. What is left of one that was cut off goes, and so do the
        oldest beyond `KEPT`. Raises UserError when the disk is full."""
        done = self.finished()
        kept = {lesson.path for lesson in done[-(KEPT - 1) :]}
        for path in self._paths():
            if path not in kept:
                with os_errors_as_user_errors(path):
                    shutil.rmtree(path)
        number = done[-1].number + 1 if done else 1
        lesson = Lesson(self.path / f"lesson-{number:04d}", after, choices, goal, listener)
        about = {name: value for name, value in vars(lesson).items() if name != "path"}
        write_atomic(make_folder(lesson.path) / ABOUT_FILE, json.dumps(about) + "\n")
        return lesson

    def go_back(self, number: int) -> None:
        """Make this the newest lesson, 0 = none: later ones move to `undone/`, whence they can be put back."""
        for path in self._paths():
            if _number(path) > number:
                aside = make_folder(self.path / UNDONE)
                path.rename(aside / f"{sum(1 for _ in aside.iterdir()):04d}-{path.name}")

    def _paths(self) -> list[Path]:
        found = self.path.glob("lesson-*") if self.path.is_dir() else ()
        return sorted((path for path in found if path.name.removeprefix("lesson-").isdecimal()), key=_number)


def _read(path: Path) -> Lesson | None:
    """What a lesson was taught; None where that was not written down yet."""
    try:
        told = json.loads(read_file(path / ABOUT_FILE))
        return Lesson(path, str(told["after"]), int(told["choices"]), float(told["goal"]), told["listener"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path / ABOUT_FILE} is damaged; remove the folder {path}") from error


def _number(path: Path) -> int:
    return int(path.name.removeprefix("lesson-"))
