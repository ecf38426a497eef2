"""What a person sees of a run from outside: `fastsmart top`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import io
import json
import os
import sys
import time

import pytest
from rich.console import Console
from small_run import SYMBOLIC, config_for

from fastsmart import UserError, train
from fastsmart.cli import main
from fastsmart.machine.files import JsonLines
from fastsmart.run.display import Silent
from fastsmart.run.folder import LIVE_FILE
from fastsmart.run.top import Top, curve
from fastsmart.run.writers import numbers

pytestmark = pytest.mark.usefixtures("light_runs")


def shown(view: Top) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(view.render(), highlight=False)
    return console.file.getvalue()


class Watcher(Silent):
    """Looks at a run with `top` from within its second step, when its live file is as it would be for anyone."""

    def __init__(self, out):
        self.out, self.views = out, []

    def line(self, line):
        if line["step"] == 1:
            self.view = Top(self.out)
        if line["step"] in (1, 3):
            self.views.append(shown(self.view))


def test_top_follows_a_run_and_shows_a_finished_one(checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    watcher = Watcher(out)
    train(config_for(checkpoint), out, display=watcher)
    early, later = watcher.views
    assert "step 1 of 6: " in early
    assert "step 3 of 6: " in later
    assert "min left" in later
    assert "s ago" in early
    assert later.count("held-out reward") == 2
    assert later.count("4 outputs on 4 openings") == 2
    assert "render workers  " in later
    assert not (out / LIVE_FILE).exists()

    assert main(["top", str(out)]) == 0
    said = capsys.readouterr().out
    assert "step 6 of 6: finished" in said
    lines = JsonLines(out / "metrics.jsonl").lines()
    assert f"reward {lines[-1]['reward']:.3f}" in said
    assert f"({lines[-1]['kl_per_completion']:.2f} nats/clip)" in said
    assert all(
        name in said
        for name in ("consonance", "variety", "kl", "kl_per_completion", "entropy", "sampler", "trainer", "memory")
    )


def test_top_tells_a_dead_run_from_a_silent_one(checkpoint, tmp_path):
    out = tmp_path / "run"
    train(config_for(checkpoint, SYMBOLIC, {"train": {"steps": 2, "eval_every": 0}}), out)
    live = {"host": os.uname().nodename, "stage": "sample", "done": 3, "total": 8, "workers": []}
    (out / LIVE_FILE).write_text(json.dumps(live | {"pid": os.getpid(), "time": time.time() - 40}))
    assert "step 2 of 2: sample 3/8, 40 s ago" in shown(Top(out))
    (out / LIVE_FILE).write_text(json.dumps(live | {"pid": 2**22 + 1, "time": time.time()}))
    assert "has died; go on with --resume" in shown(Top(out))


def test_top_reads_what_is_new_and_what_a_resumed_run_wrote_anew(checkpoint, tmp_path):
    out = tmp_path / "run"
    train(config_for(checkpoint, SYMBOLIC, {"train": {"steps": 3, "eval_every": 0}}), out)
    view, metrics = Top(out), JsonLines(out / "metrics.jsonl")
    shown(view)
    whole = metrics.lines()
    assert view.lines == whole
    with open(metrics.path, "a") as sink:
        sink.write('{"step": 4, "half')
    shown(view)
    assert view.lines == whole
    metrics.forget_after(1)
    metrics.append({**whole[2], "health": {**whole[2]["health"], "notes": ["a worker died"], "workers_replaced": 1}})
    said = shown(view)
    assert [line["step"] for line in view.lines] == [0, 1, 2]
    assert "step     2  a worker died" in said
    assert "workers replaced 1" in said


def test_top_needs_a_run(tmp_path, capsys):
    assert main(["top", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err


def test_a_curve_goes_from_the_lowest_to_the_highest_with_gaps():
    assert curve([0.0, None, 0.5, 1.0]) == "▁ ▅█"
    assert curve([2.0, 2.0]) == "▁▁"
    assert len(curve([float(i) for i in range(100)], 10)) == 10


LINE = {"step": 3, "reward": 0.5, "skipped": False, "kl": None, "time": {"sample": 0.1, "idle": {"sampler": 0.2}},
        "health": {"notes": ["x"], "files": 3}}  # fmt: skip


def test_every_number_has_a_path():
    assert dict(numbers(LINE)) == {
        "reward": 0.5,
        "skipped": 0.0,
        "time/sample": 0.1,
        "time/idle/sampler": 0.2,
        "health/files": 3.0,
    }


def test_tensorboard_reads_what_a_run_and_its_second_life_wrote(checkpoint, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    config = config_for(checkpoint, SYMBOLIC, {"train": {"writers": ["tensorboard"], "steps": 4, "save_every": 2}})

    class Dies(Silent):
        def line(self, line):
            if line["step"] == 3:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, out, display=Dies())
    train(config, out, resume=True)
    assert JsonLines(out / "metrics.jsonl").lines()[3]["health"]["notes"] == ["resumed after step 2"]
    events = event_accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rewards = [(e.step, e.value) for e in events.Scalars("reward")]
    lines = JsonLines(out / "metrics.jsonl").lines()
    assert rewards == [(line["step"], pytest.approx(line["reward"])) for line in lines[1:]]
    assert events.Scalars("eval/reward/mean")[-1].value == pytest.approx(lines[-1]["eval"]["reward"]["mean"])


@pytest.mark.slow
def test_wandb_keeps_a_run_offline(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config_for(checkpoint, SYMBOLIC, {"train": {"writers": ["wandb"], "steps": 2}}), tmp_path / "run")
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-run.wandb")
    assert kept.stat().st_size > 0


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_writer_that_is_not_installed_is_said_before_anything_is_trained(
    checkpoint, tmp_path, monkeypatch, name, module
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        train(config_for(checkpoint, SYMBOLIC, {"train": {"writers": [name]}}), tmp_path / "run")
    assert not JsonLines(tmp_path / "run" / "metrics.jsonl").lines()
    with pytest.raises(UserError, match=r"train\.writers\[0\] is 'tensorbord'"):
        config_for(checkpoint, {"train": {"writers": ["tensorbord"]}})
