"""The report: one file that needs nothing else, says what the numbers say, and works in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from browsing import until

from fastsmart.cli import main
from fastsmart.music.bootstrap import Estimate
from fastsmart.study.evaluation import Evaluation
from fastsmart.study.findings import findings
from fastsmart.study.report import write_report


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
    return write_report(evaluation, tmp_path_factory.mktemp("report") / "report.html", players=2)


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|xlink:href|data|action)\s*=\s*["']([^"']{0,40})""", text)
    assert addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"@import|url\((?!#)", text)


def test_only_its_own_script_may_run(page):
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text).group(1)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"sha256-{digest}" in policy.replace("&#39;", "'").replace("&#43;", "+")
    assert "default-src" in policy


def test_players_hold_the_outputs(page, evaluation):
    text = page.read_text(encoding="utf-8")
    rolls = json.loads(re.search(r'id="notes">(.*?)</script>', text).group(1))["clips"]
    notes = evaluation.outputs("tuned").notes(evaluation.vocab)
    assert [row[2] for row in rolls["1-1"]] == notes.pitch[notes.rows(1)].tolist()
    clips = re.findall(r'src="data:audio/mpeg;base64,([^"]+)"', text)
    assert len(clips) == 4
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(clips[3])))
    assert rate == 48000
    assert len(samples) / rate == pytest.approx(notes.end_s[1], abs=3.5)  # the last notes fade out


def test_diversity_at_equal_size_stands_before_that_of_whole_outputs(page):
    text = page.read_text()
    titles = ["Diversity", "Diversity of whole outputs, which depends on how much they hold", "Faults"]
    first, whole, faults = (text.index(f">{title}<") for title in titles)
    assert first < whole < faults
    assert "rarefied effective outputs" in text[first:whole]
    assert "rarefied" not in text[whole:faults]
    assert "effective outputs" in text[whole:faults]


def test_figures_are_drawn_in_the_colours_of_the_page(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 5
    assert text.count('role="img" aria-label') >= 5 + 4
    assert "var(--series-2)" in text
    assert not re.search(r"#0[1-9a]0[2-9b]0[1-9]", re.sub(r"base64,[^\"]+", "", text))  # no placeholder is left


def test_names_cannot_break_the_page(evaluation, tmp_path):
    odd = "<script>alert(1)</script>"
    outputs = evaluation.path / "outputs"
    (outputs / "a&b.npz").write_bytes((outputs / "base.npz").read_bytes())
    policies = [replace(p, label=p.label.replace("base", "a&b"), source=odd) for p in evaluation.policies]
    metrics = [
        replace(m, values={k.replace("base", "a&b"): v for k, v in m.values.items()},
                spread={k.replace("base", "a&b"): v for k, v in m.spread.items()})
        for m in evaluation.metrics
    ]  # fmt: skip
    path = write_report(replace(evaluation, policies=policies, metrics=metrics), tmp_path / "r.html", players=0)
    text = path.read_text(encoding="utf-8")
    assert odd not in text
    assert "a&amp;b" in text


def with_change(evaluation: Evaluation, group: str, name: str, old: float, new: float, sure: bool) -> Evaluation:
    """The evaluation with one metric replaced."""
    width = 0.5 * abs(new - old) if sure else 2 * abs(new - old)
    change = Estimate(new - old, new - old - width, new - old + width)
    metrics = [
        replace(
            m,
            values=m.values | {"base": Estimate(old, old, old), "tuned": Estimate(new, new, new)},
            changes=m.changes | {"tuned": change},
            spread=m.spread | {"base": 1.0},
        )
        if (m.group, m.name) == (group, name)
        else m
        for m in evaluation.metrics
    ]
    return replace(evaluation, metrics=metrics)


def test_findings_say_what_the_numbers_say(evaluation):
    up = findings(with_change(evaluation, "reward", "reward", 5.0, 6.0, sure=True))[0]
    assert "from 5.00 to 6.00: +1.00 (95 % interval +0.50 to +1.50), +1.00 standard deviations." in up.reward
    unsure = findings(with_change(evaluation, "reward", "reward", 5.0, 6.0, sure=False))[0]
    assert "includes no change" in unsure.reward
    moved = findings(with_change(evaluation, "feature", "notes", 60.0, 20.0, sure=True))[0]
    assert moved.music.startswith("What changed most in the music: notes 60.0 → 20.0")
    alike = findings(with_change(evaluation, "diversity", "rarefied_self_bleu", 0.3, 0.9, sure=True))[0]
    assert "rarefied self bleu (less is more diverse) 0.300 → 0.900" in alike.price.split("More diverse")[0]
    beaten = {"tuned": {"value": -0.4, "low": -0.6, "high": -0.2}}
    behind = replace(evaluation, record=evaluation.record | {"against_best_of": beaten})
    assert "falls short of the best of 2 outputs of base" in findings(behind)[0].baseline


def test_the_command_finds_what_it_is_given(evaluation, tmp_path, capsys):
    assert main(["report", str(evaluation.path), "--out", str(tmp_path / "r.html"), "--players", "0"]) == 0
    assert (tmp_path / "r.html").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert "neither a run nor an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_plays_in_a_browser(browser, page, scheme):
    tab = browser.new_page(color_scheme=scheme)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    first, second = tab.locator("audio").nth(0), tab.locator("audio").nth(1)
    first.evaluate("audio => audio.play()")
    until(tab, "document.querySelectorAll('audio')[0].currentTime > 0.1")
    tab.locator(".switch").first.focus()
    tab.keyboard.press("Enter")
    until(tab, "!document.querySelectorAll('audio')[1].paused")
    assert first.evaluate("audio => audio.paused")
    assert second.evaluate("audio => audio.currentTime") > 0.05
    pixels = tab.locator("canvas").first.evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length"
    )
    assert pixels > 100
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    ink, paper = (tab.evaluate(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor"))
    brightness = [np.mean([int(x) for x in re.findall(r"\d+", colour)[:3]]) for colour in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")


def test_titles_of_the_curves_fit_and_the_legend_hides_no_time():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from fastsmart.run.curves import curves

    line = {"reward": 1.0, "notes": 9.0, "time": {"step": 3.0, "sample": 2.0, "update": 1.0}, "terms": {}}
    figure = curves([{**line, "step": step} for step in (1, 2, 3)])
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    for ax in figure.axes:
        title = ax.title.get_window_extent(renderer)
        assert 0 <= title.x0 < title.x1 <= figure.bbox.x1, ax.get_title()
    (times,) = (ax for ax in figure.axes if ax.get_title() == "seconds per step")
    highest = times.transData.transform((0, 3.0))[1]
    assert times.get_legend().get_window_extent(renderer).y0 > highest


def test_a_roll_without_outputs_says_so():
    from fastsmart.music.diversity import ROLL_BEATS
    from fastsmart.notes import NoteBatch
    from fastsmart.study.figures import average_rolls

    (ax,) = average_rolls({"short": NoteBatch.empty(3)}).axes
    assert [text.get_text() for text in ax.texts] == [f"no output lasts {ROLL_BEATS} beats"]
    assert "darkest" not in ax.get_xlabel()
