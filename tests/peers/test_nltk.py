"""Self-BLEU against NLTK's BLEU."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from nltk.translate.bleu_score import sentence_bleu

from fastsmart.music.ngrams import self_bleu
from fastsmart.tokens.token_batch import TokenBatch


@pytest.mark.parametrize("seed", range(4))
def test_self_bleu_is_nltks_bleu_against_all_others(seed: int):
    random = np.random.default_rng(seed)
    rows = [random.integers(0, 5, random.integers(3, 40)).tolist() for _ in range(12)]
    rows.append(list(rows[0]))
    ours = self_bleu(TokenBatch.pack(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK says so when a precision is 0
        theirs = [sentence_bleu([r for j, r in enumerate(rows) if j != i], row) for i, row in enumerate(rows)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-70)
