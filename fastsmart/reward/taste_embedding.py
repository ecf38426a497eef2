"""Clips as points in what a frozen policy makes of them: for a taste, qualities that no feature has a name for.

Shape letters: N clips, K clips of the base, D numbers of a hidden state, C components.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.limits import MOST_COMPONENTS
from fastsmart.notes import NoteBatch

if TYPE_CHECKING:
    from fastsmart.policy.transformer import Policy

LONGEST = 256  # tokens of a clip that are read, from its beginning


@dataclass(frozen=True)
class ClipEmbedding:
    """Principal components of a policy's mean hidden state over a clip's tokens, fitted on the base's clips.

    The policy is frozen: a run may tune a copy of it, and clips stay where they are.

    policy  : its shipped name, folder or hub id, as `load_policy` takes it
    weights : `weights_hash` of it, so that no other policy is read by that name
    centre  : float64 [D]
    axes    : float64 [D, C], orthonormal, the first component varies most
    """

    policy: str
    weights: str
    centre: np.ndarray
    axes: np.ndarray

    @staticmethod
    def fit(policy: str, notes: NoteBatch, components: int) -> ClipEmbedding:
        """Fit to K clips of the base; raises UserError for no more clips with notes than components, or no policy."""
        policy = str(Path(policy).resolve()) if Path(policy).is_dir() else policy
        states = _states(policy, notes)
        known = states[np.isfinite(states).all(axis=1)]
        if len(known) <= components:
            raise UserError(f"{components} components need more clips with notes than {len(known)}; play more")
        centre = known.mean(axis=0)
        axes = np.linalg.svd(known - centre, full_matrices=False)[2][:components].T
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])  # else by chance
        return ClipEmbedding(policy, _frozen(policy)[1], centre, axes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the C components."""
        return tuple(f"embedding_{k}" for k in range(1, self.axes.shape[1] + 1))

    def __call__(self, notes: NoteBatch) -> np.ndarray:
        """Components of every clip, float64 [N, C]; NaN for one without notes that the policy can play.

        Raises UserError where the policy is gone or has other weights.
        """
        frozen, weights = _frozen(self.policy)
        if weights != self.weights or len(self.centre) != frozen.size.hidden_size:
            raise UserError(
                f"the policy {self.policy} has other weights than those the taste was learnt with; put them back, or "
                "learn the taste anew"
            )
        rows = _states(self.policy, notes) - self.centre
        return np.array([row @ self.axes for row in rows]).reshape(len(notes), -1)  # see `_states`

    def to_dict(self) -> dict[str, Any]:
        """Content as JSON has it."""
        return {
            "policy": self.policy,
            "weights": self.weights,
            "centre": self.centre.tolist(),
            "axes": self.axes.tolist(),
        }

    @staticmethod
    def from_dict(tree: dict[str, Any]) -> ClipEmbedding:
        """From `to_dict`; raises ValueError, KeyError or TypeError where something is missing or of another form."""
        centre, axes = np.array(tree["centre"], np.float64), np.array(tree["axes"], np.float64)
        fits = centre.ndim == 1 and axes.ndim == 2 and len(axes) == len(centre)
        if not fits or not 1 <= axes.shape[1] <= MOST_COMPONENTS or not np.isfinite([*centre, *axes.ravel()]).all():
            raise ValueError("an embedding whose numbers do not fit together")
        return ClipEmbedding(str(tree["policy"]), str(tree["weights"]), centre, axes)


@cache
def _frozen(policy: str) -> tuple[Policy, str]:
    """A policy on the CPU, read once in a process, and the hash of its weights."""
    from fastsmart.policy.hf_format import load_policy, weights_hash

    found = load_policy(policy)
    return found, weights_hash(found)


def _states(policy: str, notes: NoteBatch) -> np.ndarray:
    """Mean last hidden state over the tokens of each clip, float64 [N, D].

    One clip at a time: what a clip gets must not depend, not even by rounding, on those beside it.
    """
    import torch

    from fastsmart.tokens.phrase import encode_notes

    frozen, _ = _frozen(policy)
    vocab, found = frozen.vocab, np.full((len(notes), frozen.size.hidden_size), np.nan)
    longest = min(LONGEST, frozen.size.max_positions)
    for i in np.flatnonzero(notes.counts):
        try:
            ids = encode_notes(notes.select([int(i)]), vocab)
        except UserError:  # none of its notes is within the vocabulary
            continue
        ids = np.concatenate([[vocab.bos_id], ids])[:longest].astype(np.int64)
        with torch.inference_mode():
            found[i] = frozen.hidden(torch.from_numpy(ids)[None])[0].double().mean(dim=0).numpy()
    return found
