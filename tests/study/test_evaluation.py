"""`fastsmart evaluate`: what it writes, what it compares, and that it plays nothing twice."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from tiny_policy import make_policy
from tiny_soundfont import write_soundfont

from fastsmart import Config, UserError
from fastsmart.cli import main
from fastsmart.config import merged, to_toml
from fastsmart.music.diversity import DIVERSITY
from fastsmart.music.rarefied import RAREFIED
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.study.choosing import choosing_tables
from fastsmart.study.evaluate import OutputStore, evaluate, labelled
from fastsmart.study.evaluation import Evaluation
from fastsmart.study.outputs import Player, best_of_counts
from fastsmart.study.report import write_report
from fastsmart.trainer.evaluate import TABLE_FEATURES

SMALL = {
    "prompts": {"time_signatures": ["4/4"]},
    "sampling": {"max_tokens": 60},
    "reward": {"terms": {"variety": 1.0, "filled_beats": 2.0}},
}
N = 12


@pytest.fixture
def two(vocab, tmp_path):
    """Two policies, and a config of rewards that need no sound."""
    for seed in (0, 1):
        save_policy(make_policy(vocab, seed), tmp_path / f"p{seed}")
    return [str(tmp_path / "p0"), str(tmp_path / "p1")], merged(Config(), SMALL), tmp_path


def test_an_evaluation_is_whole_and_reads_back(two):
    sources, config, folder = two
    stages = []
    found = evaluate(sources, folder / "e", config, N, 3, progress=lambda *news: stages.append(news))
    assert found.labels == ["p0", "p1", "best of 3"]
    assert found.text().splitlines()[-1].startswith("of each policy 12 outputs on 8 held-out openings; 95 % bootstrap")
    assert {"p0: sampling", "p1: scoring on notes", "best of 3: sampling", "measuring"} <= {s for s, *_ in stages}
    assert all(found.metric("feature", name) for name in TABLE_FEATURES)
    assert all(found.metric("diversity", name) for name in DIVERSITY)
    assert {m.name for m in found.diversity()} == set(RAREFIED)
    pieces = {"rarefied_new_ngrams", "rarefied_training_distance"}  # the evaluation was given none
    unknown = {m.name for m in found.diversity() if not all(np.isfinite(e.value) for e in m.values.values())}
    alone = {name for name in RAREFIED if name.endswith("_within")}  # where no two prompts are equal
    assert unknown == (pieces | alone if found.record["distinct_prompts"] == N else pieces)
    for what, lengths in (("32 notes", "notes"), ("128 tokens", None)):
        share = found.metric("share", f"outputs of fewer than {what}").values["p0"].value
        outputs = found.outputs("p0")
        held = outputs.notes(found.vocab, config.audio.max_seconds).counts if lengths else outputs.completions.lengths
        assert share == pytest.approx(np.mean(held < int(what.split()[0])))
    assert found.record["compared"]["notes"] == 32
    assert [p["n"] for p in found.record["best_of"]] == [2, 3]
    for point in found.record["best_of"]:
        for name in ("effective_outputs", "effective_outputs_order_2", "effective_embeddings_order_2"):
            e = point["diversity"][f"rarefied_{name}"]
            assert e["low"] <= e["value"] <= e["high"]
    assert found.record["best_of"][1]["notes"]["value"] == found.metric("feature", "notes").values["best of 3"].value
    (table,) = choosing_tables(found)  # of so few outputs there is no re-weighting
    assert [row[0] for row in table["rows"]] == ["2", "3"]
    assert len(table["head"]) == len(table["rows"][0]) == 7
    for metric in found.metrics:
        for e in metric.values.values():
            assert np.isnan(e.value) or e.low - 1e-6 <= e.value <= e.high + 1e-6, metric.name
        assert list(metric.changes) == ["p1", "best of 3"]
    rows = list(csv.DictReader((folder / "e" / "clips.csv").read_text().splitlines()))
    assert len(rows) == 3 * N
    mean = np.mean([float(r["variety on notes"]) for r in rows if r["policy"] == "p1"])
    assert found.metric("reward", "variety").values["p1"].value == pytest.approx(mean, rel=1e-4)
    table = list(csv.DictReader((folder / "e" / "metrics.csv").read_text().splitlines()))
    assert len(table) == 3 * len(found.metrics)


def test_the_same_policy_twice_differs_in_nothing(two):
    sources, config, folder = two
    found = evaluate([f"a={sources[0]}", f"b={sources[0]}"], folder / "e", config, N, 0)
    for metric in found.metrics:
        change = metric.changes["b"]
        assert np.isnan(change.value) or change.value == change.low == change.high == 0, metric.name


def test_outputs_and_scores_do_not_depend_on_how_many_are_played_at_once(two, monkeypatch):
    sources, config, _ = two
    policy, found = load_policy(sources[0]), []
    for at_once in (256, 8, 4):
        monkeypatch.setattr("fastsmart.study.outputs.CLIPS_AT_ONCE", at_once)
        player = Player(config, {}, "cpu")
        found += [player.play(policy, N, lambda *_: None), player.best_of(policy, N, 3, lambda *_: None)[3]]
    for first, other in zip(found[:2] * 2, found[2:], strict=True):
        np.testing.assert_array_equal(first.prompts.ids, other.prompts.ids)
        np.testing.assert_array_equal(first.completions.ids, other.completions.ids)
        np.testing.assert_array_equal(first.scores["notes"].total, other.scores["notes"].total)


def test_best_of_n_is_the_best_of_n(two):
    sources, config, folder = two
    store = OutputStore(folder / "e", config, N)
    record, policy, _ = store.play("a", sources[0], lambda *_: None)
    best = store.best_of(record, policy, 6, lambda *_: None)
    assert list(best) == best_of_counts(6) == [2, 4, 6]
    totals = [best[k].scores["notes"].total for k in best]
    assert (totals[0] <= totals[1]).all()
    assert (totals[1] <= totals[2]).all()
    assert totals[2].mean() > totals[0].mean()
    np.testing.assert_array_equal(best[6].prompts.ids, store.play("a", sources[0], lambda *_: None)[2].prompts.ids)


def test_what_was_played_is_not_played_again_unless_something_changed(two):
    sources, config, folder = two

    def sampled(*arguments) -> list[str]:
        stages = []
        evaluate(*arguments, progress=lambda stage, done, total: stages.append(stage))
        return sorted({s for s in stages if "sampling" in s})

    assert sampled(sources[:1], folder / "e", config, N, 2) == ["best of 2: sampling", "p0: sampling"]
    assert sampled(sources, folder / "e", config, N, 2) == ["p1: sampling"]
    hotter = merged(config, {"sampling": {"temperature": 1.3}})
    assert sampled(sources, folder / "e", hotter, N, 0) == ["p0: sampling", "p1: sampling"]


def test_rewards_are_those_of_every_soundfont_named(two, soundfont):
    sources, config, folder = two
    other = write_soundfont(folder / "other.sf2")
    config = merged(config, {"reward": {"terms": {"consonance": 1.0}}, "audio": {"workers": 1}})
    found = evaluate(sources[:1], folder / "e", config, 3, 0, [str(other)])
    first, second = (m for m in found.metrics if (m.group, m.name) == ("reward", "consonance"))
    assert (first.soundfont, second.soundfont) == (soundfont.stem, "other")
    assert first.values != second.values
    assert set(found.record["soundfonts"]) == {soundfont.stem, "other"}
    page = write_report(found, folder / "report.html", players=0).read_text(encoding="utf-8")
    assert f'<th scope="col">{soundfont.stem}</th><th scope="col">other</th>' in page  # the transfer matrix


def test_one_soundfont_under_two_names_is_refused(two, soundfont):
    sources, config, folder = two
    (folder / "other.sf3").symlink_to(soundfont)
    with pytest.raises(UserError, match=r"other\.sf3 is the soundfont .* under another name"):
        evaluate(sources[:1], folder / "e", config, 3, 0, [str(folder / "other.sf3")])


def test_a_run_alone_is_compared_with_the_policy_it_started_from(two, capsys):
    sources, config, folder = two
    sets = {"policy": {"source": sources[0]}, "sampling": {"group": 2}}
    sets["train"] = {"steps": 1, "prompts": 2, "eval_prompts": 2, "listen": 0, "threads": 2}
    (folder / "small.toml").write_text(to_toml(merged(config, sets)))
    assert main(["train", "--config", str(folder / "small.toml"), "--out", str(folder / "run")]) == 0
    done = main(["evaluate", "--policy", str(folder / "run"), "-n", "4", "--best-of", "0", "--out", str(folder / "e")])
    assert done == 0
    assert "effective_outputs" in capsys.readouterr().out
    tree = json.loads((folder / "e" / "evaluation.json").read_text())
    assert [p["label"] for p in tree["policies"]] == ["p0", "run"]
    assert tree["policies"][1]["run"] == str((folder / "run").resolve())


def test_labels_must_be_plain_and_different():
    assert labelled(["a=x/y", "x/z"]) == [("a", "x/y"), ("z", "x/z")]
    for sources in ([], ["x/a", "y/a"], ["=x"], ["best of 2=x"], ["a:b=x"]):
        with pytest.raises(UserError):
            labelled(sources)


def test_what_is_no_evaluation_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is not an evaluation"):
        Evaluation.open(tmp_path)
