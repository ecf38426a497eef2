"""Going on with a run: its own config, the keys that may change, checkpoints that are damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_run import SYMBOLIC, comparable, config_for
from tiny_policy import make_policy

from fastsmart import UserError, train
from fastsmart.cli import main
from fastsmart.config import Config, read_config, with_overrides
from fastsmart.machine.distributed import Ranks
from fastsmart.policy.checkpoints import Checkpoints, Snapshot
from fastsmart.policy.optimizer import make_optimizer
from fastsmart.run.display import Silent
from fastsmart.run.folder import RunFolder
from fastsmart.run.resumed_config import CHANGEABLE, resumed_config

pytestmark = pytest.mark.usefixtures("light_runs")


class Said(Silent):
    def __init__(self):
        self.said = []

    def message(self, text):
        self.said.append(text)


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in run.rglob("*") if p.is_file()}


def test_a_finished_run_does_nothing_twice_and_can_be_made_longer_and_passes_over_damage(checkpoint, tmp_path):
    out, config = tmp_path / "run", config_for(checkpoint, SYMBOLIC, {"train": {"steps": 2, "save_every": 1}})
    train(config, out)
    before, display = contents(out), Said()
    again = train(config, out, resume=True, display=display)
    assert contents(out) == before
    assert again.step == 2
    assert again.after == comparable(out)[2]["eval"]
    (said,) = display.said
    assert said.endswith("has done all its 2 steps; make it longer with --resume --set train.steps=4")

    (out / "checkpoints" / "step-000002" / "state.json").write_text("{}")
    (out / "held-out" / "before.csv").write_text("opening,reward\n0,x\n")
    display = Said()
    longer = train(config, out, resume=True, changes={"train.steps": 3}, display=display)
    assert longer.step == 3
    assert read_config(out / "config.toml").train.steps == 3
    lines = comparable(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert (out / "before_after.md").read_text().startswith("# Before and after 3 steps")
    notes = json.loads((out / "metrics.jsonl").read_text().splitlines()[2])["health"]["notes"]
    assert notes[0] == "resumed after step 1"
    assert notes[1].startswith("passed over step-000002: ")
    assert "state.json is damaged" in notes[1]
    assert notes[2] == "train.steps is 3 from here on, was 2"
    assert display.said[:-1] == notes[1:]
    assert "before.csv is damaged" in display.said[-1]  # which costs the intervals, not the run
    assert "| reward |" in (out / "before_after.md").read_text()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run of the demo that has come to step 10, as far as the command line looks."""
    out = tmp_path / "run"
    RunFolder.create(out, with_overrides(Config(), ["train.learning_rate=3e-4", "reward.terms.variety=1"]))
    (out / "checkpoints" / "step-000010").mkdir(parents=True)
    (out / "checkpoints" / "step-000010" / "state.json").write_text('{"step": 10}')
    return out


