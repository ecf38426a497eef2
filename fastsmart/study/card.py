"""A base policy made ready to ship: 16-bit weights, statistics of the real pieces, a card with what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastsmart.machine.files import atomic_folder, os_errors_as_user_errors
from fastsmart.music.features import features
from fastsmart.music.windows import cut_windows
from fastsmart.notes import NoteBatch
from fastsmart.policy.hf_format import load_policy, write_policy
from fastsmart.policy.pretrain import PretrainResult, PretrainSettings, evaluate, split_pieces, valid_rows
from fastsmart.policy.style_crops import style_cropper
from fastsmart.reward.typicality import TypicalityStats, fit_typicality
from fastsmart.run.provenance import STATISTICS_FILE
from fastsmart.sampling import Rollout, sample
from fastsmart.study.style_release import write_style_release
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.decode import decode
from fastsmart.tokens.labels import Labels
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.tokens.vocabulary import Vocabulary
from fastsmart.words import counted

CLIPS = 256  # played by the policy and cut from real pieces for the table
WINDOW_S = 10.0
ROWS = (
    "notes_per_second",
    "notes_per_beat",
    "polyphony",
    "polyphony_rate",
    "empty_beat_rate",
    "scale_consistency",
    "pitch_class_entropy",
    "pitch_range",
    "mean_pitch",
    "mean_duration_beats",
    "mean_velocity",
    "repetition",
)


def real_statistics(
    dataset: TokenDataset, settings: PretrainSettings, data: str, labels: Labels | None = None
) -> TypicalityStats:
    """Statistics of the training pieces, for the rewards that compare with real pieces; of styles, with the velocities
    and tempi that the policy learns.

    Raises UserError when there are too few pieces.
    """
    if labels:
        cropper = style_cropper(dataset, labels, "train", settings.crop, settings.styles)
        pieces, random = labels.pieces("train"), np.random.default_rng([settings.seed, 4])
        notes = decode([cropper.touched_piece(int(p), random) for p in pieces], dataset.vocab)
    else:
        pieces, _ = _split(dataset, settings, labels)
        notes = decode([dataset.piece(p) for p in pieces], dataset.vocab)
    return fit_typicality(notes, f"{data or dataset.source}, training split, {counted(len(pieces), 'piece')}", WINDOW_S)


def write_release(
    result: PretrainResult,
    dataset: TokenDataset,
    settings: PretrainSettings,
    statistics: TypicalityStats | None,
    folder: Path,
    data: str,
    licence: str,
    command: str,
    labels: Labels | None = None,
) -> str:
    """Write the release of a base policy into `folder` and return its card.

    statistics             : see `real_statistics`; None leaves them out
    data, licence, command : what the card says of the data and how the policy was made
    labels                 : of a policy that knows styles; judges of them are then part of the release
    """
    train_pieces, valid_pieces = _split(dataset, settings, labels)
    real = decode([dataset.piece(p) for p in valid_pieces], dataset.vocab)
    name = data or f"the pieces in {Path(dataset.source).name}"
    with atomic_folder(folder) as part, os_errors_as_user_errors(folder):
        write_policy(result.policy, part, torch.float16)
        policy = load_policy(part)
        if statistics:
            statistics.save(part / STATISTICS_FILE)
        loss = evaluate(policy, valid_rows(dataset, settings, labels), policy.vocab.pad_id)
        prompts = TokenBatch.pack([dataset.piece(p)[:4] for p in np.resize(valid_pieces, CLIPS)])
        rollout = sample(policy, prompts, 1, 256, seed=settings.seed)
        table = _table(rollout, cut_windows(real, WINDOW_S), policy.vocab)
        unigram, bigram = result.baselines["unigram"], result.baselines["bigram"]
        size, layers = policy.size, counted(policy.size.num_layers, "layer")
        card = f"""\
# {folder.parent.name if folder.name == "release" else folder.name}: a base policy for symbolic piano music

A decoder-only transformer in the Phi-3 layout, {policy.num_parameters:,} parameters ({layers},
{size.hidden_size} wide, feed-forward {size.intermediate_size}, {size.num_heads} heads), float16 weights, REMI tokens
({len(policy.vocab)}, MidiTok). It plays solo piano, one bar after the other, from a prompt of bar, time signature,
position and tempo. It is a starting point for fine-tuning, not a composer.

* **Data**: {name}. {len(train_pieces)} pieces for training, {len(valid_pieces)} for validation,
  {int(dataset.offsets[-1]):,} tokens; all voices merged into one piano part, transposed by
  -{settings.crop.transpose_down} to +{settings.crop.transpose_up} semitones at random.
* **Licence of the data**: {licence or "not stated"}.
* **Made by**: `{command}`, {result.step} optimizer steps of {settings.batch} rows of {settings.crop.length} tokens.
* **Validation loss**: {loss:.3f} nats a token (unigram {unigram:.3f}, bigram {bigram:.3f}, both add-one smoothed,
  on the same tokens).

How it plays: {CLIPS} completions of 256 tokens against {WINDOW_S:g}-second windows of the validation pieces, mean ±
standard deviation.

{table}"""
        if statistics:
            card += f"""
`{STATISTICS_FILE}` holds the distribution of these features in the training pieces, which the rewards `typicality` and
`presence` compare with.
"""
        if labels:
            card += "\n" + write_style_release(policy, dataset, labels, settings, part)
        (part / "README.md").write_text(card, encoding="utf-8")
    return card


def _split(dataset: TokenDataset, settings: PretrainSettings, labels: Labels | None) -> tuple[np.ndarray, np.ndarray]:
    """Pieces for training and for validation."""
    if labels:
        return labels.pieces("train"), labels.pieces("valid")
    return split_pieces(len(dataset), settings.valid_share, settings.seed)


def _table(rollout: Rollout, real: NoteBatch, vocab: Vocabulary) -> str:
    played = decode(rollout.sequences(), vocab, WINDOW_S)
    note_ids = np.array([t.startswith(("Pitch", "Velocity", "Duration")) for t in vocab.tokens])
    used = 3 * decode(rollout.sequences(), vocab).counts.sum()
    drawn = note_ids[np.concatenate([rollout.ids[i, : rollout.lengths[i]] for i in range(len(rollout))])].sum()
    ended = float(np.mean([rollout.ids[i, n - 1] == vocab.eos_id for i, n in enumerate(rollout.lengths)]))
    ours, theirs = features(played), features(real)
    lines = ["| | policy | real pieces |", "|---|---|---|"]
    lines += [f"| {row.replace('_', ' ')} | {_cell(ours[row])} | {_cell(theirs[row])} |" for row in ROWS]
    lines += [
        f"| note tokens that became notes | {used / max(drawn, 1):.1%} | |",
        f"| clips without notes | {np.mean(played.counts == 0):.1%} | {np.mean(real.counts == 0):.1%} |",
        f"| completions the policy ended itself | {ended:.1%} | |",
    ]
    return "\n".join(lines) + "\n"


def _cell(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    return f"{values.mean():.2f} ± {values.std():.2f}" if len(values) else "–"
