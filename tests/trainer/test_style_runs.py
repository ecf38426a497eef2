"""A run that asks for styles: what it pays for, what it writes, and what an evaluation says of it."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_run import config_for
from styled_pieces import STYLES, styled_clips
from tiny_policy import make_policy

from fastsmart.cli import main
from fastsmart.errors import UserError
from fastsmart.machine.distributed import Ranks
from fastsmart.music.style_forest import FOREST_FILE, grow_forest
from fastsmart.music.styles import JUDGE_FILE, fit_judge
from fastsmart.notes import NoteBatch
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.reward import Scores
from fastsmart.run.folder import PROVENANCE_FILE
from fastsmart.run.top import Top
from fastsmart.sampling import sample
from fastsmart.study.evaluate import evaluate
from fastsmart.study.report import write_report
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.styles import Styles
from fastsmart.trainer.batch import micro_batches
from fastsmart.trainer.loop import train
from fastsmart.trainer.style_metrics import StyleControl, divergences, styles_of_step
from fastsmart.trainer.update import reference_logprobs

ASKED = {
    "prompts": {"styles": list(STYLES)},
    "reward": {"terms": {"style_margin": 1.0, "variety": 1.0}, "normalize": "none"},
    "train": {"steps": 2, "eval_every": 0, "listen": 0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, vocab):
    """A tiny policy that knows two styles, and its judges."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    styles = Styles(tuple(zip(STYLES, ("INF1_None", "INF2_None"), strict=True)))
    save_policy(make_policy(replace(vocab, styles=styles)), folder)
    notes = NoteBatch.concat([styled_clips(style, range(20)) for style in STYLES])
    named = [style for style in STYLES for _ in range(20)]
    fit_judge(notes, named, notes, named).save(folder / JUDGE_FILE)
    grow_forest(notes, named, trees=4).save(folder / FOREST_FILE)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    train(config_for(base, ASKED), folder)
    return folder


