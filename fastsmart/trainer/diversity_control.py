"""What keeps a run's outputs different from each other, as its steps use it.

`calibrate` samples the base policy once and keeps what the parts of `DiversitySettings` are measured by: units, strata,
the target. `DiversityControl.advantages` then takes the place of the group's. The pure functions are in fastsmart.grpo:
strata, witness, target, control. Shape letters: N clips of a step, J clips of the target, B bins.
"""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.grpo.advantages import group_advantages
from fastsmart.grpo.control import Controller
from fastsmart.grpo.settings import DiversitySettings
from fastsmart.grpo.strata import stratified_advantages
from fastsmart.grpo.witness import gated, witness
from fastsmart.machine.files import write_atomic
from fastsmart.music.likeness import likeness, split_rows
from fastsmart.music.reweighting import most_diverse
from fastsmart.sampling import Rollout
from fastsmart.sampling.rollout import RandomStream
from fastsmart.tokens.prompts import make_prompts
from fastsmart.trainer.batch import Batch, histogram_rows
from fastsmart.trainer.rollout_worker import RolloutWorker

CALIBRATION_FILE = "base.npz"
COLUMNS = ("reward", "notes", "prompt_lengths", "lengths")  # of it, a number a clip
TARGET_CLIPS = 512  # of the target, drawn by their weights where it has more: the cost of a step
CAP = 16.0  # a base clip may weigh at most so many times its share in the target, as the best of 16 would
FEWEST_NOTES = 16  # of a clip that may be in the target or earn anything for being rare
DIATONIC = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1], np.float64)  # the major scale on pitch class 0
TERCILES = (1 / 3, 2 / 3)


def calibrate(config: Config, worker: RolloutWorker, folder: Path, step: int) -> dict[str, np.ndarray]:
    """Outputs of the base policy on training openings, kept in `folder`: `COLUMNS` [n] each, `rows`, `ids` [n, L].

    `ids` are those of prompt and completion, padded with 0 on the right.

    The engine holds the base policy, or, where `step` is above 0, the file must be there. Every rank samples its share
    and gets all. Raises UserError when a run is resumed without the file, or it is damaged.
    """
    path, ranks = folder / CALIBRATION_FILE, worker.ranks
    if ranks.broadcast(int(path.is_file())):
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in (*COLUMNS, "rows", "ids")}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); copy it back, or start the run again") from error
    if step:
        raise UserError(f"{path} is missing, and only an untrained policy can make it; copy it back, or start again")
    count, parts = config.diversity.clips, []
    longest = make_prompts(config.prompts, worker.vocab, "train", 0, count).lengths.max() + config.sampling.max_tokens
    for scored in worker.generate_split("train", count, 1, RandomStream.CALIBRATE):
        rollout, ids = scored.rollout, np.zeros((len(scored.rollout), longest))
        for i, whole in enumerate(rollout.sequences()):
            ids[i, : len(whole)] = whole
        columns = [scored.scores.total, scored.notes.counts, rollout.prompt_lengths, rollout.lengths]
        parts.append(np.concatenate([np.stack(columns, axis=1), histogram_rows(scored.notes), ids], axis=1))
    table = ranks.gather(np.concatenate(parts).astype(np.float64), count).astype(np.float32)  # ids are below 2^24
    found = dict(zip(COLUMNS, table.T, strict=False))
    found |= {"rows": table[:, len(COLUMNS) : -longest], "ids": table[:, -longest:].astype(np.int32)}
    if ranks.leader:
        content = io.BytesIO()
        np.savez_compressed(content, **found)
        write_atomic(path, content.getvalue())
    return found


