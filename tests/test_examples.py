"""The scripts in examples/ do what they say, with the settings of a tiny run on their command lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_soundfont import write_soundfont

from fastsmart.errors import UserError
from fastsmart.reward import load_reward, register

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, checkpoint: Path, folder: Path) -> str:
    tiny = [f"policy.source={checkpoint}", f"reward.typicality={shipped_statistics()}", "sampling.max_tokens=40"]
    tiny += ["sampling.group=2", "audio.workers=1", "train.steps=1", "train.prompts=2", "train.eval_prompts=2"]
    tiny += ["train.listen=1", "train.threads=1"]
    command = [sys.executable, str(EXAMPLES / name), *tiny]
    env = {**os.environ, "FASTSMART_SOUNDFONT": str(write_soundfont(folder / "tiny.sf2"))}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shipped_statistics() -> Path:
    return EXAMPLES.parent / "fastsmart/policy/shipped/pop909-tiny/typicality.json"


def test_tune_and_listen_leaves_a_piece_to_hear(checkpoint: Path, tmp_path: Path) -> None:
    said = run_example("tune_and_listen.py", checkpoint, tmp_path)
    assert "held-out reward" in said
    assert (tmp_path / "runs/tuned/piece.mid").stat().st_size > 0
    assert (tmp_path / "runs/tuned/piece.wav").stat().st_size > 1000
    assert sorted(path.suffix for path in (tmp_path / "runs/tuned/listen").glob("*before*")) == [".mid", ".wav"]


def test_a_run_is_tuned_on_a_reward_of_your_own(checkpoint: Path, tmp_path: Path) -> None:
    run_example("own_reward.py", checkpoint, tmp_path)
    assert "| reward: staccato |" in (tmp_path / "runs/staccato/before_after.md").read_text()


def test_a_registered_reward_takes_no_name_of_ours() -> None:
    with pytest.raises(UserError, match=r"fastsmart has a reward 'variety'; choose another name for Mine"):

        @register
        class Mine:
            name, needs_audio = "variety", False

    assert type(load_reward("variety")).__name__ == "Variety"


def test_every_example_compiles_and_stays_short() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 3
    for script in scripts:
        compile(script.read_text(), script.name, "exec")
        assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 32, script.name
