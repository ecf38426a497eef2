"""The shipped policy of seven styles and its judges on works that neither has seen, where the archive is."""

import csv
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsmart.music.style_forest import FOREST_FILE, load_forest
from fastsmart.music.styles import JUDGE_FILE, load_judge
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.policy.hf_format import load_policy, shipped_file
from fastsmart.tokens.dataset import encode_midi
from fastsmart.tokens.decode import decode
from fastsmart.tokens.grid import on_grid
from fastsmart.tokens.vocabulary import load_vocabulary

ARCHIVE = Path(os.environ.get("FASTSMART_STYLES", Path(__file__).parents[3] / "shared" / "data" / "styles.tar.xz"))
NAME = "styles-tiny"
TOKENS = 256
ROWS = 24  # of a style

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARCHIVE.exists(), reason="the archive of styles is not here; name it in FASTSMART_STYLES"),
]


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    """style -> ids of every test piece of the archive, on the grid."""
    folder, vocab = tmp_path_factory.mktemp("styles"), load_vocabulary("smart")
    found: dict[str, list[np.ndarray]] = {}
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    manifest = next(folder.rglob("manifest.csv"))
    for row in csv.DictReader(io.StringIO(manifest.read_text(encoding="utf-8"))):
        if row["split"] == "test":
            ids = encode_midi(manifest.parent / row["path"], vocab).astype(np.int64)
            found.setdefault(row["style"], []).append(on_grid(ids, vocab))
    return found


def test_both_judges_know_the_styles_of_works_they_were_not_fitted_on(works):
    vocab = load_vocabulary("smart")
    judge, forest = load_judge(shipped_file(NAME, JUDGE_FILE)), load_forest(shipped_file(NAME, FOREST_FILE))
    recall: dict[str, list[float]] = {"judge": [], "forest": []}
    for style, pieces in works.items():
        windows = [cut_windows(decode([ids], vocab), 10.0) for ids in pieces]
        notes = NoteBatch.concat([w.select(np.arange(min(len(w), 30))) for w in windows])
        for name, found in (("judge", judge), ("forest", forest)):
            recall[name].append(float((np.array(found.styles)[found(notes).argmax(1)] == style).mean()))
    assert len(works) == 6
    assert np.mean(recall["judge"]) > 0.7, recall  # chance 0.14
    assert np.mean(recall["forest"]) > 0.5, recall


@torch.no_grad()
def test_pieces_of_a_style_are_likeliest_after_its_own_token(works):
    """But for classical, whose few test pieces are about as likely after romantic's (the card says by how much)."""
    policy = load_policy(NAME)
    vocab = policy.vocab
    tokens = {name: vocab.id(text) for name, text in vocab.styles.styles}
    random = np.random.default_rng(0)
    for style, pieces in works.items():
        rows = []
        for i in range(ROWS):
            ids = pieces[i % len(pieces)]
            bars = np.flatnonzero(ids == vocab.id("Bar_None"))
            start = int(random.choice(bars[bars + TOKENS < len(ids)])) if len(ids) > TOKENS + bars[0] else 0
            rows.append(ids[start : start + TOKENS])
        rows = [row for row in rows if len(row) == TOKENS]
        losses = {}
        for name, token in tokens.items():
            asked = torch.from_numpy(np.stack([np.concatenate([[vocab.bos_id, token], row]) for row in rows]))
            logprobs = policy(asked[:, :-1]).log_softmax(-1).gather(2, asked[:, 1:, None])[:, 1:, 0]
            losses[name] = -float(logprobs.mean())
        best = min(losses, key=losses.get)
        assert best == style or (style == "classical" and losses[style] < losses[best] + 0.03), losses
