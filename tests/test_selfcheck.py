"""The self-check finds nothing on a sound machine, and says what differs on one that is not."""

from __future__ import annotations

import math

import pytest

from fastsmart import selfcheck
from fastsmart.cli import main
from fastsmart.selfcheck import Finding


@pytest.mark.parametrize("part", [selfcheck.scoring, selfcheck.sampling])
def test_figures_without_a_run_are_as_expected(part):
    found = list(part())
    assert len(found) >= 4
    assert [f for f in found if not f.right] == []


@pytest.mark.slow
def test_all_figures_are_as_expected(capsys):
    assert main(["selfcheck"]) == 0
    assert "as expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("here", "right"), [(1.0, True), (1.05, True), (1.2, False), (math.nan, False), (math.inf, False)]
)
def test_a_figure_is_right_within_its_tolerance(here, right):
    assert Finding("x", here, 1.0, 0.1).right == right


def test_what_differs_is_named_and_the_exit_code_is_1(monkeypatch, capsys):
    parts = (lambda: iter([Finding("[one]", 1.0, 1.0, 0.0)]), lambda: iter([Finding("two", 3.0, 1.0, 0.5, "dB")]))
    monkeypatch.setattr(selfcheck, "PARTS", parts)
    assert main(["selfcheck"]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 differ: two;" in out
    assert "3 dB" in out
    assert "[one]" in out
    monkeypatch.setattr(selfcheck, "PARTS", parts[:1])
    assert main(["selfcheck"]) == 0
    assert "all 1 as expected" in capsys.readouterr().out


def test_what_is_missing_is_a_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FASTSMART_SOUNDFONT", str(tmp_path / "none.sf2"))
    assert main(["selfcheck"]) == 2
    assert "none.sf2" in capsys.readouterr().err


def test_a_render_that_is_late_or_out_of_tune_is_found(monkeypatch):
    honest = selfcheck.render

    def early(notes, **options):
        audio = honest(notes, **options)
        audio.samples[:, 100] = 0.5
        return audio

    monkeypatch.setattr(selfcheck, "render", early)
    found = {f.what: f.right for f in selfcheck.rendering()}
    assert not found["loudest sample before the first note"]
    assert found["pitch of the A above middle C"]
