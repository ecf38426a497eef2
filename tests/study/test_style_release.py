"""A policy that knows styles, from MIDI files to its release: judges, card, and a first piece."""

import json

import numpy as np
import pytest
from styled_pieces import STYLES, styled_clips, write_styled

from fastsmart.cli import main
from fastsmart.music.style_forest import FOREST_FILE, load_forest
from fastsmart.music.styles import JUDGE_FILE, load_judge
from fastsmart.policy.hf_format import load_policy
from fastsmart.study import card, style_release


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
    assert load_policy(release).vocab.styles.names == STYLES


def test_its_card_has_a_line_and_a_column_for_every_style(release):
    text = (release / "README.md").read_text()
    section = text[text.index("## Styles") :]
    for style in STYLES:
        assert sum(line.startswith(f"| {style} |") for line in section.splitlines()) == 2
    assert "bits between asked and heard, outputs" in section
    assert "Copies: of 12 outputs" in section
