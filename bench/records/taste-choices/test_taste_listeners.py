"""The study of simulated listeners, on a few choices about made-up clips."""

import numpy as np
import pytest
import taste_listeners as study

from fastsmart.reward.taste_features import feature_names


def test_choices_needed_are_read_off_a_curve():
    assert study._needed(np.array([0.6, 0.7, 0.9]), 10, 0.8) == pytest.approx(25)
    assert study._needed(np.array([0.6, 0.9, 0.7]), 10, 0.9) == pytest.approx(20)
    assert study._needed(np.array([0.6, 0.7]), 10, 0.8) == 20  # never: as many as there were
    assert study._needed(np.array([0.6]), 10, 0.55) == pytest.approx(5)


def test_a_condition_is_its_seed_and_its_summary_has_intervals(monkeypatch):
    monkeypatch.setattr(study, "HELD_OUT", 100)
    monkeypatch.setattr(study, "LONGEST", {"information": 40, "random": 40})
    monkeypatch.setattr(study, "EVERY", {"information": 20, "random": 20})
    monkeypatch.setattr(study, "FINISHED", 12)
    monkeypatch.setattr(study, "RESAMPLES", 50)
    table = np.random.default_rng(0).normal(size=(500, len(feature_names())))
    hidden = "slow, sparse, low"
    runs = [study.Condition(table, hidden, pairs, seed, False).run() for pairs in study.LONGEST for seed in (0, 1)]
    assert runs[0] == study.Condition(table, hidden, "information", 0, False).run()
    assert all(sum(run["answers"].values()) == 40 for run in runs)
    assert all(0.5 < run["agreement"][40] <= run["ceiling"] < 1 for run in runs)
    about = study.summary(runs)[hidden]
    for name in ("agreement after 40, information", "saved until 85 %"):
        assert about[name]["low"] <= about[name]["value"] <= about[name]["high"]
