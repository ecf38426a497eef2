"""Styles of an evaluation: which was asked for in each prompt, and which the judges beside the base policy hear."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.config import Config
from fastsmart.music.style_forest import FOREST_FILE, StyleForest, load_forest
from fastsmart.music.style_information import HeardStyles, heard_styles
from fastsmart.music.styles import StyleJudge, load_judge
from fastsmart.run.provenance import beside_base, judge_path
from fastsmart.study.outputs import Outputs
from fastsmart.tokens.prompts import asked_styles
from fastsmart.tokens.vocabulary import Vocabulary

Judges = dict[str, StyleJudge | StyleForest]


def judges_of(config: Config, first: str) -> Judges:
    """The judges of styles of a config that asks for some, beside its base policy or else beside the `first` evaluated.

    Tables call them "judge", which a reward may have asked, and "second judge", which none has; one may be missing.
    """
    found: Judges = {}
    if not config.prompts.styles:
        return found
    for source in (config.policy.source, first):
        of = replace(config, policy=replace(config.policy, source=source))
        forest = beside_base(of, FOREST_FILE)
        if "judge" not in found and (path := judge_path(of)):
            found["judge"] = load_judge(Path(path))
        if "second judge" not in found and forest.is_file():
            found["second judge"] = load_forest(forest)
    return found


def heard(outputs: Outputs, vocab: Vocabulary, max_seconds: float, judges: Judges) -> dict[str, HeardStyles]:
    """How each judge hears the outputs whose style it knows; resamples draw openings, whatever style they came in."""
    asked, found = np.array(asked_styles(outputs.prompts, vocab)), {}
    notes = outputs.notes(vocab, max_seconds)
    opening = [row[np.argmax(row == vocab.id("Bar_None")) :].tobytes() for row in outputs.prompts]
    for name, judge in judges.items():
        known = np.flatnonzero(np.isin(asked, judge.styles))
        styles = [style for style in judge.styles if style in asked]
        if len(styles) < 2:
            continue
        table = judge(notes)[known][:, [judge.styles.index(style) for style in styles]]
        said = [styles[s] for s in table.argmax(1)]
        found[name] = heard_styles(styles, asked[known].tolist(), said, [opening[i] for i in known])
    return found


def as_tree(found: dict[str, HeardStyles]) -> dict[str, Any]:
    """Styles and confusion by judge, for evaluation.json."""
    return {name: {"styles": list(h.styles), "confusion": h.confusion.round(4).tolist()} for name, h in found.items()}
