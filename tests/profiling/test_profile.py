"""A profile: the run's own steps, every second accounted for, on a page that needs nothing else."""

from __future__ import annotations

import json
import re

import pytest
from small_run import comparable, config_for, write_config

from fastsmart import train
from fastsmart.cli import main
from fastsmart.profiling.analysis import ELSEWHERE, GPU, OUTSIDE, Interval, Memory, Operator, ProfiledSteps, summary
from fastsmart.profiling.profile import profile

pytestmark = pytest.mark.usefixtures("light_runs")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A profile by the command, and its figures."""
    folder = tmp_path_factory.mktemp("profile")
    config = write_config(folder, "pop909-tiny", {"sampling": {"max_tokens": 20}})
    options = ["--config", str(config), "--out", str(folder / "out"), "--steps", "2", "--warmup", "1"]
    assert main(["profile", *options]) == 0
    return folder / "out", json.loads((folder / "out" / "profile.json").read_text())


def test_the_page_needs_nothing_from_outside_and_names_the_costs(profiled):
    out, found = profiled
    page = (out / "profile.html").read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|xlink:href|data|action)\s*=\s*["']([^"']{0,40})""", page)
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"@import|url\((?!#)|<script", page)
    assert len(found["costs"]) == 3
    assert all(cost["what"].replace("'", "&#39;") in page for cost in found["costs"])
    assert page.count("<svg") == 2


def test_the_trace_holds_stages_and_operators_on_one_clock(profiled):
    out, found = profiled
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    stages = [e for e in spans if names.get((e["pid"], e["tid"])) in ("sampler", "renderer", "scorer", "trainer")]
    whole_us = sum(step["seconds"] for step in found["steps"]) * 1e6
    assert sum(e["dur"] for e in stages) > 0.5 * whole_us
    assert {"sample", "render", "score", "update"} <= {e["name"] for e in stages}
    updates = [e for e in stages if e["name"] == "update"]
    forwards = [e for e in spans if e["name"] == "forward"]
    assert len(updates) == 2
    assert forwards
    for e in forwards:  # each lies within an update, to the precision of the two clocks
        assert any(u["ts"] - 2e3 < e["ts"] and e["ts"] + e["dur"] < u["ts"] + u["dur"] + 2e3 for u in updates)
    assert any(e["ph"] == "C" and e["name"].startswith("memory") for e in events)


def test_operators_of_every_thread_are_there_and_add_up_to_the_stages(profiled):
    _, found = profiled
    rows = found["operators"]
    assert any(row["name"] in ("aten::mm", "aten::addmm") and row["phase"] == "backward" for row in rows[:20])
    assert {row["phase"] for row in rows if row["stage"] == "update"} >= {
        "reference",
        "forward",
        "backward",
        "optimizer",
    }
    assert all(row["seconds"] > -1e-6 for row in rows)
    for stage in ("sample", "score", "update"):
        seconds = sum(row["seconds"] for row in rows if row["stage"] == stage)
        assert seconds == pytest.approx(found["stages"][stage]["seconds"], rel=0.02)
    assert all(0 <= share <= 1 for share in found["idle"].values())
    busy = (1 - found["idle"]["trainer"]) * found["step_s"]
    assert busy == pytest.approx(found["stages"]["update"]["seconds"], rel=1e-6)


def test_gaps_and_work_of_a_resource_fill_the_step(profiled):
    _, found = profiled
    gaps = [gap for gap in found["gaps"] if gap["resource"] == "trainer"]
    assert sum(gap["seconds"] for gap in gaps) == pytest.approx(
        found["idle"]["trainer"] * sum(step["seconds"] for step in found["steps"]), abs=0.01
    )
    assert gaps[0]["after"] == "begin of the step"
    assert gaps[0]["before"] == "update"


@pytest.mark.parametrize("pipeline", ["overlap", "one-step-off"])
def test_a_profile_changes_no_number(checkpoint, tmp_path, pipeline):
    config = config_for(checkpoint, {"train": {"pipeline": pipeline, "eval_every": 0}})
    train(config, tmp_path / "run")
    found = profile(config, tmp_path / "profile", steps=2, warmup=2)
    assert comparable(tmp_path / "profile") == comparable(tmp_path / "run")[1:5]
    assert not (tmp_path / "profile" / "checkpoints").exists()
    assert found["unprofiled_step_s"] > 0
    assert (found["steps"][0]["name"], len(found["steps"])) == ("step 3", 2)


