"""A run as a user starts it: what it leaves behind, how it stops, and that a killed one loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from processes import started
from small_run import SYMBOLIC, command, comparable, config_for, write_config

from fastsmart import UserError, presets, train
from fastsmart.config import read_config
from fastsmart.machine.files import JsonLines
from fastsmart.notes import read_midi
from fastsmart.policy.hf_format import load_policy
from fastsmart.trainer.evaluate import HeldOut, before_after


def test_a_run_leaves_what_a_person_opens(checkpoint, tmp_path):
    out = tmp_path / "run"
    result = train(config_for(checkpoint), out)
    assert result.step == 6
    assert result.exit_code == 0
    names = {p.name for p in out.iterdir()}
    assert names == {
        "before_after.md",
        "checkpoints",
        "config.toml",
        "curves.png",
        "held-out",
        "listen",
        "metrics.jsonl",
        "run.json",
        "trace.json",
    }
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["best", "step-000004", "step-000006"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    for label in ("before", "after"):
        assert len(read_midi(out / "listen" / f"01-{label}.mid")) == 1
        info = soundfile.info(out / "listen" / f"01-{label}.wav")
        assert (info.samplerate, info.channels) == (48000, 2)
    table = (out / "before_after.md").read_text()
    assert all(row in table for row in ("| reward |", "| reward: consonance |", "| notes |", "| scale consistency |"))

    assert table.startswith("# Before and after 6 steps: 4 outputs on 4 held-out openings\n")
    assert "4 outputs on 4 held-out openings; 95 % bootstrap intervals over 4 openings" in table
    changes = [line.split("|")[4] for line in table.splitlines() if line.startswith("| reward")]
    assert re.fullmatch(r" [+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\] ", changes[0])

    page = (out / "listen" / "index.html").read_text()
    word, size = "Worse" if changes[0][1] == "-" else "Better", changes[0][2:6]
    assert f"<h1>{word} by {size} standard deviations [" in page
    assert page.count("<audio") == 2 * len(list((out / "listen").glob("*-before.wav")))

    lines = comparable(out)
    before, after = (HeldOut.load(out / "held-out" / f"{label}.csv") for label in ("before", "after"))
    assert before.table["reward"].mean() == pytest.approx(lines[0]["eval"]["reward"]["mean"])
    assert after.table["notes"].std(ddof=1) == pytest.approx(lines[6]["eval"]["features"]["notes"]["std"])
    assert before.opening.tolist() == [0, 1, 2, 3]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval" in line] == [0, 2, 4, 6]
    assert lines[1]["ratio"] == pytest.approx(1.0, abs=1e-4)  # on-policy: sampler and trainer agree
    assert lines[1]["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-4)
    assert lines[1]["kl"] == pytest.approx(0.0, abs=1e-6)  # the first step is that of the reference itself
    assert lines[6]["kl"] > 1e-5
    assert lines[1]["learning_rate"] == pytest.approx(1e-3)
    assert lines[6]["learning_rate"] == pytest.approx(1e-3 / 6)
    tuned = load_policy(out / "checkpoints" / "step-000006")
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), result.policy.parameters(), strict=True))


@pytest.mark.usefixtures("light_runs")
def test_the_same_run_twice_gives_the_same_metrics_and_another_seed_does_not(checkpoint, tmp_path):
    short = {"train": {"steps": 2}}
    for name, change in (("a", {}), ("b", {}), ("c", {"train": {"seed": 1}})):
        train(config_for(checkpoint, short, change), tmp_path / name)
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    assert comparable(tmp_path / "a") != comparable(tmp_path / "c")


@pytest.mark.usefixtures("light_runs")
def test_a_symbolic_reward_is_learnt_and_renders_nothing(tmp_path):
    longer = {"train": {"steps": 6, "prompts": 4, "eval_prompts": 32, "eval_every": 0, "learning_rate": 5e-4}}
    group = {"sampling": {"group": 8}, "reward": {"terms": {"pitch_range": 1.0}}}
    result = train(config_for(Path("pop909-tiny"), group, longer), tmp_path / "run")
    assert result.after["reward"]["mean"] > result.before["reward"]["mean"] + 0.5 * result.before["reward"]["std"]
    assert not list((tmp_path / "run" / "listen").glob("*.wav"))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("render" not in json.loads(line)["time"] for line in metrics)


def test_killed_at_a_random_moment_and_resumed_it_writes_the_same_metrics(checkpoint, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = write_config(tmp_path, checkpoint)
    train(read_config(settings), whole)
    random = np.random.default_rng()
    kills = 0
    options = ["--config", str(settings)]
    for _ in range(2):
        with started(command(killed, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            # some moment after the first line of metrics of this life, so that every life makes some way
            seen, begun = _size(killed), time.monotonic()
            while process.poll() is None and _size(killed) <= seen and time.monotonic() - begun < 120:
                time.sleep(0.02)
            time.sleep(random.uniform(0.0, 1.5))
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += process.returncode == -signal.SIGKILL
        options = ["--resume"] if (killed / "config.toml").exists() else options
    subprocess.run(command(killed, *options), check=True, capture_output=True, timeout=300)
    assert kills, "no process was caught alive"
    assert comparable(killed) == comparable(whole)
    ours, theirs = (load_policy(sorted((run / "checkpoints").iterdir())[-1]) for run in (killed, whole))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def _size(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_leaves_and_goes_on(checkpoint, tmp_path, number):
    out = tmp_path / "run"
    many = {"train": {"steps": 1000, "save_every": 0, "eval_every": 0}}
    settings = write_config(tmp_path, checkpoint, SYMBOLIC, many)
    with started(command(out, "--config", str(settings)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        os.kill(process.pid, number)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--resume" in rest
    saved = sorted((out / "checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].name.removeprefix("step-"))
    assert comparable(out)[-1]["step"] == step >= 3
    assert (out / "curves.png").exists()


LOOP = """
import sys
import fastsmart as fs
from fastsmart.config import read_config

