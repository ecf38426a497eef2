"""Sweeps: what a file asks for, that a stopped one goes on, and that jobs of an array end where one machine does."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from tiny_policy import make_policy

from fastsmart import UserError
from fastsmart.cli import main
from fastsmart.policy.hf_format import save_policy
from fastsmart.study.evaluation import Evaluation
from fastsmart.study.sweep import read_sweep

SWEEP = """
preset = "demo"
prompts = 4
best_of = 2
set = [
    "policy.source={policy}", "sampling.group=2", "sampling.max_tokens=40", "reward.terms={{variety=1}}",
    "train.steps=2", "train.prompts=2", "train.eval_prompts=2", "train.eval_every=0", "train.listen=0",
]
[grid]
"grpo.beta" = [0.0, 0.5]
[[runs]]
name = "longer"
set = ["train.steps=3"]
"""


@pytest.fixture
def sweep(vocab, tmp_path):
    save_policy(make_policy(vocab), tmp_path / "tiny")
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.format(policy=tmp_path / "tiny"))
    return path


def test_a_sweep_is_a_grid_and_a_list(sweep, capsys):
    plan = read_sweep(sweep)
    assert list(plan.runs) == ["beta-0.0", "beta-0.5", "longer"]
    assert [c.grpo.beta for c in plan.runs.values()] == [0.0, 0.5, 0.04]
    assert [c.train.steps for c in plan.runs.values()] == [2, 2, 3]
    assert (plan.prompts, plan.best_of) == (4, 2)
    assert main(["sweep", str(sweep), "--out", "nowhere", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "2  longer: 3 steps"


@pytest.mark.usefixtures("light_runs")
def test_a_sweep_trains_compares_and_draws_and_does_nothing_twice(sweep, tmp_path, capsys, monkeypatch):
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "s")]) == 0
    found = Evaluation.open(tmp_path / "s" / "evaluation")
    assert found.labels == ["tiny", "beta-0.0", "beta-0.5", "longer", "best of 2"]
    for name in ("changes", "frontier", "diversity", "distributions", "rolls"):
        picture = ElementTree.parse(tmp_path / "s" / "figures" / f"{name}.svg").getroot()
        assert "--series-1" in (picture[0].text or "")  # brings its own colours
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5 + 3  # and the curves of each run
    capsys.readouterr()
    written = (tmp_path / "s" / "runs" / "longer" / "metrics.jsonl").stat().st_mtime_ns
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "s")]) == 0
    assert "sampling" not in capsys.readouterr().err
    assert (tmp_path / "s" / "runs" / "longer" / "metrics.jsonl").stat().st_mtime_ns == written
    sweep.write_text(sweep.read_text().replace("0.5]", "0.5, 0.7]").replace("train.steps=2", "train.steps=1"))
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "s")]) == 2
    assert "other settings" in capsys.readouterr().err

    # the same as jobs of an array, in any order: the last one compares, and writes a page like the one above
    pages = []
    monkeypatch.setattr("fastsmart.study.sweep.write_report", lambda found, path, **_: pages.append(path))
    sweep.write_text(SWEEP.format(policy=tmp_path / "tiny"))
    for index in (2, 0, 1):
        assert not (tmp_path / "a" / "figures" / "frontier.svg").exists()
        assert main(["sweep", str(sweep), "--out", str(tmp_path / "a"), "--index", str(index)]) == 0
    assert pages == [tmp_path / "a" / "report.html"]
    one, array = (json.loads((tmp_path / f / "evaluation" / "evaluation.json").read_text()) for f in ("s", "a"))
    assert one["metrics"] == array["metrics"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stepz = 3", "unknown key stepz"),
        ("preset = 'demo'", "no run to make"),
        ("[grid]\n'grpo.beta' = 3", "must be a list"),
        ("[grid]\n'grpo.bta' = [3]", "did you mean grpo.beta?"),
        ("[[runs]]\nname = 'a/b'\nset = []", "cannot name a policy"),
        ("[[runs]]\nname = 'a'", "needs a name"),
        ("prompts = 1\n[grid]\n'grpo.beta' = [0]", "prompts is 1"),
        ("= 3", "not valid TOML"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, text, says):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UserError, match=rf"s\.toml.*{says}"):
        read_sweep(tmp_path / "s.toml")
    with pytest.raises(UserError, match="cannot read"):
        read_sweep(tmp_path / "none.toml")


def test_an_index_beyond_the_runs_is_refused(sweep, tmp_path, capsys):
    assert main(["sweep", str(sweep), "--out", str(tmp_path / "s"), "--index", "3"]) == 2
    assert "runs 0 to 2" in capsys.readouterr().err


def test_a_grid_varies_flags_lists_policies_and_soundfonts(tmp_path):
    (tmp_path / "s.toml").write_text(
        """
        [grid]
        "sampling.cuda_graph" = [true, false]
        "policy.source" = ["pop909-tiny", "runs/a", "old/a"]
        "audio.soundfont" = ["/usr/share/x y=1.sf2"]
        "prompts.time_signatures" = [["4/4"], ["3/4", "6/8"]]
        "reward.terms" = [{ variety = 1.0 }]
        "train.betas" = [[0.9, 0.95]]
        """
    )
    runs = read_sweep(tmp_path / "s.toml").runs
    assert len(runs) == 12
    name = "cuda_graph-false_source-a.2_soundfont-x y-1.sf2_time_signatures-3-4+6-8_terms-variety-1.0_betas-0.9+0.95"
    config = runs[name]
    assert not config.sampling.cuda_graph
    assert config.policy.source == "old/a"
    assert config.audio.soundfont == "/usr/share/x y=1.sf2"
    assert config.prompts.time_signatures == ("3/4", "6/8")
    assert config.reward.terms == {"variety": 1.0}
    assert config.train.betas == (0.9, 0.95)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[grid]\n" + "\n".join(f"'k{i}' = {list(range(10))}" for i in range(9)), "at most 10,000"),
        ("[[runs]]\nname = 'a=b'\nset = []", "'a=b' cannot name"),
        ("[[runs]]\nname = ''\nset = []", "'' cannot name"),
        (f"[[runs]]\nname = '{'x' * 300}'\nset = []", "cannot name"),
        ("[grid]\n'train.steps' = [1979-05-27]", "train.steps"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_named(tmp_path, text, says):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UserError, match=rf"s\.toml.*{says}"):
        read_sweep(tmp_path / "s.toml")