def test_what_is_no_profile_is_left_alone_and_a_profile_is_no_run(profiled, tmp_path, capsys):
    out, _ = profiled
    (tmp_path / "mine.txt").write_text("mine")
    demo = ["profile", "--preset", "demo"]
    for options, sentence in [
        ([*demo, "--out", str(tmp_path)], "holds something else than a profile"),
        ([*demo, "--out", str(tmp_path / "mine.txt")], "cannot write"),
        ([*demo, "--out", str(tmp_path / "p"), "--steps", "0"], "--steps is 0; it must be at least 1"),
        ([*demo, "--out", str(tmp_path / "p"), "--warmup", "-1"], "--warmup is -1"),
        ([*demo, "--out", str(tmp_path / "p"), "--steps", "40"], "more than the 40 of train.steps"),
        (["profile", "--out", str(tmp_path / "p")], "names no reward"),
        (["train", "--out", str(out), "--resume"], "holds a profile, not a run"),
        (["train", "--preset", "demo", "--out", str(out)], "holds a profile, not a run"),
        (["report", str(out)], "holds a profile, not a run"),
    ]:
        assert main(options) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_own_times_phases_gaps_and_kernels_by_hand():
    """Two threads and a GPU for one step of ten seconds."""
    scorer, trainer, engine = 1, 2, 3
    spans = [
        (Interval("score", 1.0, 3.0), "scorer", scorer),
        (Interval("update", 4.0, 9.0), "trainer", trainer),
        (Interval("reduce", 8.0, 8.5), "network", trainer),
    ]
    operators = [
        Operator("forward", 4.0, 6.0, trainer, annotation=True),
        Operator("aten::linear", 4.5, 5.5, trainer, number=7),
        Operator("aten::mm", 4.5, 5.25, trainer, number=8),
        Operator("autograd::engine::evaluate_function: MmBackward0", 6.0, 8.0, engine),
        Operator("aten::mm", 6.5, 7.5, engine, number=9),
        Operator("aten::mul", 9.5, 9.75, trainer),
        Operator("sgemm", 5.0, 6.0, -1, number=8),
        Operator("sgemm", 7.0, 7.5, -1, number=9),
    ]
    found = summary(ProfiledSteps([Interval("step 1", 0.0, 10.0)], spans, operators, [Memory(1.0, 100.0)]))
    own = {(r["stage"], r["phase"], r["name"]): r["seconds"] for r in found["operators"]}
    assert own == {
        ("score", "", OUTSIDE): pytest.approx(2.0),
        ("update", "forward", OUTSIDE): pytest.approx(1.0),
        ("update", "forward", "aten::linear"): pytest.approx(0.25),
        ("update", "forward", "aten::mm"): pytest.approx(0.75),
        ("update", "backward", "autograd::engine::evaluate_function: MmBackward0"): pytest.approx(1.0),
        ("update", "backward", "aten::mm"): pytest.approx(1.0),
        ("update", "", OUTSIDE): pytest.approx(2.5),
        ("reduce", "", OUTSIDE): pytest.approx(0.5),
        (ELSEWHERE, "", "aten::mul"): pytest.approx(0.25),
    }
    kernels = {(r["phase"], r["name"]): r["seconds"] for r in found["kernels"]}
    assert kernels == {("forward", "sgemm"): pytest.approx(1.0), ("backward", "sgemm"): pytest.approx(0.5)}
    assert found["idle"] == {"scorer": pytest.approx(0.8), "trainer": pytest.approx(0.5), GPU: pytest.approx(0.85)}
    everyone = [(g["after"], g["before"], g["seconds"]) for g in found["gaps"] if g["resource"] == "all"]
    assert sorted(everyone) == [
        ("begin of the step", "score", pytest.approx(1.0)),
        ("score", "update", pytest.approx(1.0)),
        ("update", "end of the step", pytest.approx(1.0)),
    ]
    scoring = next(g for g in found["gaps"] if g["resource"] == "scorer")
    assert (scoring["seconds"], scoring["meanwhile"]) == (pytest.approx(7.0), ["update"])


def test_a_render_span_takes_no_time_from_what_its_thread_does_meanwhile():
    """The pool renders from 1 s on; the thread that collects the clips at 4 s has sampled until 3."""
    spans = [
        (Interval("sample", 0.0, 3.0), "sampler", 1),
        (Interval("render", 1.0, 4.0), "renderer", 1),
        (Interval("score", 4.0, 5.0), "scorer", 1),
    ]
    found = summary(ProfiledSteps([Interval("step 1", 0.0, 5.0)], spans, [], []))
    seconds = {row["stage"]: row["seconds"] for row in found["operators"]}
    assert seconds == {"sample": 3.0, "render": 1.0, "score": 1.0}