def test_metrics_say_reward_and_divergence_of_each_style(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    assert len(steps) == 2
    for line in steps:
        assert list(line["styles"]) == sorted(STYLES)
        rewards = [of["reward"] for of in line["styles"].values()]
        assert np.mean(rewards) == pytest.approx(line["reward"], rel=1e-5)  # as many completions of each
        assert "style_margin" in line["terms"]
    # the policy of the first step is the reference
    assert all(abs(of["kl_per_completion"]) < 1e-2 for of in steps[0]["styles"].values())
    assert any(abs(of["kl_per_completion"]) > 1e-2 for of in steps[1]["styles"].values())
    shown = Top(run)
    from rich.console import Console

    console = Console(width=120, record=True)
    console.print(shown.render())
    text = console.export_text()
    assert all(f"{what} of {style}" in text for what in ("reward", "kl") for style in STYLES)


def test_rounds_say_the_reward_of_each_style(base, tmp_path):
    rounds = {"prompts": 4, "round_steps": 2, "pairs": 2, "fewest_notes": 0}
    train(config_for(base, ASKED, {"train": {"algorithm": "dpo", "prompts": 2}, "dpo": rounds}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if "reward" in line)
    assert list(line["styles"]) == sorted(STYLES)
    assert np.mean([of["reward"] for of in line["styles"].values()]) == pytest.approx(line["reward"], rel=1e-5)


def test_divergence_beyond_what_a_style_may_have_costs_advantage_within_its_group(base):
    config = config_for(base, ASKED, {"diversity": {"style_kl": 2.0}, "train": {"prompts": 2}})
    control = StyleControl(config, load_policy(base).vocab, Ranks())
    size = config.sampling.group
    random = np.random.default_rng(0)
    batch = SimpleNamespace(
        group=np.repeat([0, 1], size),
        mine=range(2 * size),
        scores=Scores({}, random.normal(size=2 * size).astype(np.float32)),
    )
    advantage = torch.from_numpy(random.normal(size=2 * size).astype(np.float32))
    divergence = np.concatenate([random.normal(6.0, 1.0, size), random.normal(1.0, 1.0, size)])
    assert torch.equal(control.less_divergence(advantage, divergence, batch, 0), advantage)  # no weight yet
    first = control.metrics(batch, divergence, 0)
    assert {row["kl_weight"] for row in first.values()} == {0.0}
    for _ in range(4):
        table = control.metrics(batch, divergence, 0)
    far, near = STYLES[0], STYLES[1]
    assert table[far]["kl_weight"] > 1.0
    assert table[near]["kl_weight"] == 0.0  # it is nearer than it may be
    penalised = control.less_divergence(advantage, divergence, batch, 0).numpy() - advantage.numpy()
    assert abs(penalised[:size].sum()) < 1e-5
    assert not penalised[size:].any()
    weight = control.controllers[far].weight / 2.0
    assert penalised[:size] == pytest.approx(-weight * (divergence[:size] - divergence[:size].mean()), abs=1e-5)
    again = StyleControl(config, control.vocab, Ranks(), json.loads(json.dumps(control.state)))
    assert again.controllers == control.controllers


def test_a_run_whose_styles_are_kept_near_resumes_with_the_same_numbers(base, tmp_path):
    kept = {"diversity": {"style_kl": 1e-3}, "train": {"steps": 4, "save_every": 2}}
    config, whole, cut = config_for(base, ASKED, kept), tmp_path / "whole", tmp_path / "cut"
    train(config, whole)
    shutil.copytree(whole, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    train(config, cut, resume=True)
    lines = [
        [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "reward" in line]
        for run in (whole, cut)
    ]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    assert [line["styles"] for line in lines[1]] == [line["styles"] for line in lines[0]]
    assert [line["grad_norm"] for line in lines[1]] == [line["grad_norm"] for line in lines[0]]
    assert max(row["kl_weight"] for row in lines[0][-1]["styles"].values()) > 0


def test_what_a_style_may_have_needs_styles_and_an_algorithm_that_reads_it(base):
    with pytest.raises(UserError, match=r"name them in prompts\.styles"):
        config_for(base, ASKED, {"diversity": {"style_kl": 2.0}, "prompts": {"styles": []}})
    with pytest.raises(UserError, match="not 'dpo'; leave it out"):
        config_for(base, ASKED, {"diversity": {"style_kl": 2.0}, "train": {"algorithm": "dpo"}})


def test_provenance_names_the_judge_and_checkpoints_keep_their_styles(run, base):
    inputs = json.loads((run / PROVENANCE_FILE).read_text())["inputs"]
    assert inputs["style_judge"]["path"] == str(base / JUDGE_FILE)
    assert load_policy(run).vocab.styles == load_policy(base).vocab.styles


def test_divergence_is_the_sum_of_log_ratios_whatever_the_order(base):
    config, policy = config_for(base, ASKED), load_policy(base)
    prompts = make_prompts(config.prompts, policy.vocab, "train", 0, 4)
    rollout = sample(policy, prompts, 3, 20)
    other = make_policy(policy.vocab, seed=5)
    batches = list(micro_batches(rollout, 5, torch.device("cpu")))
    found = divergences(batches, reference_logprobs(other, batches, 1.0, torch.float32))
    for i in range(len(rollout)):
        ids = torch.from_numpy(rollout.sequence(i).astype(np.int64))[None]
        with torch.no_grad():
            logprobs = other(ids[:, :-1]).log_softmax(-1)[0]
        start = int(rollout.prompt_lengths[i]) - 1
        reference = logprobs[torch.arange(len(logprobs)), ids[0, 1:]][start:].sum()
        assert found[i] == pytest.approx(float(rollout.logprobs[i, : rollout.lengths[i]].sum() - reference), abs=1e-3)


def test_every_completion_of_a_step_has_the_style_of_its_prompt(base):
    config = config_for(base, ASKED, {"train": {"prompts": 3}})
    vocab = load_policy(base).vocab
    expected = [STYLES[number % 2] for number in range(3, 6) for _ in range(config.sampling.group)]
    assert styles_of_step(config, vocab, 1) == expected


def test_an_evaluation_tells_how_styles_are_heard(run, base, tmp_path):
    config = config_for(base, ASKED)
    found = evaluate(["base=" + str(base), "tuned=" + str(run)], tmp_path / "e", config, 12, 0)
    names = {m.name for m in found.metrics if m.group == "style"}
    assert "bits between asked and heard, judge" in names
    assert "bits between asked and heard, second judge" in names
    assert {f"{style} heard as asked, judge" for style in STYLES} <= names
    values = {m.name: m.values["tuned"].value for m in found.metrics if m.group == "style"}
    reward = next(m for m in found.metrics if m.name == "reward").values["tuned"].value
    assert np.mean([values[f"reward of {style}"] for style in STYLES]) == pytest.approx(reward, rel=1e-5)
    assert all(1.0 <= values[f"effective outputs within {style}"] <= 12 for style in STYLES)
    assert not any(name.startswith("distance of") for name in names)  # this judge knows no real windows
    table = np.array(found.record["styles"]["tuned"]["judge"]["confusion"])
    np.testing.assert_allclose(table.sum(1), 1.0, atol=1e-3)
    page = write_report(found, tmp_path / "report.html", players=0).read_text()
    assert "Styles asked for and heard" in page
    assert "tuned: styles asked for, down, and heard by the second judge, across" in page
    heard = re.findall(r"<h3>Prompt \d+: (\w+)", write_report(found, tmp_path / "heard.html").read_text())
    assert sorted(heard) == sorted(list(STYLES) * 3)


def test_sample_asks_for_styles_in_turn(base, tmp_path, capsys):
    plain = ["sample", "--policy", str(base), "--out", str(tmp_path), "-n", "4", "--max-tokens", "20"]
    assert main([*plain, "--style", "march", "--style", "drone"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1].split(",")[0] for line in said] == ["march", "drone"] * 2
    assert main([*plain, "--style", "waltz"]) == 2
    assert "--style 'waltz' is no style of this policy; the policy knows drone, march" in capsys.readouterr().err
    assert main(["sample", "--policy", "pop909-tiny", "--out", str(tmp_path), "--style", "march"]) == 2
    assert "--style asks for march, and the policy knows no styles" in capsys.readouterr().err


def test_the_margin_needs_a_judge(tmp_path, vocab):
    save_policy(make_policy(vocab), tmp_path / "plain")
    with pytest.raises(UserError, match=r"name one with reward\.style_judge"):
        train(config_for(tmp_path / "plain", ASKED, {"prompts": {"styles": []}}), tmp_path / "run")
