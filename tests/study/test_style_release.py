"""A policy that knows styles, from MIDI files to its release: judges, card, and a first piece."""

import json

import numpy as np
import pytest
from styled_pieces import STYLES, styled_clips, write_styled

from fastsmart.cli import main
from fastsmart.errors import UserError
from fastsmart.music.bootstrap import resample_weights
from fastsmart.music.rarefied import Sizes
from fastsmart.music.style_forest import FOREST_FILE, load_forest
from fastsmart.music.styles import JUDGE_FILE, load_judge
from fastsmart.notes import NoteBatch
from fastsmart.policy.hf_format import load_policy
from fastsmart.study import card, style_release
from fastsmart.study.by_style import by_style, known_moments, real_moments


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release")
    write_styled(root / "midi", pieces=24)
    with pytest.MonkeyPatch.context() as patch:
        for module, name, few in (
            (card, "CLIPS", 4),
            (style_release, "CLIPS", 6),
            (style_release, "MAX_TOKENS", 40),
            (style_release, "ROWS", 2),
            (style_release, "NGRAM_ROWS", 32),
        ):
            patch.setattr(module, name, few)
        options = ["--steps", "2", "--batch", "2", "--length", "64", "--valid-rows", "4", "--eval-every", "2"]
        size = ["--hidden", "32", "--ffn", "64", "--layers", "1", "--threads", "1"]
        styles = [part for style in STYLES for part in ("--styles", f"{style}={root / 'midi' / style}")]
        assert (
            main(["pretrain", "--midi", str(root / "midi"), "--out", str(root / "run"), *styles, *options, *size]) == 0
        )
    return root / "run" / "release"


def test_a_release_has_judges_that_know_its_styles(release):
    notes = styled_clips("march", range(500, 510))
    for judge in (load_judge(release / JUDGE_FILE), load_forest(release / FOREST_FILE)):
        assert judge.styles == STYLES
        assert (np.array(judge.styles)[judge(notes).argmax(1)] == "march").mean() > 0.8
    about = json.loads((release / JUDGE_FILE).read_text())["about"]
    assert set(about["median_margin"]) == set(STYLES)
    assert about["windows"]["train"] > about["windows"]["test"] > 0
    real = known_moments(load_judge(release / JUDGE_FILE))
    assert set(real) == set(STYLES)
    assert all(len(table) > 4 for table in real.values())
    assert load_policy(release).vocab.styles.names == STYLES


def test_its_card_has_a_line_and_a_column_for_every_style(release):
    text = (release / "README.md").read_text()
    section = text[text.index("## Styles") :]
    for style in STYLES:
        assert sum(line.startswith(f"| {style} |") for line in section.splitlines()) == 2
    assert "bits between asked and heard, outputs" in section
    assert "Copies: of 12 outputs" in section


def test_outputs_are_as_far_from_real_windows_as_their_means_are_and_each_style_counts_by_itself():
    notes = NoteBatch.concat([styled_clips(style, range(20)) for style in STYLES])
    asked = [style for style in STYLES for _ in range(20)]
    reward = np.arange(40.0)
    weights = resample_weights(40, 0, 50)
    real = real_moments(notes, asked)
    same = by_style(notes, asked, reward, weights, real, Sizes(notes=8, tokens=32))
    exchanged = by_style(notes, asked[::-1], reward, weights, real, Sizes(notes=8, tokens=32))
    for i, style in enumerate(STYLES):
        assert same[f"reward of {style}"].value == pytest.approx(9.5 + 20 * i)
        assert same[f"distance of {style} to its real windows"].value == pytest.approx(0.0, abs=1e-3)
        assert exchanged[f"distance of {style} to its real windows"].value > 0.5
        assert 1.0 < same[f"effective outputs within {style}"].value < 20.0
    alike = by_style(notes.select([0] * 40), asked, reward, weights, {}, Sizes(notes=8, tokens=32))
    assert alike[f"effective outputs within {STYLES[0]}"].value < same[f"effective outputs within {STYLES[0]}"].value
    assert not any(name.startswith("distance") for name in alike)


def test_a_judge_whose_table_of_real_windows_is_none_is_refused(release, tmp_path):
    tree = json.loads((release / JUDGE_FILE).read_text())
    tree["about"]["real_windows"] = {"march": {"polyphony": "three"}}
    (tmp_path / JUDGE_FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match="no table of means and deviations"):
        known_moments(load_judge(tmp_path / JUDGE_FILE))
