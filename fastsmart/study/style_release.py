"""What a base policy that knows styles is released with: judges of its styles, and how well it keeps them apart.

Shape letters: S styles, B rows of a style.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fastsmart.music.bootstrap import Draws
from fastsmart.music.style_forest import FOREST_FILE, StyleForest, grow_forest
from fastsmart.music.style_information import HeardStyles, heard_styles
from fastsmart.music.styles import JUDGE_FILE, StyleJudge, fit_judge, heard_by_folds
from fastsmart.music.training_set import TrainingSet
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.policy.crops import IGNORED, ngram_losses, targets
from fastsmart.policy.pretrain import NGRAM_ROWS, PretrainSettings
from fastsmart.policy.style_crops import StyleCropper, style_cropper
from fastsmart.policy.transformer import Policy
from fastsmart.reward.style_margin import MEDIANS
from fastsmart.sampling import sample
from fastsmart.study.by_style import REAL_WINDOWS, real_moments
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.decode import decode
from fastsmart.tokens.labels import Labels
from fastsmart.tokens.prompts import procedural, styled
from fastsmart.tokens.token_batch import TokenBatch

WINDOW_S = 10.0  # as rewards hear clips
MOST_WINDOWS = 1200  # of a style in training
MOST_OF_PIECE = 30  # windows
ROUNDS = 3  # in which the pieces of a small style come at other tempi
CLIPS = 64  # of each style that the policy plays
MAX_TOKENS = 256
ROWS = 64  # of each style in the table of losses
COPY_DISTANCE = 0.3  # to the nearest training piece, below which an output is called a copy


@dataclass(frozen=True)
class Windows:
    """Clips of real pieces.

    notes : N clips
    style : of each
    work  : of each
    """

    notes: NoteBatch
    style: list[str]
    work: list[str]


def real_windows(cropper: StyleCropper, labels: Labels, split: str, seed: int) -> Windows:
    """Windows of the pieces of a split, with velocities and tempi as the policy learns them, about as many a style."""
    random, notes, style, work = np.random.default_rng([seed, 5]), [], [], []
    for name in cropper.tokens:
        pieces, found = labels.pieces(split, name), 0
        each = int(np.clip(MOST_WINDOWS // max(len(pieces), 1) + 1, 6, MOST_OF_PIECE))
        for _ in range(ROUNDS):
            for p in random.permutation(pieces) if found < MOST_WINDOWS // 2 else ():
                if found >= MOST_WINDOWS:
                    break
                clips = cut_windows(decode([cropper.touched_piece(int(p), random)], cropper.dataset.vocab), WINDOW_S)
                clips = clips.select(np.sort(random.permutation(len(clips))[:each]))
                notes.append(clips)
                style += [name] * len(clips)
                work += [labels.work[int(p)]] * len(clips)
                found += len(clips)
    return Windows(NoteBatch.concat(notes), style, work)


def fit_judges(windows: dict[str, Windows]) -> tuple[StyleJudge, StyleForest, dict[str, HeardStyles]]:
    """Both judges of the training windows; and how those of the test pieces are heard by "judge" and "forest",
    and all by "folds", as `heard_by_folds` says.

    windows : by split. The first judge is calibrated on "valid", whose median log-odds cap the reward of a style
    """
    train, valid, test = (windows[split] for split in ("train", "valid", "test"))
    judge = fit_judge(train.notes, train.style, valid.notes, valid.style)
    forest = grow_forest(train.notes, train.style)
    margin, of = judge.margin(valid.notes, valid.style), np.array(valid.style)
    medians = {name: round(float(np.median(margin[of == name])), 4) for name in judge.styles}
    found = {
        name: heard_styles(j.styles, test.style, heard_as(j, test.notes), test.work)
        for name, j in (("judge", judge), ("forest", forest))
    }
    whole = NoteBatch.concat([w.notes for w in windows.values()])
    every = [style for w in windows.values() for style in w.style]
    works = [work for w in windows.values() for work in w.work]
    found["folds"] = heard_styles(judge.styles, every, heard_by_folds(whole, every, works), works)
    recall = {style: round(e.value, 4) for style, e in found["judge"].recall.items()}
    about = {
        MEDIANS: medians,
        REAL_WINDOWS: real_moments(test.notes, test.style),
        "windows": {split: len(w.style) for split, w in windows.items()},
        "test_recall": recall,
        "test_balanced_accuracy": round(found["judge"].balanced.value, 4),
        "test_bits": round(found["judge"].information.value, 4),
        "five_fold_balanced_accuracy": round(found["folds"].balanced.value, 4),
    }
    return replace(judge, about=about), forest, found


def heard_as(judge: StyleJudge | StyleForest, notes: NoteBatch) -> list[str]:
    """The likeliest style of each clip."""
    return [judge.styles[s] for s in judge(notes).argmax(1)]


@dataclass(frozen=True)
class StyleLosses:
    """Nats a token on validation rows of each style.

    under           : float64 [S, S], rows of style i after the token of style j
    unigram, bigram : of add-one smoothed models of training rows, float64 [S]
    """

    under: np.ndarray
    unigram: np.ndarray
    bigram: np.ndarray


def style_losses(policy: Policy, train: StyleCropper, valid: StyleCropper, seed: int) -> StyleLosses:
    """Losses on rows of the validation pieces, at the place of whose style token each style's is put in turn."""
    random = np.random.default_rng([seed, 6])
    rows = {style: valid.rows_of(style, random, ROWS) for style in valid.tokens}
    counted_rows = [row[row != train.pad] for row in train.rows(np.random.default_rng([seed, 3]), NGRAM_ROWS)]
    grams = [ngram_losses(counted_rows, own, policy.size.vocab_size, train.pad) for own in rows.values()]
    under = np.zeros((len(rows), len(rows)))
    for i, own in enumerate(rows.values()):
        for j, (_, token) in enumerate(valid.tokens.values()):
            asked = own.copy()
            asked[:, 1] = token
            under[i, j] = _loss_of_music(policy, asked, train.pad)
    unigram, bigram = (np.array([g[name] for g in grams]) for name in ("unigram", "bigram"))
    return StyleLosses(under, unigram, bigram)


