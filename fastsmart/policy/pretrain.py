"""Next-token pre-training of a policy on an encoded dataset. Shape letters: B rows, T tokens of a row."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.limits import LARGEST_SEED, MOST_AT_ONCE, MOST_STEPS
from fastsmart.machine.files import JsonLines, make_folder, os_errors_as_user_errors
from fastsmart.machine.folder_lock import LEASE_S, FolderLock
from fastsmart.machine.signals import StopRequest
from fastsmart.policy.checkpoints import Checkpoints
from fastsmart.policy.crops import IGNORED, Cropper, CropSettings, ngram_losses, targets
from fastsmart.policy.hf_format import load_policy, save_policy
from fastsmart.policy.optimizer import make_optimizer, scheduled_rate, set_learning_rate
from fastsmart.policy.style_crops import StyleSettings, style_cropper
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.labels import Labels
from fastsmart.tokens.vocabulary import Vocabulary

DTYPES = ("float32", "bfloat16")
NGRAM_ROWS = 2048  # on which n-gram models of styled rows are counted
_EVAL_BATCH = 16


@dataclass(frozen=True)
class PretrainSettings:
    """A pre-training run."""

    steps: int = 4000
    """Optimizer steps."""
    batch: int = 12
    """Rows a step."""
    learning_rate: float = 2e-3
    warmup: int = 100
    final_rate: float = 2e-5
    """Cosine from `learning_rate` to `final_rate` after `warmup` steps."""
    weight_decay: float = 0.1
    """Decay of matrices in AdamW."""
    max_grad_norm: float = 1.0
    """Length to which a longer gradient is scaled down."""
    valid_share: float = 0.05
    """Share of the pieces kept for validation."""
    valid_rows: int = 64
    """Rows of the validation set, the same at every evaluation."""
    eval_every: int = 100
    """Steps between evaluations; the state to resume from is written then."""
    patience: int = 5
    """Evaluations without a better validation loss before stopping early."""
    seed: int = 0
    """Seed of the split, the initial weights and the rows."""
    device: str = "cpu"
    """Torch device."""
    compile: bool = False
    """Whether torch.compile fuses the backbone (needs a C++ compiler on a CPU; pays after a minute)."""
    init: str = ""
    """Policy whose weights are trained on; "" draws fresh ones by the seed."""
    dtype: str = "float32"
    """Type in which matrices are multiplied in training, "float32" or "bfloat16"; weights are float32 in both."""
    style_steps: int = 0
    """Steps, after all others, in which the tokens of styles learn alone, see `fastsmart.policy.style_tokens`."""
    crop: CropSettings = field(default_factory=CropSettings)
    """Settings of cutting rows."""
    styles: StyleSettings = field(default_factory=StyleSettings)
    """Settings of rows with styles."""

    def __post_init__(self) -> None:
        counts = {"batch": MOST_AT_ONCE, "valid_rows": MOST_AT_ONCE} | dict.fromkeys(
            ("steps", "eval_every", "patience"), MOST_STEPS
        )
        limits = [("seed", 0, LARGEST_SEED), ("style_steps", 0, MOST_STEPS)]
        for key, least, most in [*((key, 1, most) for key, most in counts.items()), *limits]:
            if not least <= getattr(self, key) <= most:
                option = f"--{key.replace('_', '-')}"
                raise UserError(f"{option} is {getattr(self, key)}; it must be at least {least} and at most {most:,}")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype is {self.dtype!r}; it must be {' or '.join(DTYPES)}")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate is {self.learning_rate}; it must be a finite number above 0")


@dataclass(frozen=True)
class PretrainResult:
    """Outcome of a pre-training run: `best` is the validation loss (nats a token) of the policy in `policy/`."""

    policy: Policy
    step: int
    best: float
    baselines: dict[str, float]
    stopped_early: bool


def pretrain(
    dataset: TokenDataset,
    size: PolicySize,
    settings: PretrainSettings,
    out: str | Path,
    resume: bool = False,
    stop: StopRequest | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    labels: Labels | None = None,
) -> PretrainResult:
    """Train until `steps`, early stopping or a stop request.

    `out` receives `policy/` (the best one), `checkpoints/` (what resume needs), `metrics.jsonl` and `curve.png`;
    `report` is called with every line of metrics. A resumed run gives the weights of one never interrupted.

    labels : style and split of every piece of a dataset that `evened` made; rows are then balanced over styles, and a
             line of metrics has the validation loss of each, `valid_loss/STYLE`

    Raises UserError when the dataset is too small for a validation split, `out` already holds another run, nothing can
    be resumed there, another process trains there, or `settings.init` is of another vocabulary.
    """
    out = make_folder(out)
    with FolderLock(out, "training", LEASE_S):
        return _pretrain(dataset, size, settings, out, resume, stop, report, labels)


def _pretrain(
    dataset: TokenDataset,
    size: PolicySize,
    settings: PretrainSettings,
    out: Path,
    resume: bool,
    stop: StopRequest | None,
    report: Callable[[dict[str, Any]], None] | None,
    labels: Labels | None,
) -> PretrainResult:
    """`pretrain`, with nobody else in the folder."""
    policy = _initial(size, dataset.vocab, settings).to(settings.device)
    size = policy.size
    train, parts, sample = _styled(dataset, labels, settings) if labels else _plain(dataset, settings)
    baselines = ngram_losses(sample, np.concatenate(list(parts.values())), size.vocab_size, train.pad)
    optimizer = make_optimizer(policy, settings.learning_rate, (0.9, 0.95), settings.weight_decay)
    backbone = torch.compile(policy.model) if settings.compile else policy.model
    record = {"settings": asdict(settings), "size": asdict(size), "pieces": len(dataset), "baselines": baselines}
    record["styles"] = list(parts) if labels else []
    metrics, checkpoints, saved = _opened(out, policy, optimizer, record, resume)
    step, best, stale = saved["step"], saved["best"], saved["stale"]
    window: list[tuple[Tensor, int]] = []
    clock = time.perf_counter()
    while step < settings.steps and stale < settings.patience and not stop:
        rate = scheduled_rate(
            step, settings.steps, settings.learning_rate, "cosine", settings.warmup, settings.final_rate
        )
        rows = train.rows(np.random.default_rng([settings.seed, 1, step]), settings.batch)
        set_learning_rate(optimizer, rate)
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss = _loss(policy, backbone, rows, train.pad, settings.device)
        if not loss.isfinite():
            raise UserError(f"the loss is no longer finite at step {step + 1}; lower --learning-rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        window.append((loss.detach(), int((rows != train.pad).sum())))
        line: dict[str, Any] = {"step": step, "train_loss": float(window[-1][0]), "learning_rate": rate}
        if step % settings.eval_every == 0 or step == settings.steps:
            seconds = time.perf_counter() - clock
            line["train_loss"] = float(torch.stack([v for v, _ in window]).mean())
            line["tokens_per_s"] = sum(n for _, n in window) / seconds
            line |= _valid_losses(policy, parts, train.pad, settings.device)
            stale = 0 if line["valid_loss"] < best else stale + 1
            if not stale:
                best = line["valid_loss"]
                save_policy(policy, out / "policy")
            metrics.append(line)
            checkpoints.save(step, policy, optimizer, {**record, "best": best, "stale": stale})
            window.clear()
            clock = time.perf_counter()
        if report:
            report(line)
    if step > checkpoints.step:
        checkpoints.save(step, policy, optimizer, {**record, "best": best, "stale": stale})
    draw_curve(metrics.lines(), baselines, out / "curve.png")
    finished = load_policy(out / "policy") if (out / "policy").exists() else policy
    return PretrainResult(finished, step, best, baselines, stale >= settings.patience)


def _opened(
    out: Path, policy: Policy, optimizer: torch.optim.Optimizer, record: dict[str, Any], resume: bool
) -> tuple[JsonLines, Checkpoints, dict[str, Any]]:
    """Files of a run, and the state it goes on from; on resume that is put into policy and optimizer."""
    metrics, checkpoints = JsonLines(out / "metrics.jsonl", _whole), Checkpoints(out / "checkpoints")
    saved: dict[str, Any] = {"step": 0, "best": math.inf, "stale": 0}
    if resume:
        saved = checkpoints.load(policy, optimizer)
        for path, why in checkpoints.passed_over.items():
            print(f"passed over {path.name}: {why}", file=sys.stderr)
        _check_same_run(saved, record, out)
    elif checkpoints.all() or metrics.lines():
        raise UserError(f"{out} already holds a run; add --resume, or choose another --out")
    metrics.forget_after(saved["step"])
    if metrics.damaged:
        print(f"{metrics.told}; kept in {metrics.aside}", file=sys.stderr)
    return metrics, checkpoints, saved


def _initial(size: PolicySize, vocab: Vocabulary, settings: PretrainSettings) -> Policy:
    """The policy before the first step, which speaks `vocab`."""
    if not settings.init:
        return Policy(size, vocab).initialise(torch.Generator().manual_seed(settings.seed))
    begun = load_policy(settings.init)
    if begun.vocab.tokens != vocab.tokens:
        raise UserError(f"--init {settings.init} has another vocabulary than the dataset; leave one of the two out")
    policy = Policy(begun.size, vocab)
    policy.load_state_dict(begun.state_dict())
    return policy


def _plain(
    dataset: TokenDataset, settings: PretrainSettings
) -> tuple[Cropper, dict[str, np.ndarray], list[np.ndarray]]:
    """Rows to train on, validation rows, and the pieces that the n-gram models see."""
    train_pieces, valid_pieces = split_pieces(len(dataset), settings.valid_share, settings.seed)
    train, valid = (Cropper(dataset, pieces, settings.crop) for pieces in (train_pieces, valid_pieces))
    rows = valid.rows(np.random.default_rng([settings.seed, 0]), settings.valid_rows, augment=False)
    return train, {"": rows}, [dataset.piece(p) for p in train_pieces]


def _styled(
    dataset: TokenDataset, labels: Labels, settings: PretrainSettings
) -> tuple[Cropper, dict[str, np.ndarray], list[np.ndarray]]:
    """`_plain` with styles: validation rows of each style, as many of one as of another; n-grams of random rows."""
    train, valid = (
        style_cropper(dataset, labels, split, settings.crop, settings.styles) for split in ("train", "valid")
    )
    each = -(-settings.valid_rows // len(valid.tokens))
    random = np.random.default_rng([settings.seed, 0])
    parts = {style: valid.rows_of(style, random, each) for style in valid.tokens}
    sample = train.rows(np.random.default_rng([settings.seed, 3]), NGRAM_ROWS)
    return train, parts, [row[row != train.pad] for row in sample]


def valid_rows(dataset: TokenDataset, settings: PretrainSettings, labels: Labels | None = None) -> np.ndarray:
    """The validation rows of a run with these settings, int64 [B, T + 1]."""
    _, parts, _ = _styled(dataset, labels, settings) if labels else _plain(dataset, settings)
    return np.concatenate(list(parts.values()))


def split_pieces(pieces: int, valid_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Piece numbers for training and validation, a seeded random split; raises UserError when one side is empty."""
    order = np.random.default_rng([seed, 2]).permutation(pieces)
    held = round(pieces * valid_share) or 1
    if held >= pieces:
        raise UserError(f"{pieces} pieces are too few to keep some for validation; add MIDI files")
    return np.sort(order[held:]), np.sort(order[:held])


