"""The frontier: what is retained of reward and diversity, without joining what was measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fastsmart import UserError
from fastsmart.cli import main
from fastsmart.music.bootstrap import Estimate
from fastsmart.study.choosing import MEAN_DISTANCE
from fastsmart.study.evaluation import Evaluation
from fastsmart.study.frontier import MEASURES, Frontier, Point, hypervolume, most_retained

NAN = float("nan")


def test_the_hypervolume_is_the_area_that_a_fine_grid_counts():
    random = np.random.default_rng(0)
    for _ in range(5):
        points = [(float(x), float(y)) for x, y in random.uniform(-0.2, 1.3, (6, 2))]
        edges = np.linspace(0, 1.5, 1501)
        x, y = np.meshgrid((edges[:-1] + edges[1:]) / 2, 0.5 + (edges[:-1] + edges[1:]) / 2)
        under = np.any([(x < a) & (y < b) for a, b in points], axis=0)
        assert hypervolume(points) == pytest.approx(under.mean() * 1.5**2, abs=4e-3)


def test_what_dominates_nothing_beyond_the_reference_adds_nothing():
    assert hypervolume([]) == 0
    assert hypervolume([(1.0, 0.4), (-0.1, 0.9), (NAN, 1.0), (1.0, NAN)]) == 0
    assert hypervolume([(1.0, 1.0), (0.5, 0.9)]) == hypervolume([(1.0, 1.0)]) == 0.5


def test_the_readings_are_of_points_that_were_measured():
    shares = [(1.0, 0.6), (0.95, 0.91), (0.7, 0.95), (NAN, 1.0)]
    assert most_retained(shares, axis=0, least=0.9) == 1
    assert most_retained(shares, axis=1, least=0.9) == 1
    assert most_retained(shares, axis=0, least=0.99) == 3  # of which the reward is not known
    assert most_retained(shares[:3], axis=0, least=0.99) is None


def made_frontier() -> Frontier:
    def point(label, kind, reward, *diversity):
        values = {m: Estimate(d, d, d) for m, d in zip(MEASURES, diversity, strict=True)}
        return Point(label, kind, Estimate(reward, reward, reward), values)

    points = [
        point("base", "base", 5.0, 40, 8),
        point("beta-0", "policy", 7.0, 20, 4),
        point("varied", "policy", 6.9, 38, 7.4),
        point("alpha-0.5", "blend", 6.0, 39, 7.6),
        point("best of 4", "best of n", 6.0, 38, 7.0),
        point("re-weighting", "re-weighting", 6.2, NAN, 7.8),
    ]
    return Frontier(points, MEASURES, points[1], 308)


def test_shares_are_of_the_full_gain_and_of_the_base():
    found = made_frontier()
    assert found.retained(found.points[2], MEASURES[0]) == pytest.approx((0.95, 0.95))
    text = found.text().splitlines()
    assert any(line.startswith("beta-0 ") and "100%" in line and "50%" in line for line in text)
    policies, blends, best = (line for line in text[text.index("effective outputs:") + 1 :][:3])
    assert "most reward at diversity ≥ 90%: 95% (varied); most diversity at reward ≥ 90%: 95% (varied)" in policies
    assert "most reward at diversity ≥ 90%: 50% (alpha-0.5); most diversity at reward ≥ 90%: none" in blends
    assert "hypervolume 0.225" in best  # a gain of a half at 95 %
    assert not any("re-weighting" in line for line in text[text.index("effective outputs:") :][:4])
    assert any(line.startswith("  re-weighting:") for line in text)  # of embeddings there is one
    assert text[-1].endswith("of the gain and of every diversity above: varied")
    no_gain = replace(found, full=found.base)
    assert "–" in no_gain.text()


def test_a_real_evaluation_is_drawn_and_told(evaluation, tmp_path, capsys):
    for name in ("picture.svg", "picture.png"):
        assert main(["frontier", str(evaluation.path), "--out", str(tmp_path / name), "--full", "best of 2"]) == 0
    shown = capsys.readouterr().out
    assert "full gain: best of 2" in shown
    assert "best of n of the first" in (tmp_path / "picture.svg").read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    found = Frontier.of([evaluation], [MEAN_DISTANCE])
    assert [p.kind for p in found.points] == ["base", "policy", "best of n"]
    names = [f"rarefied_{name}_distance_across" for name in ("pitch_class", "onset", "move")]
    expected = np.mean([evaluation.metric("diversity", name).values["tuned"].value for name in names])
    assert found.points[1].diversity[MEAN_DISTANCE].value == pytest.approx(expected)


def changed(evaluation: Evaluation, folder, change) -> Evaluation:
    shutil.copytree(evaluation.path, folder)
    tree = json.loads((folder / "evaluation.json").read_text())
    change(tree)
    (folder / "evaluation.json").write_text(json.dumps(tree))
    return Evaluation.open(folder)


def test_several_evaluations_share_their_base_and_keep_their_policies_apart(evaluation, tmp_path):
    def more(tree):
        tree["policies"][1]["alpha"] = 0.5
        for metric in tree["metrics"]:
            if metric["name"] == "reward":
                metric["values"]["tuned"]["value"] += 0.5
        points = [{"wanted": 1.0, "reward": 1.5, "value": 2.5, "outputs": 4.0}]
        tree["reweighting"] = {MEASURES[1]: points}

    other = changed(evaluation, tmp_path / "other", more)
    found = Frontier.of([evaluation, other])
    assert [p.label for p in found.points] == ["base", "tuned", "best of 2", "other: tuned", "re-weighting"]
    assert [p.kind for p in found.points] == ["base", "policy", "best of n", "blend", "re-weighting"]
    weighted = found.points[-1]
    assert weighted.diversity[MEASURES[1]].value == 2.5
    assert np.isnan(weighted.diversity[MEASURES[0]].value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tree: tree.update(prompts=9), "differ in the number of prompts"),
        (lambda tree: tree["policies"][0].update(sha256="0"), "differ in the first policy"),
    ],
)
def test_evaluations_that_asked_something_else_are_refused(evaluation, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        Frontier.of([evaluation, changed(evaluation, tmp_path / "other", change)])


def test_what_the_frontier_cannot_show_is_one_sentence(evaluation, tmp_path, capsys):
    folder = str(evaluation.path)
    for options, says in (
        (["--measure", "vendi"], "has no measure vendi; choose of"),
        (["--full", "nobody"], "--full nobody is no point here"),
        (["--out", "x.jpg"], "names no picture"),
    ):
        assert main(["frontier", folder, *options]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    alone = changed(evaluation, tmp_path / "alone", lambda tree: tree.update(best_of=[], policies=tree["policies"][:1]))
    with pytest.raises(UserError, match="there is the base policy only"):
        Frontier.of([alone])