@torch.no_grad()
def _loss_of_music(policy: Policy, rows: np.ndarray, pad: int) -> float:
    """Mean loss over rows [B, T + 1] that begin with BOS and a style, which is given and no target; nats a token."""
    inputs, target = targets(rows, pad)
    target[:, 0] = IGNORED
    logits = policy(torch.from_numpy(inputs))
    return float(F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(target).flatten(), ignore_index=IGNORED))


def played(policy: Policy, styles: list[str], seed: int) -> tuple[list, NoteBatch, list[str]]:
    """Completions of `CLIPS` prompts, each in every style in turn: sequences, the clips as heard, styles asked for."""
    openings = procedural(policy.vocab, CLIPS, seed, ["4/4"], (60.0, 150.0))
    rows = [row for row in openings.tokens for _ in styles]
    prompts = styled(replace(openings, tokens=TokenBatch.pack(rows)), styles, metres_seed=seed)
    rollout = sample(policy, prompts.tokens, 1, MAX_TOKENS, seed=seed)
    sequences = list(rollout.sequences())
    return sequences, decode(sequences, policy.vocab, WINDOW_S), styles * CLIPS


def write_style_release(
    policy: Policy, dataset: TokenDataset, labels: Labels, settings: PretrainSettings, folder: Path
) -> str:
    """Write both judges into a release's folder; gives the section of its card about styles.

    dataset : that `evened` made, whose vocabulary is the policy's
    """
    croppers = {
        split: style_cropper(dataset, labels, split, settings.crop, settings.styles)
        for split in ("train", "valid", "test")
    }
    windows = {split: real_windows(croppers[split], labels, split, settings.seed) for split in croppers}
    judge, forest, real = fit_judges(windows)
    judge.save(folder / JUDGE_FILE)
    forest.save(folder / FOREST_FILE)
    losses = style_losses(policy, croppers["train"], croppers["valid"], settings.seed)
    sequences, notes, asked = played(policy, list(judge.styles), settings.seed)
    openings = [i // len(judge.styles) for i in range(len(asked))]
    own = {
        name: heard_styles(j.styles, asked, heard_as(j, notes), openings)
        for name, j in (("judge", judge), ("forest", forest))
    }
    distance = _training_distance(dataset, labels, sequences, notes)
    return _card(labels, losses, real, own, distance)


def _training_distance(dataset: TokenDataset, labels: Labels, sequences: list, notes: NoteBatch) -> np.ndarray:
    """Share of each output's four-note figures that the nearest training piece lacks, float64 [N]."""
    from fastsmart.music.ngrams import figures

    pieces = labels.pieces("train")
    rows = [dataset.piece(int(p)) for p in pieces]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    files = tuple(dataset.files[int(p)] for p in pieces)
    training = TrainingSet.of(replace(dataset, ids=np.concatenate(rows), offsets=offsets, files=files))
    return training.distance(figures(notes))


def _card(
    labels: Labels,
    losses: StyleLosses,
    real: dict[str, HeardStyles],
    own: dict[str, HeardStyles],
    distance: np.ndarray,
) -> str:
    """The section of a model card."""
    styles = real["judge"].styles
    lines = [
        "## Styles",
        "",
        "A style is the token after BOS, a composer the one after that; `styles.json` names them. Losses are nats a",
        "token on validation pieces after the style's token; *other token* is the least loss after another style's.",
        f"Recall is the share of clips that the judge hears as the style: of real {WINDOW_S:g}-second windows of test",
        f"pieces, and of {CLIPS} outputs a style, with 95 % intervals over works and openings.",
        "",
        "| style | pieces | unigram | bigram | loss | other token | real windows heard | outputs heard |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i, style in enumerate(styles):
        others = np.delete(losses.under[i], i)
        lines.append(
            f"| {style} | {len(labels.pieces('train', style))} | {losses.unigram[i]:.3f} | {losses.bigram[i]:.3f} | "
            f"{losses.under[i, i]:.3f} | {others.min():.3f} ({styles_without(styles, i)[int(others.argmin())]}) | "
            f"{_said(real['judge'].recall[style])} | {_said(own['judge'].recall[style])} |"
        )
    folds = real["folds"]
    lines += ["", "| | judge (logistic) | second judge (forest) |", "|---|---|---|"]
    for said, found in (("real windows", {name: real[name] for name in own}), ("outputs", own)):
        lines.append(f"| balanced accuracy, {said} | " + " | ".join(_said(h.balanced) for h in found.values()) + " |")
        lines.append(
            f"| bits between asked and heard, {said} | "
            + " | ".join(_said(h.information) for h in found.values())
            + " |"
        )
    kept = {name: own[name].information.value / max(real[name].information.value, 1e-9) for name in own}
    lines.append("| outputs' share of real windows' bits | " + " | ".join(f"{x:.0%}" for x in kept.values()) + " |")
    recalls = ", ".join(f"{style} {folds.recall[style].value:.2f}" for style in styles)
    lines += [
        "",
        f"The test pieces are few. By judges of the other works, in five folds, windows of all {folds.units} works are",
        f"found with a balanced accuracy of {_said(folds.balanced)}, {_said(folds.information)} bits: {recalls}.",
    ]
    lines += ["", "Perplexity of validation rows (down) after each style's token (across):", ""]
    lines += ["| | " + " | ".join(styles) + " |", "|---" * (len(styles) + 1) + "|"]
    for i, style in enumerate(styles):
        row = np.exp(losses.under[i])
        cells = [f"**{x:.2f}**" if j == row.argmin() else f"{x:.2f}" for j, x in enumerate(row)]
        lines.append(f"| {style} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Copies: of {len(distance)} outputs {_copies(distance)}.", ""])


def _copies(distance: np.ndarray) -> str:
    """How near outputs come to training pieces, in words."""
    known = distance[np.isfinite(distance)]
    if not len(known):
        return "none has as many as four notes"
    near, share = int((known < COPY_DISTANCE).sum()), 1 - COPY_DISTANCE
    return (
        f"{near} share more than {share:.0%} of their four-note figures with one training piece; the nearest piece "
        f"lacks {np.median(known):.0%} of the median output's, {known.min():.0%} of the closest one's"
    )


def styles_without(styles: tuple[str, ...], i: int) -> list[str]:
    """All styles but number i."""
    return [style for j, style in enumerate(styles) if j != i]


def _said(draws: Draws) -> str:
    estimate = draws.estimate()
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
