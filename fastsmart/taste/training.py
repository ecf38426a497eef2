"""Training on a taste: some steps of GRPO on a run folder that goes on, round after round, with the newest taste.

config = taste_config("pop909-tiny")
checkpoint = train_round(out / "run", config, taste_file, steps=3, beta=0.04)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.files import make_folder, read_file, write_atomic
from fastsmart.policy.hf_format import step_of
from fastsmart.presets import demo
from fastsmart.run.display import Display
from fastsmart.run.folder import RunFolder

KEPT = 20  # checkpoints, so many rounds to go back
HELD_OUT = 16  # clips of the evaluation that a round ends with


def taste_config(policy: str, taste: str | Path = "", beta: float = 0.04, seed: int = 0) -> Config:
    """A run that a taste steers: the demo's prompts and sampling, the reward `taste` alone, short evaluations."""
    base = demo()
    return replace(
        base,
        policy=replace(base.policy, source=policy),
        reward=replace(base.reward, terms={"taste": 1.0}, taste=str(taste)),
        grpo=replace(base.grpo, beta=beta),
        train=replace(
            base.train,
            steps=1,
            schedule="constant",
            eval_every=0,
            eval_prompts=HELD_OUT,
            save_every=0,
            keep=KEPT,
            listen=0,
            seed=seed,
        ),
    )


def train_round(
    out: str | Path, config: Config, taste: str | Path, steps: int, beta: float, display: Display | None = None
) -> Path:
    """Take so many more steps on a taste, in the run folder `out`, which is begun where there is none.

    The taste is copied into the folder, so that what a step learnt from is known, and a round that was cut off can go
    on. Returns the checkpoint to play from. A stop signal ends it early, with what has been learnt saved. Raises
    UserError as `train` does.
    """
    from fastsmart.trainer.loop import train

    out = Path(out)
    begun = RunFolder.begun(out)
    done = RunFolder.read(out).checkpoints.step if begun else 0
    kept = str(_keep(taste, out, done))
    if begun:
        changes = {"train.steps": done + steps, "reward.taste": kept, "grpo.beta": beta}
        train(config, out, True, display, changes=changes)
    else:
        reward, grpo = replace(config.reward, taste=kept), replace(config.grpo, beta=beta)
        train(replace(config, reward=reward, grpo=grpo, train=replace(config.train, steps=steps)), out, False, display)
    return newest_policy(out)


def _keep(taste: str | Path, out: Path, step: int) -> Path:
    """A copy of a taste in the run folder, under the step that it is learnt from on."""
    try:
        content = read_file(taste)
    except OSError as error:
        raise UserError(f"cannot read the taste {taste}: {error.strerror}") from error
    path = make_folder(out / "tastes") / f"from-step-{step:06d}.json"
    write_atomic(path, content)
    return path.resolve()


def newest_policy(out: str | Path) -> Path:
    """The checkpoint of a run that was saved last; raises UserError where there is none."""
    found = RunFolder.read(out).checkpoints.all()
    if not found:
        raise UserError(f"{out} has no checkpoint yet; let it train a round")
    return found[-1]


def go_back(out: str | Path, step: int) -> Path:
    """Make the checkpoint of a step the newest: later ones move to `undone/` in the run folder, whence they can be
    put back. Returns the checkpoint; raises UserError where the step has none."""
    folder = RunFolder.read(out)
    found = folder.checkpoints.all()
    if step not in map(step_of, found):
        known = ", ".join(str(step_of(path)) for path in found) or "none"
        raise UserError(f"{out} has no checkpoint of step {step}; it has {known}")
    undone = Path(out) / "undone"
    for path in found:
        if step_of(path) > step:
            undone.mkdir(exist_ok=True)
            number = sum(1 for _ in undone.iterdir())
            path.rename(undone / f"{number:04d}-{path.name}")
    return newest_policy(out)
