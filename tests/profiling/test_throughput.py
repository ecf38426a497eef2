"""A bench takes the first steps of real runs in turn, and compares within a round."""

from __future__ import annotations

import json
import tomllib

import pytest
from small_run import write_config

from fastsmart.cli import main
from fastsmart.profiling.throughput import AS_ASKED, STAGES, summary


def bench(folder, *options):
    config = write_config(folder, "pop909-tiny", {"sampling": {"max_tokens": 20}})
    return main(["bench", "--config", str(config), "--out", str(folder / "out"), *options])


def test_contenders_take_turns_and_every_step_is_on_record(tmp_path, capsys):
    other = "train.pipeline=off sampling.group=2 train.steps=6 merge.runs=3"
    (tmp_path / "out" / "turns" / "0").mkdir(parents=True)  # left by one that was killed
    (tmp_path / "out" / "turns" / "0" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert bench(tmp_path, "--against", other, "--steps", "2", "--warmup", "1", "--rounds", "2") == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert list(found["contenders"]) == [AS_ASKED, other]
    asked, changed = found["contenders"].values()
    for each in (asked, changed):
        assert [len(steps) for steps in each["steps_s"]] == [2, 2]
        assert all(each["stage_s"][stage] > 0 for stage in STAGES)
        assert each["step_s"] > each["stage_s"]["update"]
        assert each["tokens_per_s"] > each["clips_per_s"] > 0
        assert each["provenance"]["inputs"]["soundfont"]["sha256"]
    assert asked["times_as_fast"] == [1.0, 1.0, 1.0]
    settings = tomllib.loads(changed["config"])
    assert (settings["train"]["pipeline"], settings["sampling"]["group"]) == ("off", 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[1:3]] == [AS_ASKED, other]


def lines(*steps):
    return [
        {"time": {"step": s, "update": s / 2, "tokens_per_s": 1.0, "clips_per_s": 1.0}, "health": {"rss_mb": 10 * s}}
        for s in steps
    ]


def test_ratios_are_of_medians_within_a_round():
    """The machine was three times slower in the second round, for both."""
    found = summary([lines(1.0, 2.0, 9.0), lines(6.0, 6.0, 6.0)], first=[4.0, 18.0])
    assert found["times_as_fast"] == [2.5, 2.0, 3.0]
    assert found["step_s"] == 6.0
    assert found["stage_s"] == {"sample": 0.0, "render": 0.0, "score": 0.0, "update": 3.0}
    assert found["rss_mb"] == 90.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--against", "train.pipelines=off"], "did you mean"),
        (["--against", "train.pipeline=of"], "train.pipeline"),
        (["--set", "reward.terms={}"], "reward.terms"),
    ],
)
def test_what_makes_no_sense_is_said(tmp_path, capsys, options, says):
    assert bench(tmp_path, *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