@torch.no_grad()
def evaluate(policy: Policy, rows: np.ndarray, pad: int, device: str = "cpu") -> float:
    """Mean validation loss, nats a token, over rows [B, T + 1]."""
    total = count = 0.0
    for batch in np.array_split(rows, -(-len(rows) // _EVAL_BATCH)):
        real = int((batch[:, 1:] != pad).sum())
        total += float(_loss(policy, policy.model, batch, pad, device)) * real
        count += real
    return total / count


def _valid_losses(policy: Policy, parts: dict[str, np.ndarray], pad: int, device: str) -> dict[str, float]:
    """The validation loss over all rows, and that of every style where there are styles."""
    losses = {style: evaluate(policy, rows, pad, device) for style, rows in parts.items()}
    if len(losses) == 1:
        return {"valid_loss": next(iter(losses.values()))}
    counts = [int((rows[:, 1:] != pad).sum()) for rows in parts.values()]
    mean = float(np.average(list(losses.values()), weights=counts))
    return {"valid_loss": mean, **{f"valid_loss/{style}": loss for style, loss in losses.items()}}


def _loss(policy: Policy, backbone: Callable[[Tensor], Tensor], rows: np.ndarray, pad: int, device: str) -> Tensor:
    inputs, target = (torch.from_numpy(x).to(device) for x in targets(rows, pad))
    logits = policy.lm_head(backbone(inputs)).float()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED)


def _check_same_run(saved: dict[str, Any], record: dict[str, Any], out: Path) -> None:
    if not saved:
        raise UserError(f"nothing to resume in {out}; leave out --resume to start")
    # steps and speed may change on resume, what the numbers depend on may not
    free = {"steps": 0, "compile": False, "device": "", "patience": 0, "style_steps": 0}
    defaults = json.loads(json.dumps(asdict(PretrainSettings())))  # of runs that are older than a setting
    for key in ("settings", "size", "pieces", "styles"):
        ours, theirs = json.loads(json.dumps(record[key])), saved.get(key, [])
        if key == "settings":
            ours, theirs = {**ours, **free}, {**defaults, **theirs, **free}
        if ours != theirs:
            raise UserError(f"{out} was started with other {key}; resume with the same, or choose another --out")


def _whole(line: dict[str, Any]) -> bool:
    """Whether a line of metrics has what the curve shows."""
    return all(isinstance(line.get(key), int | float) for key in ("train_loss", "valid_loss"))


def draw_curve(lines: list[dict[str, Any]], baselines: dict[str, float], path: Path) -> None:
    """The loss curve of a pre-training run as a PNG."""
    if not lines:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("train_loss", "training"), ("valid_loss", "validation")):
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], label=label)
    for name, value in baselines.items():
        axes.axhline(value, linestyle=":", color="gray")
        axes.annotate(name, (lines[-1]["step"], value), ha="right", va="bottom", color="gray")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.legend()
    with os_errors_as_user_errors(path):
        figure.savefig(path, dpi=120)
