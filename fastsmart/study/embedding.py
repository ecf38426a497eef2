"""Outputs as points in what the base policy makes of them: a ruler that nothing trains on.

Hidden states of the base policy, whose weights no training touches, are averaged over the tokens of an excerpt. The
first 32 principal components of the outputs of the base itself are kept, and two excerpts are similar by a Gaussian
kernel whose width is the median distance between outputs of the base. All of it is fitted on the base and applied to
every policy: none can move its own ruler.

Shape letters: N outputs, K of them long enough, R excerpts of each, D numbers of a hidden state, C components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fastsmart.music.rarefaction import Excerpts
from fastsmart.policy.transformer import Policy
from fastsmart.tokens.token_batch import TokenBatch

COMPONENTS = 32
AT_ONCE = 32  # outputs in one forward pass


@torch.no_grad()
def excerpt_states(
    policy: Policy,
    prompts: TokenBatch,
    completions: TokenBatch,
    excerpts: Excerpts,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Mean last hidden state over the tokens of each excerpt of completions, float64 [K, R, D].

    The policy reads each whole output, prompt included; the states are averaged over the excerpt only. In float32.
    """
    means = np.zeros((*excerpts.start.shape, policy.size.hidden_size))
    lengths = prompts.lengths + completions.lengths
    order = np.argsort(lengths[excerpts.of], kind="stable")
    policy.eval()
    for first in range(0, len(order), AT_ONCE):
        part = order[first : first + AT_ONCE]
        rows = np.zeros((len(part), int(lengths[excerpts.of[part]].max())), np.int64)
        for row, k in zip(rows, part, strict=True):
            i = int(excerpts.of[k])
            row[: lengths[i]] = np.concatenate([prompts.row(i), completions.row(i)])
        states = policy.hidden(torch.from_numpy(rows).to(policy.device)).double().cpu()
        sums = torch.nn.functional.pad(states.cumsum(1), (0, 0, 1, 0)).numpy()  # [part, T + 1, D]
        start = prompts.lengths[excerpts.of[part]][:, None] + excerpts.start[part]
        at = np.arange(len(part))[:, None]
        means[part] = (sums[at, start + excerpts.size] - sums[at, start]) / excerpts.size
        progress(first + len(part), len(order))
    return means


@dataclass(frozen=True)
class Embedding:
    """Principal components and a Gaussian kernel, fitted on the base's outputs.

    centre : float64 [D]
    axes   : float64 [D, C], orthonormal, C <= COMPONENTS
    width  : the kernel of two outputs at distance d is exp(-d² / (2 width²)); with width 0, 1 at distance 0, else 0
    """

    centre: np.ndarray
    axes: np.ndarray
    width: float

    @staticmethod
    def fit(states: np.ndarray) -> Embedding:
        """Fit to the `excerpt_states` [K, R, D] of the base's outputs."""
        rows = states.reshape(-1, states.shape[-1])
        centre = rows.mean(axis=0) if len(rows) else np.zeros(states.shape[-1])
        _, axes = np.linalg.eigh((rows - centre).T @ (rows - centre))
        axes = axes[:, ::-1][:, :COMPONENTS]
        points = (states - centre) @ axes
        distances = [np.sqrt(_squared_distances(p)[np.triu_indices(len(p), 1)]) for p in points.swapaxes(0, 1)]
        every = np.concatenate(distances) if distances else np.zeros(0)
        return Embedding(centre, axes, float(np.median(every)) if len(every) else 0.0)

    def similarities(self, states: np.ndarray) -> list[np.ndarray]:
        """The kernel matrix of each of the R excerpts of K outputs, float64 [K, K] each."""
        points = ((states - self.centre) @ self.axes).swapaxes(0, 1)
        if not self.width:
            return [(_squared_distances(p) == 0).astype(np.float64) for p in points]
        return [np.exp(-_squared_distances(p) / (2 * self.width**2)) for p in points]


def _squared_distances(points: np.ndarray) -> np.ndarray:
    """Distance of every two rows, [K, K]; exactly 0 on the diagonal and for equal rows."""
    from scipy.spatial.distance import cdist

    return cdist(points, points, "sqeuclidean")