def dry_run(capsys, out, *options):
    code = main(["train", "--out", str(out), "--dry-run", *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_dry_run_of_a_resume_shows_the_runs_own_config_and_what_would_change(begun, capsys):
    own = (begun / "config.toml").read_text()
    for resume in (["--resume"], ["--resume", "auto"]):
        assert dry_run(capsys, begun, *resume) == (0, own, "")
    code, shown, _ = dry_run(capsys, begun, "--resume", "--set", "train.steps=300", "--set", "train.keep=9")
    assert code == 0
    assert shown == own.replace("steps = 200\n", "steps = 300\n").replace("keep = 3\n", "keep = 9\n")
    assert (begun / "config.toml").read_text() == own
    (begun / "config.toml").write_text("[train\n")
    code, shown, error = dry_run(capsys, begun, "--resume")
    assert (code, shown) == (2, "")
    assert "config.toml is not valid TOML" in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "grpo.beta=0.5", "--set", "train.steps=300"], "other settings (grpo.beta); leave these out"),
        (["--engine", "vllm"], "other settings (sampling.engine)"),
        (["--async", "off"], "other settings (train.pipeline)"),
        (["--preset", "demo"], "other settings (prompts.source, "),
        (["--set", "train.steps=10"], "train.steps is 10, but the run in"),
        (["--set", "train.steps=0"], "train.steps is 0"),
        (["--set", "train.listen=99"], "train.listen is 99, more than the 64 of train.eval_prompts"),
    ],
)
def test_what_may_not_change_is_named_and_nothing_is_written(begun, capsys, options, says):
    before = contents(begun)
    for mode in (["--dry-run"], []):
        assert main(["train", "--out", str(begun), "--resume", *options, *mode]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert contents(begun) == before


@pytest.mark.parametrize("resume", [[], ["--resume"], ["--resume", "auto"]])
def test_a_second_train_into_the_folder_is_refused_before_it_touches_anything(begun, capsys, resume):
    with RunFolder.open(begun, Config(), True, Ranks()):
        before = contents(begun)
        assert main(["train", "--out", str(begun), *resume, *([] if resume else ["--preset", "demo"])]) == 2
        error = capsys.readouterr().err
        assert f"process {os.getpid()} on host " in error
        assert f"is training in {begun}" in error
        assert error.count("\n") == 1
        assert contents(begun) == before


def test_every_key_that_may_change_exists_and_is_written_down(begun):
    new = {"train.steps": 300, "train.eval_every": 7, "train.save_every": 7, "train.keep": 7, "train.listen": 7,
           "train.threads": 7, "train.writers": ["wandb"], "audio.workers": 7, "audio.clip_timeout_s": 7.0}  # fmt: skip
    assert set(new) == set(CHANGEABLE)
    folder = RunFolder.reopen(begun, new)
    assert read_config(begun / "config.toml") == folder.config
    for name, value in new.items():
        section, key = name.split(".")
        found = getattr(getattr(folder.config, section), key)
        assert (list(found) if isinstance(found, tuple) else found) == value
    with pytest.raises(UserError, match=r"policy\.source"):
        resumed_config(folder.config, {"policy.source": "x"}, begun, 0)


def test_a_dry_run_of_auto_without_a_run_shows_the_one_it_would_start(tmp_path, capsys):
    code, shown, _ = dry_run(capsys, tmp_path / "new", "--resume", "auto", "--preset", "demo")
    assert code == 0
    assert "steps = 40" in shown
    code, _, error = dry_run(capsys, tmp_path / "new", "--resume")
    assert code == 2
    assert "no run to resume" in error


def truncated(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def lacking(name, tensor):
    def damage(folder):
        tensors = load_file(folder / name)
        del tensors[tensor]
        save_file(tensors, folder / name)

    return damage


NORM = "model.norm.weight"
DAMAGES = {
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "no state": lambda folder: (folder / "state.json").unlink(),
    **{
        f"state {text[:9]!r}": written("state.json", text)
        for text in ("{}", "[]", "", "\0\0", '{"step": 7}', "[" * 5000)
    },
    "reward of text": written("state.json", '{"step": 2, "held_out_reward": "good"}'),
    **{f"{name} cut": truncated(name) for name in ("model.safetensors", "optimizer.safetensors", "config.json")},
    **{f"{name} cut": truncated(name) for name in ("previous.safetensors", "tokenizer.json")},
    **{f"config {text}": written("config.json", text) for text in ("[]", "{}", "null", '{"model_type": "phi3"}')},
    "no optimizer": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "tensor of the optimizer": lacking("optimizer.safetensors", f"{NORM}.exp_avg"),
    "tensor of the weights": lacking("model.safetensors", NORM),
    "tensor of the step before": lacking("previous.safetensors", NORM),
    "tokenizer {}": written("tokenizer.json", "{}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, vocab):
    import torch

    folder, policy = tmp_path_factory.mktemp("two") / "checkpoints", make_policy(vocab)
    optimizer = make_optimizer(policy, 1e-2, (0.9, 0.999), 0.0)
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        for parameter in policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        checkpoints.write(Snapshot.of(step, policy, optimizer, {"held_out_reward": float(step)}, policy))
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(two_checkpoints, tmp_path, vocab, kind):
    import torch

    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder, symlinks=True)
    DAMAGES[kind](folder / "step-000002")
    policy, checkpoints = make_policy(vocab, seed=9), Checkpoints(folder)
    optimizer = make_optimizer(policy, 1e-2, (0.9, 0.999), 0.0)
    assert checkpoints.load(policy, optimizer)["step"] == 1
    (path, why), = checkpoints.passed_over.items()  # fmt: skip
    assert path.name == "step-000002"
    assert "step-000002" in why
    weights = load_file(folder / "step-000001" / "model.safetensors")
    assert all(torch.equal(p, weights[name]) for name, p in policy.named_parameters())
    assert checkpoints.previous(policy) is not None
    assert (checkpoints.step, checkpoints.best()) == (1, (folder / "step-000001", 1.0))
    checkpoints.save(2, policy, optimizer)  # the step done again takes the place of the damaged one
    assert checkpoints.step == 2
    assert Checkpoints(folder).load(policy, optimizer)["step"] == 2


def test_where_all_checkpoints_are_damaged_nothing_begins_anew(two_checkpoints, tmp_path, vocab):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder, symlinks=True)
    for step in folder.glob("step-*"):
        (step / "state.json").write_text("{}")
    policy = make_policy(vocab)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read .*put back a copy, or remove"):
        Checkpoints(folder).load(policy, make_optimizer(policy, 1e-2, (0.9, 0.999), 0.0))