for name in ("first", "second"):
    run = fs.train(read_config(sys.argv[1]), out=f"{sys.argv[2]}/{name}")
    print(name, "ended with", run.exit_code, flush=True)
    if run.exit_code:
        sys.exit(run.exit_code)
"""


def test_sigterm_ends_the_training_of_a_script_and_the_script_where_it_looks(checkpoint, tmp_path):
    changes = {"train": {"steps": 1000, "save_every": 0, "eval_every": 0, "listen": 0}}
    settings = write_config(tmp_path, checkpoint, SYMBOLIC, changes)
    script = [sys.executable, "-c", LOOP, str(settings), str(tmp_path)]
    with started(script, stdout=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "first" / "metrics.jsonl")
        os.kill(process.pid, signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert said == "first ended with 143\n"  # so the script went on after the signal, and left by itself
    assert process.returncode == 143
    assert not (tmp_path / "second").exists()


def wait_for(path: Path) -> None:
    """Until a file has its second line, that of the first step."""
    begun = time.monotonic()
    while not (path.is_file() and path.read_text().count("\n") >= 2):
        assert time.monotonic() - begun < 240, f"nothing is in {path}"
        time.sleep(0.05)


def test_a_folder_that_holds_a_run_is_not_overwritten(checkpoint, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    (out / "config.toml").write_text("precious")
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        train(config_for(checkpoint), out)
    assert (out / "config.toml").read_text() == "precious"
    assert (out / "metrics.jsonl").read_text() == '{"step": 0}\n'
    with pytest.raises(UserError, match="no run to resume"):
        train(config_for(checkpoint), tmp_path / "empty", resume=True)


def test_a_folder_that_cannot_be_written_is_named(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory"):
        train(config_for(checkpoint), tmp_path / "file" / "run")


@pytest.mark.usefixtures("light_runs")
def test_a_first_try_that_failed_does_not_stand_in_the_way_of_the_next(checkpoint, tmp_path):
    with pytest.raises(UserError, match="kv_cache_bytes is 1"):
        train(config_for(checkpoint, {"sampling": {"engine": "vllm", "vllm": {"kv_cache_bytes": 1}}}), tmp_path / "run")
    assert train(config_for(checkpoint, SYMBOLIC, {"train": {"steps": 1}}), tmp_path / "run").step == 1


@pytest.mark.usefixtures("light_runs")
def test_a_run_does_not_go_on_with_another_soundfont(checkpoint, tmp_path, soundfont, monkeypatch):
    monkeypatch.setenv("FASTSMART_SOUNDFONT", str(soundfont))
    out = tmp_path / "run"
    train(config_for(checkpoint, {"train": {"steps": 1}}), out)
    record = json.loads((out / "run.json").read_text())
    record["inputs"]["soundfont"]["sha256"] = "0" * 64
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="begun with another soundfont"):
        train(config_for(checkpoint), out, resume=True, changes={"train.steps": 2})


def test_a_policy_that_falls_silent_is_still_concluded(checkpoint, tmp_path):
    summary = {"mean": 1.0, "std": 0.5}
    nothing = {"mean": None, "std": None}
    before = {"reward": summary, "terms": {}, "features": {"notes": summary}, "clips": 4, "empty": 0, "unscored": 0}
    after = {**before, "features": {"notes": nothing}, "empty": 4}
    assert "| notes | 1.000 ± 0.500 | – | – |" in before_after(before, after, 3)
    silent = {"sampling": {"max_tokens": 1}, "train": {"steps": 1, "listen": 0}}
    result = train(config_for(checkpoint, SYMBOLIC, silent), tmp_path / "run")
    assert result.after["empty"] == 4


def test_the_clips_of_an_evaluation_read_back(tmp_path):
    found = HeldOut(np.array([0, 1, 0]), {"reward": np.array([0.1, np.nan, 1e-17]), "term a, b": np.ones(3)})
    found.save(tmp_path / "held-out" / "before.csv")
    again = HeldOut.load(tmp_path / "held-out" / "before.csv")
    np.testing.assert_array_equal(again.opening, found.opening)
    assert list(again.table) == list(found.table)
    np.testing.assert_array_equal(list(again.table.values()), list(found.table.values()))
    assert HeldOut.load(tmp_path / "nothing.csv") is None
    (tmp_path / "bad.csv").write_text("opening,reward\n0,x\n")
    with pytest.raises(UserError, match=r"bad\.csv is damaged"):
        HeldOut.load(tmp_path / "bad.csv")


def test_weights_that_are_no_longer_finite_are_not_saved(checkpoint, tmp_path):
    wild = {"train": {"steps": 3, "learning_rate": 1e38, "save_every": 1, "eval_every": 0}}
    with pytest.raises(UserError, match="no longer finite"):
        train(config_for(checkpoint, SYMBOLIC, wild), tmp_path / "run")
    for saved in (tmp_path / "run").glob("checkpoints/step-*"):
        assert all(p.isfinite().all() for p in load_policy(saved).parameters())


def test_a_last_line_cut_short_by_a_crash_is_left_out(tmp_path):
    metrics = JsonLines(tmp_path / "metrics.jsonl")
    for step in (0, 1, 2):
        metrics.append({"step": step, "terms": {"a": float("nan")}})
    text = metrics.path.read_text()
    metrics.path.write_text(text + '{"step": 3, "terms": {"a": 1.0}')
    assert [line["step"] for line in metrics.lines()] == [0, 1, 2]
    assert metrics.lines()[0]["terms"] == {"a": None}
    metrics.forget_after(1)
    assert [line["step"] for line in metrics.lines()] == [0, 1]


def test_missing_audiobox_weights_are_said_before_anything_is_sampled(checkpoint, tmp_path):
    change = {"reward": {"terms": {"audiobox": 1.0}, "audiobox_checkpoint": str(tmp_path / "nowhere.pt")}}
    with pytest.raises(UserError, match=r"nowhere\.pt"):
        train(config_for(checkpoint, change), tmp_path / "run")


def test_presets_are_whole_configs():
    assert presets.demo().reward.terms["consonance"] > 0
    paper = presets.smart_paper()
    assert (paper.train.steps, paper.train.prompts * paper.sampling.group, paper.grpo.beta) == (200, 32, 0.04)
    assert (paper.grpo.loss, paper.grpo.ratio, paper.train.learning_rate) == ("bnpo", "one", 1e-4)
    released = presets.smart_released()
    assert (released.train.prompts * released.sampling.group, released.train.seed) == (64, 1)
    assert released.prompts.source == "procedural-note"
    h200 = presets.h200()
    assert h200.train.prompts * h200.sampling.group == h200.train.micro_batch == 64
    assert (h200.reward.terms, h200.prompts) == (released.reward.terms, released.prompts)
    assert replace(h200.grpo, ratio="one") == released.grpo
