"""What runs side by side changes no number: off = overlap, and one step off is what it says, resumed too."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_run import comparable, config_for
from synthetic_piano import write_piano
from tiny_soundfont import write_soundfont

from fastsmart import UserError, train
from fastsmart.audio import RenderSettings
from fastsmart.config import Config, merged
from fastsmart.machine.files import JsonLines
from fastsmart.policy.hf_format import load_policy

pytestmark = pytest.mark.usefixtures("light_runs")
MANY = {"train": {"prompts": 4, "score_batch": 4, "steps": 5, "eval_every": 3, "eval_prompts": 7, "save_every": 1}}
SHORT = {"sampling": {"max_tokens": 30}, "train": {"steps": 1, "eval_prompts": 2, "listen": 0}}


def run(checkpoint, out, pipeline, *changes):
    return train(config_for(checkpoint, MANY, {"train": {"pipeline": pipeline}}, *changes), out)


def weights(run):
    return list(load_policy(sorted(run.glob("checkpoints/step-*"))[-1]).parameters())


def test_off_and_overlap_are_one_trajectory(checkpoint, tmp_path):
    for mode in ("off", "overlap"):
        run(checkpoint, tmp_path / mode, mode, {"sampling": {"max_rows": 5}})
    assert comparable(tmp_path / "off") == comparable(tmp_path / "overlap")
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "off"), weights(tmp_path / "overlap"), strict=True))
    line = JsonLines(tmp_path / "overlap" / "metrics.jsonl").lines()[2]
    assert {"sample", "decode", "render", "score", "update", "sync"} <= line["time"].keys()
    assert line["time"]["idle"].keys() == {"sampler", "renderer", "scorer", "trainer"}
    assert all(0.0 <= share <= 1.0 for share in line["time"]["idle"].values())
    assert line["health"]["rss_mb"] > 0
    events = json.loads((tmp_path / "overlap" / "trace.json").read_text())["traceEvents"]
    lanes = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert sum(lane.startswith("render worker ") for lane in lanes) == 2
    clips = [e for e in events if e["name"] == "clip"]
    assert 0 < len(clips) <= 16 * 5 + 7 * 3
    steps = [e for e in events if e["name"] == "update"]
    begin, end = steps[0]["ts"] - 60e6, steps[-1]["ts"] + 60e6
    assert all(begin < clip["ts"] < end for clip in clips)


def test_one_step_off_learns_from_the_policy_of_the_step_before(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "on", "overlap")
    run(checkpoint, tmp_path / "ahead", "one-step-off")
    on, ahead = comparable(tmp_path / "on"), comparable(tmp_path / "ahead")
    assert [line["staleness"] for line in on[1:]] == [0, 0, 0, 0, 0]
    assert [line["staleness"] for line in ahead[1:]] == [0, 1, 1, 1, 1]
    assert ahead[:2] == on[:2]  # the first step has no step before
    # the second batch was drawn by the first policy, the ratio says so
    assert on[2]["logprob_gap_max"] < 1e-4 < ahead[2]["logprob_gap_max"]
    assert ahead[2]["terms"] != on[2]["terms"]


def test_one_step_off_resumed_is_one_never_stopped(checkpoint, tmp_path):
    """From each of its checkpoints, of which some fall on an evaluation: with the policy of the step before."""
    whole = tmp_path / "whole"
    run(checkpoint, whole, "one-step-off", {"train": {"keep": 5}})
    for step in (1, 3, 4):
        again = tmp_path / f"again-{step}"
        shutil.copytree(whole, again, symlinks=True)
        for later in range(step + 1, 6):
            shutil.rmtree(again / "checkpoints" / f"step-{later:06d}")
        train(config_for(checkpoint), again, resume=True)
        assert comparable(again) == comparable(whole)
        assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))


def test_stale_batches_are_dropped_counted_and_drawn_again(checkpoint, tmp_path, monkeypatch):
    """An engine that was not given the new weights, as a lost weight transfer would leave it."""
    from fastsmart.trainer.rollout_worker import RolloutScheduler

    take, lost = RolloutScheduler.sync_weights, []

    def forgetful(self, policy, version):
        if version == 2 and not lost:
            lost.append(version)
            return
        take(self, policy, version)

    monkeypatch.setattr(RolloutScheduler, "sync_weights", forgetful)
    run(checkpoint, tmp_path / "run", "one-step-off")
    monkeypatch.undo()
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl").lines()
    assert [line["health"].get("stale_dropped", 0) for line in lines] == [0, 0, 0, 0, 16, 0]
    assert [line["staleness"] for line in lines[1:]] == [0, 1, 1, 0, 1]


def test_one_step_off_refuses_a_ratio_that_takes_it_for_on_policy():
    with pytest.raises(UserError, match=r"grpo\.ratio must be 'behaviour'"):
        merged(Config(), {"train": {"pipeline": "one-step-off"}, "grpo": {"ratio": "one"}})
    with pytest.raises(UserError, match=r"train\.max_staleness is 0"):
        merged(Config(), {"train": {"max_staleness": 0}})


def test_clips_mixed_on_the_policys_device_are_worth_the_same(checkpoint, tmp_path, monkeypatch):
    """On a CPU by the kernel's twin; a line of metrics, and the provenance, say where clips have been mixed."""
    font = {"audio": {"soundfont": str(write_soundfont(tmp_path / "tiny.sf2")), "max_seconds": 1.5}}
    run(checkpoint, tmp_path / "pool", "overlap", SHORT, font)
    monkeypatch.setattr("fastsmart.trainer.rollout_worker.mixes_on_gpu", lambda config, device: True)
    run(checkpoint, tmp_path / "off", "off", SHORT, font)
    run(checkpoint, tmp_path / "overlap", "overlap", SHORT, font)
    assert comparable(tmp_path / "off") == comparable(tmp_path / "overlap")
    lines = {name: JsonLines(tmp_path / name / "metrics.jsonl").lines() for name in ("pool", "overlap")}
    for pool, gpu in zip(lines["pool"], lines["overlap"], strict=True):
        assert pool.get("terms") == pytest.approx(gpu.get("terms"), abs=1e-5)
        assert (pool["time"].get("gpu_mixed", 0), gpu["time"].get("gpu_mixed", 16)) == (0, 16)
    for name, mixdown in (("pool", "cpu"), ("overlap", "gpu")):
        assert json.loads((tmp_path / name / "run.json").read_text())["mixdown"] == mixdown


@pytest.mark.gpu
def test_on_a_gpu_clips_are_mixed_there(checkpoint, tmp_path):
    """With formula rewards, which fetch the audio; from a bank that needs no FluidSynth."""
    font = write_piano(tmp_path, RenderSettings(max_seconds=1.5)).soundfont
    for name, mixdown in (("gpu", "auto"), ("pool", "cpu")):
        audio = {"audio": {"soundfont": font, "max_seconds": 1.5, "mixdown": mixdown}}
        run(checkpoint, tmp_path / name, "overlap", SHORT, audio)
    gpu, pool = (JsonLines(tmp_path / name / "metrics.jsonl").lines() for name in ("gpu", "pool"))
    assert gpu[1]["time"]["gpu_mixed"] == 16
    assert gpu[1]["terms"] == pytest.approx(pool[1]["terms"], abs=1e-4)


def test_a_mixdown_on_a_gpu_needs_one(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"audio\.mixdown = 'gpu' needs policy\.device"):
        run(checkpoint, tmp_path / "run", "overlap", {"audio": {"mixdown": "gpu"}, "policy": {"device": "cpu"}})
