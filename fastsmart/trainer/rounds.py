"""Rounds of completions that several steps learn from: sampled once, kept in the run's folder, found again on resume.

A round is sampled by the policy as it is at the round's first step. What has been made of a round lies in
`rounds/<name>-<number>.npz` from the moment it is whole. A run that goes on within a round finds it there; one that
goes on at the first step of a round takes it only where the same weights made it, and makes it again otherwise.

`RoundAlgorithm` is the step of all algorithms that learn so. Shape letters: N completions of a round, of all ranks.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.machine.distributed import Ranks
from fastsmart.machine.files import make_folder, write_atomic
from fastsmart.music.likeness import likeness, split_rows
from fastsmart.policy.hf_format import weights_hash
from fastsmart.policy.optimizer import forget_moments
from fastsmart.reward import Scores
from fastsmart.sampling import Rollout
from fastsmart.tokens.prompts import asked_styles
from fastsmart.tokens.token_batch import TokenBatch
from fastsmart.trainer.algorithm import StepResult
from fastsmart.trainer.batch import Batch, MicroBatch
from fastsmart.trainer.rollout_pipeline import Progress, ScoredRollout
from fastsmart.trainer.style_metrics import style_rewards
from fastsmart.trainer.trainer import Trainer
from fastsmart.trainer.update import Update, metrics, reference_logprobs, step_on_gradients

FOLDER = "rounds"
WEIGHTS_KEY = "weights_sha256"
TERM = "term "
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Round:
    """The completions of a round, as every rank has them.

    number  : from 0
    batch   : their scores, notes, lengths, prompts and histograms
    rollout : their tokens; log-probs are 0
    stats   : of the round's beginning: `kl` (nats a token) and `kl_per_completion` (nats) from the base,
              `token_mult_prob_error` of the sampler, `distance` of two clips of different prompts (0..1)
    """

    number: int
    batch: Batch
    rollout: Rollout
    stats: dict[str, float]


class Rounds:
    """The rounds of a run, one after the other; all ranks call the same methods.

    folder  : of the run
    section : of the settings that say how large a round is, by `prompts`, each with sampling.group completions, and how
              long, by `round_steps`; 0 of these = one round for the whole run
    start   : steps of the run before the first of these rounds, and rounds

    Raises UserError where a rank would be without a prompt.
    """

    def __init__(self, trainer: Trainer, folder: Path, section: str, start: tuple[int, int] = (0, 0)) -> None:
        settings, world = getattr(trainer.config, section), trainer.ranks.world
        self.start = start
        self.trainer, self.folder = trainer, folder / FOLDER
        self.prompts, self.steps = settings.prompts, settings.round_steps
        if self.prompts < world:
            raise UserError(f"{section}.prompts is {self.prompts}, fewer than the {world} ranks, and each needs one")

    @property
    def place(self) -> tuple[int, int]:
        """Number of the round that the next step belongs to, and of the step within it, both from 0."""
        steps, rounds = self.start
        done = self.trainer.steps_done - steps
        number, step = divmod(done, self.steps) if self.steps else (0, done)
        return rounds + number, step

    @property
    def first(self) -> int:
        """Number of the first round since the policy was last the base."""
        merge = self.trainer.merge
        if not merge or not self.steps:
            return 0
        return self.trainer.steps_done // merge.steps * (merge.steps // self.steps)

    @property
    def ends(self) -> bool:
        """Whether the steps done so far end a round after which another one is sampled."""
        return bool(self.steps) and self.place[1] == 0

    def current(self, progress: Progress | None = None) -> tuple[Round, ScoredRollout | None]:
        """The round that the next step belongs to, and this rank's completions where they have been drawn just now."""
        drawn: list[ScoredRollout] = []
        number = self.place[0]

        def sample() -> Arrays:
            drawn.append(self._sampled(number, progress))
            with self.trainer.worker.trace("gather"):
                return self._arrays(drawn[0])

        found = _round(number, self.kept("samples", sample), self.prompts, self.trainer.ranks)
        return found, drawn[0] if drawn else None

    def earlier(self, number: int) -> Round:
        """A round before the present one. Raises UserError where its file is missing or damaged."""
        return _round(number, _read(self.folder / f"samples-{number:04d}.npz"), self.prompts, self.trainer.ranks)

    def kept(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """What is kept of the current round under a name; made now where there is nothing that can be used.

        Raises UserError where it is missing or damaged within a round, whose first policy is gone.
        """
        number, step = self.place
        path, ranks = self.folder / f"{name}-{number:04d}.npz", self.trainer.ranks
        weights = weights_hash(self.trainer.policy) if ranks.leader and step == 0 else ""
        if ranks.broadcast(int(ranks.leader and _usable(path, weights))):
            return _read(path)
        if step:
            raise UserError(f"{path} is missing or damaged, and step {step} of its round needs it; copy it back, or "
                            "remove the run's checkpoints of that round")  # fmt: skip
        arrays = make()
        if ranks.leader:
            content = io.BytesIO()
            np.savez_compressed(content, **arrays, **{WEIGHTS_KEY: np.array(weights)})  # type: ignore[arg-type]
            make_folder(self.folder)
            write_atomic(path, content.getvalue())
        return arrays

    def _sampled(self, number: int, progress: Progress | None) -> ScoredRollout:
        """This rank's completions of a round, drawn by the policy as it is now."""
        self.trainer.sync_weights()
        return ScoredRollout.concat(list(self.trainer.worker.generate_round(number, self.prompts, progress)))

    def _arrays(self, scored: ScoredRollout) -> Arrays:
        """All that is kept of a round's completions, of all ranks."""
        ranks = self.trainer.ranks
        batch = Batch.gather(scored, self.prompts, ranks, with_rows=True)
        rollout = gather_rollout(scored.rollout, self.prompts, ranks)
        assert batch.rows is not None
        arrays = {name: np.asarray(getattr(rollout, name)) for name in _TOKENS}
        arrays |= {f"{TERM}{name}": values for name, values in batch.scores.terms.items()}
        arrays |= {"total": batch.scores.total, "notes": batch.notes, "rows": batch.rows}
        stats = self._drift(scored.rollout) | {"distance": self._distance(batch.rows)}
        return arrays | {"version": np.array(batch.version)} | {name: np.array(value) for name, value in stats.items()}

    def _distance(self, rows: np.ndarray) -> float:
        """Mean distance of the first clips of every two prompts; NaN where there is one prompt only."""
        first = split_rows(rows[:: len(rows) // self.prompts])
        apart = ~np.eye(self.prompts, dtype=bool)
        return 1.0 - float(likeness(first, first)[apart].mean()) if apart.any() else float("nan")

    @torch.no_grad()
    def _drift(self, rollout: Rollout) -> dict[str, float]:
        """How far the policy is from the base, by the estimator k3, and from its sampler, over the first completion of
        each prompt of this rank's and the other ranks' rollout."""
        trainer = self.trainer
        first = rollout.select(np.arange(0, len(rollout), trainer.config.sampling.group))
        batches = trainer.micro_batches(first)
        ours_of_all, base_of_all = (
            reference_logprobs(policy, batches, *trainer.forward_options)
            for policy in (trainer.policy, trainer.reference)
        )
        sums = np.zeros(4)
        for batch, ours, base in zip(batches, ours_of_all, base_of_all, strict=True):
            gap = (base - ours).double()
            error = (ours - batch.sampler_logprobs).double().abs().exp().sum()
            sums += [float((torch.expm1(gap) - gap).sum()), float(error), len(gap), len(batch.lengths)]
        kl, error, tokens, count = trainer.ranks.gather(sums[None], trainer.ranks.world).sum(0)
        return {"kl": kl / tokens, "kl_per_completion": kl / count, "token_mult_prob_error": error / tokens}


Made = TypeVar("Made")


class RoundAlgorithm(ABC, Generic[Made]):
    """An `Algorithm` in rounds: what is to be learnt from a round is made once, and every step learns some of it.

    folder : of the run, where its rounds lie
    start  : steps and rounds of the run before its first

    section : of the configuration, and of the settings that are `settings`
    making  : name in the trace of what `made_of` does
    """

    section: str
    making: str

    def __init__(self, trainer: Trainer, folder: Path, start: tuple[int, int] = (0, 0)) -> None:
        self.trainer, self.settings = trainer, getattr(trainer.config, self.section)
        self.rounds = Rounds(trainer, folder, self.section, start)
        self._held: tuple[Round, Made] | None = None
        self._last = np.zeros(0, np.int64)

    @abstractmethod
    def made_of(self, found: Round) -> Made:
        """What the steps of a round learn from; the same on every rank."""

    @abstractmethod
    def chosen(self, made: Made, number: int, step: int) -> np.ndarray:
        """Numbers int64 of what a step learns from; a function of seed, round and step besides."""

    @abstractmethod
    def learn(self, found: Round, made: Made, chosen: np.ndarray) -> Update:
        """Take an optimizer step, of whose gradient each rank computes its share."""

    @abstractmethod
    def about(self, found: Round, made: Made) -> tuple[np.ndarray, dict[str, Any]]:
        """Share of each completion, float [N], 0 where nothing is learnt from it, and the metrics of the round."""

    @abstractmethod
    def evidence_of(self, found: Round, made: Made, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of the last step's batch (see `Algorithm.evidence`)."""

    def step(self, progress: Progress | None = None) -> StepResult:
        trainer, (number, step) = self.trainer, self.rounds.place
        sampled: ScoredRollout | None = None
        if self._held is None or self._held[0].number != number:
            found, sampled = self.rounds.current(progress)
            with trainer.worker.trace(self.making):
                self._held = found, self.made_of(found)
        found, made = self._held
        if step == 0:
            forget_moments(trainer.optimizer)  # of the round before
        self._last = self.chosen(made, number, step)
        with trainer.worker.trace("update"):
            change = self.learn(found, made, self._last)
        measured = {name: found.stats[name] for name in ("kl", "kl_per_completion", "token_mult_prob_error")}
        change = replace(change, stats=change.stats | measured)
        used, about = self.about(found, made)
        line = metrics(trainer.steps_done + 1, found.batch, torch.from_numpy(used), change)
        line["round"] = {"number": number, "distance": found.stats["distance"], **about}
        if trainer.config.prompts.styles:
            prompts = TokenBatch.pack(
                [ids[:n] for ids, n in zip(found.rollout.prompt_ids, found.rollout.prompt_lengths, strict=True)]
            )
            line["styles"] = style_rewards(found.batch, asked_styles(prompts, trainer.policy.vocab))
        return StepResult(change, line, sampled, len(found.rollout) if sampled else 0)

    @property
    def state(self) -> dict[str, Any]:
        return {}

    @property
    def ends_round(self) -> bool:
        return self.rounds.ends

    def evidence(self) -> dict[str, np.ndarray]:
        assert self._held is not None
        return self.evidence_of(*self._held, self._last)

    def step_on(
        self, batches: Iterable[MicroBatch], add_gradient: Callable[[MicroBatch], Tensor], sums: int, pace: float = 1.0
    ) -> tuple[list[float], Update]:
        """Take an optimizer step on the gradients of this rank's micro-batches and the other ranks'.

        add_gradient : adds a micro-batch's gradient, and gives statistics of it, float64 [sums]
        pace         : share of the run's learning rate

        Gives the statistics, added up over all, and the update without `stats`.
        """
        trainer = self.trainer
        trainer.policy.train()
        total = torch.zeros(sums, dtype=torch.float64, device=trainer.device)
        for batch in batches:
            total += add_gradient(batch)
        how = pace * trainer.learning_rate, trainer.settings.max_grad_norm, trainer.ranks, trainer.worker.trace
        of_all, _, change = step_on_gradients(trainer.policy, trainer.optimizer, total, total[:0], *how)
        return of_all.tolist(), change


_TOKENS = ("prompt_ids", "prompt_lengths", "ids", "lengths", "group")
_STATS = ("kl", "kl_per_completion", "token_mult_prob_error", "distance")


def _round(number: int, arrays: Arrays, prompts: int, ranks: Ranks) -> Round:
    """A round from what is kept of it."""
    terms = {name.removeprefix(TERM): values for name, values in arrays.items() if name.startswith(TERM)}
    share, size, version = ranks.share(prompts), len(arrays["lengths"]) // prompts, int(arrays["version"])
    batch = Batch(
        Scores(terms, arrays["total"]),
        arrays["notes"],
        arrays["lengths"].astype(np.int64),
        arrays["group"].astype(np.int64),
        range(share.start * size, share.stop * size),
        version,
        arrays["rows"],
    )
    tokens = {name: arrays[name] for name in _TOKENS}
    rollout = Rollout(**tokens, logprobs=np.zeros(arrays["ids"].shape, np.float32), version=version)
    return Round(number, batch, rollout, {name: float(arrays[name]) for name in _STATS})


def gather_rollout(rollout: Rollout, prompts: int, ranks: Ranks) -> Rollout:
    """The completions of `prompts` prompts of all ranks in order, without log-probs, from this rank's."""
    share = len(ranks.share(prompts))
    widths = [ranks.max(ids.shape[1]) for ids in (rollout.prompt_ids, rollout.ids)]
    wide = [
        np.pad(ids, ((0, 0), (0, width - ids.shape[1])))
        for ids, width in zip((rollout.prompt_ids, rollout.ids), widths, strict=True)
    ]
    table = np.column_stack([rollout.prompt_lengths, rollout.lengths, *wide]).astype(np.float64)  # ids are below 2^24
    size = len(rollout) // share
    found = ranks.gather(table.reshape(share, -1), prompts).reshape(prompts * size, -1).astype(np.int32)
    prompt_ids, ids = np.split(found[:, 2:], [widths[0]], axis=1)
    which = np.repeat(np.arange(prompts, dtype=np.int32), size)
    none = np.zeros(ids.shape, np.float32)
    return Rollout(prompt_ids, found[:, 0], ids, found[:, 1], none, which, rollout.version)


def _usable(path: Path, weights: str) -> bool:
    """Whether a file can be read and, where weights are named, has been made by these."""
    try:
        made_by = str(_read(path)[WEIGHTS_KEY])
    except (UserError, KeyError):
        return False
    return not weights or made_by == weights


def _read(path: Path) -> Arrays:
    try:
        with open(path, "rb") as source, np.load(source, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it back") from error