class DiversityControl:
    """Advantages with diversity in them, in units fixed by the base policy.

    base  : of `calibrate`
    state : of the checkpoint that a run goes on from

    unit           : standard deviation of the base's rewards
    base_diversity : 1 - the mean similarity of two base clips
    controller     : of the witness's weight

    Two clips' similarity is the mean of the intersections of their five histograms.
    """

    def __init__(self, settings: DiversitySettings, base: dict[str, np.ndarray], state: dict[str, Any] | None = None):
        self.settings = settings
        reward = base["reward"].astype(np.float64)
        if not np.isfinite(reward).any() or not np.nanstd(reward) > 0:
            raise UserError("the base policy's rewards are all the same, so [diversity] has no unit to measure in")
        self.unit, self.bar = float(np.nanstd(reward)), float(np.nanquantile(reward, settings.gate))
        self.controller = Controller(**state) if state else Controller(settings.weight, None, settings.weight)
        rows = split_rows(base["rows"])
        self.edges = {name: np.quantile(_centre(rows[name]), TERCILES) for name in ("register", "dynamics")}
        similar = likeness(rows, rows)
        apart = ~np.eye(len(reward), dtype=bool)
        self.base_diversity = 1.0 - float(similar[apart].mean())
        self.spread = float(similar.mean(1).std()) or 1.0
        good = np.isfinite(reward) & (base["notes"] >= FEWEST_NOTES)
        self.weights = self._weights(similar, np.where(good, reward, np.nan))
        chosen = np.flatnonzero(self.weights)
        if len(chosen) > TARGET_CLIPS:  # those that weigh most stand for all
            chosen = np.argsort(-self.weights, kind="stable")[:TARGET_CLIPS]
        self.target = {name: values[chosen] for name, values in rows.items()}
        self.target_weights = self.weights[chosen] / self.weights[chosen].sum()
        self.base = base

    def _weights(self, similar: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """The target: a weight for each base clip, float64 [n], 0 for those whose reward is NaN."""
        kept, weights = np.flatnonzero(np.isfinite(reward)), np.zeros(len(reward))
        if not len(kept):
            raise UserError(f"no clip of the base policy has {FEWEST_NOTES} notes and a reward, so there is no target")
        if self.settings.target == "base":
            weights[kept] = 1 / len(kept)
            return weights
        wanted = float(reward[kept].mean()) + self.settings.tilt * self.unit
        weights[kept] = most_diverse(similar[np.ix_(kept, kept)], reward[kept], wanted, CAP)
        return weights

    def rehearsal(self, seed: int, step: int) -> Rollout:
        """The target's clips that a step rehearses, drawn by their weights; a function of seed and step alone."""
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(RandomStream.CALIBRATE, step)))
        chosen = random.choice(len(self.weights), self.settings.rehearse, p=self.weights / self.weights.sum())
        prompts, lengths = (self.base[name][chosen].astype(np.int32) for name in ("prompt_lengths", "lengths"))
        rows = self.base["ids"][chosen]
        ids = np.zeros((len(chosen), int(lengths.max())), np.int32)
        for i, (row, start, length) in enumerate(zip(rows, prompts, lengths, strict=True)):
            ids[i, :length] = row[start : start + length]
        number = np.arange(len(chosen), dtype=np.int32)
        return Rollout(rows[:, : int(prompts.max())], prompts, ids, lengths, np.zeros(ids.shape, np.float32), number, 0)

    @property
    def state(self) -> dict[str, Any]:
        """State that a checkpoint keeps."""
        return asdict(self.controller)

    def advantages(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Advantage of each completion of all ranks, float32 [N], and what a line of metrics says about it.

        kept   : pairwise diversity of the step's clips over that of the base, clips of other groups only
        weight : of the witness, beside 1 for the reward
        """
        assert batch.rows is not None  # gathered wherever there is a control
        rows, reward = split_rows(batch.rows), batch.scores.total.astype(np.float64)
        advantage = self._of_reward(reward, rows, batch.group)
        similar = likeness(rows, rows)
        apart = batch.group[:, None] != batch.group[None, :]
        if not apart.any():
            apart = ~np.eye(len(reward), dtype=bool)
        kept = (1.0 - float(similar[apart].mean())) / self.base_diversity
        if self.settings.floor > 0:
            self.controller = self.controller.step(kept, self.settings.floor)
        weight = self.controller.weight if self.settings.floor > 0 else self.settings.weight
        if weight > 0:
            good = (np.nan_to_num(reward, nan=-np.inf) >= self.bar) & (batch.notes >= FEWEST_NOTES)
            value = gated(witness(likeness(rows, self.target), self.target_weights, similar, apart), good)
            advantage = (advantage + weight * (value - value.mean()) / self.spread) / (1.0 + weight)
        advantage[~np.isfinite(reward)] = 0.0
        return torch.from_numpy(advantage).float(), {"kept": kept, "weight": weight}

    def _of_reward(self, reward: np.ndarray, rows: dict[str, np.ndarray], group: np.ndarray) -> np.ndarray:
        """The reward's part of the advantages, float64 [N], in units of the base."""
        settings = self.settings
        if settings.stratify == 1:
            return (
                group_advantages(torch.from_numpy(reward), torch.from_numpy(group), "none").double().numpy() / self.unit
            )
        labels = [_key(rows["pitch_class"]) if name == "key" else self._tercile(rows, name) for name in settings.strata]
        return stratified_advantages(reward, labels, settings.stratify, self.unit)

    def _tercile(self, rows: dict[str, np.ndarray], name: str) -> np.ndarray:
        return np.digitize(_centre(rows[name]), self.edges[name])


def diversity_control(
    config: Config, worker: RolloutWorker, folder: Path, step: int, state: dict[str, Any] | None
) -> DiversityControl | None:
    """The control of a run, None where no part of it is on; samples the base policy at the run's beginning."""
    if not config.diversity.active:
        return None
    return DiversityControl(config.diversity, calibrate(config, worker, folder, step), state)


def _key(pitch_class: np.ndarray) -> np.ndarray:
    """The diatonic set that holds most notes, int64 [N], 0 .. 11; 12 for a clip without notes."""
    scales = np.stack([np.roll(DIATONIC, key) for key in range(12)], axis=1)
    return np.where(pitch_class[:, 12] > 0, 12, (pitch_class[:, :12] @ scales).argmax(1))


def _centre(rows: np.ndarray) -> np.ndarray:
    """Mean bin of each clip, float64 [N]; 0 without notes."""
    return rows[:, :-1].astype(np.float64) @ np.arange(rows.shape[1] - 1)
