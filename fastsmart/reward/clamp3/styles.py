"""Real music of several styles as an encoder of music hears it: what clips are compared with.

Shape letters: W windows, S styles, D numbers of a vector.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_file
from fastsmart.reward.clamp3.reader import MusicReader
from fastsmart.reward.settings import CLAMP_WRITERS

FORMAT = "fastsmart clamp styles 1"


@dataclass(frozen=True)
class StylesAbout:
    """Conditions under which windows became vectors; whatever is compared with them must share them.

    kind, sha256 : of the encoder of music
    writer       : of `notes_text`
    window_s     : seconds of a window
    vocabulary   : SHA-256 of the vocabulary through whose tokens the pieces went
    styles       : S names
    provenance   : where the pieces came from
    """

    kind: str
    sha256: str
    writer: str
    window_s: float
    vocabulary: str
    styles: tuple[str, ...]
    provenance: str


@dataclass(frozen=True)
class RealStyles:
    """Windows of real pieces of S styles as vectors.

    vectors : float32 [W, D], not of length 1
    style   : int64 [W], number of each window's style
    piece   : int64 [W], number of the piece it is from
    """

    about: StylesAbout
    vectors: np.ndarray
    style: np.ndarray
    piece: np.ndarray

    @cached_property
    def centroids(self) -> np.ndarray:
        """Mean vector of each style, float64 [S, D]; long vectors weigh more, as in CLaMP-DPO (arXiv 2502.18008)."""
        return np.stack([self.vectors[self.style == s].mean(axis=0, dtype=np.float64) for s in range(self.count)])

    @property
    def count(self) -> int:
        """The number of styles, S."""
        return len(self.about.styles)

    def likeness(self, vectors: np.ndarray) -> np.ndarray:
        """Cosine of vectors [N, D] with the centroid of each style, float64 [N, S]."""
        return cosines(vectors, self.centroids)

    def likeness_unheard(self) -> np.ndarray:
        """Cosine of every window with the centroid of each style without the window's own piece, float64 [W, S].

        NaN where a style has no other piece.
        """
        result = np.empty((len(self.vectors), self.count))
        sums = np.stack([self.vectors[self.style == s].sum(axis=0, dtype=np.float64) for s in range(self.count)])
        for piece in np.unique(self.piece):
            rows = self.piece == piece
            centroids = sums.copy()
            own = self.style[rows][0]
            centroids[own] -= self.vectors[rows].sum(axis=0, dtype=np.float64)
            result[rows] = cosines(self.vectors[rows], centroids)
            if (self.style == own).sum() == rows.sum():
                result[rows, own] = np.nan
        return result

    def number(self, style: str) -> int:
        """Number of a style by name; raises UserError for one that is not there."""
        if style not in self.about.styles:
            raise UserError(f"no style {style!r} among the real ones; there are {', '.join(self.about.styles)}")
        return self.about.styles.index(style)

    def require_made_with(self, reader: MusicReader, path: str | Path) -> None:
        """Raise UserError unless the vectors were made with the weights of this reader."""
        if self.about.sha256 != reader.sha256:
            raise UserError(
                f"{path} was made with other weights ({self.about.kind}) than the checkpoint ({reader.kind}); make it "
                f"anew with: fastsmart style-stats --checkpoint CHECKPOINT"
            )

    def save(self, path: str | Path) -> None:
        """Write as safetensors; raises UserError when the file cannot be written."""
        from safetensors.numpy import save_file

        tensors = {"vectors": self.vectors, "style": self.style, "piece": self.piece}
        with atomic_file(path) as part:
            save_file(tensors, part, metadata={"format": FORMAT, "about": json.dumps(asdict(self.about))})

    @staticmethod
    def load(path: str | Path) -> RealStyles:
        """Read a file of `save`; raises UserError naming the file when it is missing, broken or of another kind."""
        import safetensors

        remedy = "make it with: fastsmart style-stats"
        if not Path(path).is_file():
            raise UserError(f"no real styles at {path or 'reward.clamp_styles'}; {remedy}")
        try:
            with safetensors.safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"it is not {FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in ("vectors", "style", "piece")}
                about = _checked(json.loads(metadata["about"]), tensors)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} does not hold real styles ({error}); {remedy}") from error
        return RealStyles(about, **tensors)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every vector of a [N, D] with every one of b [M, D], float64 [N, M]."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    return a @ b.T / np.maximum(lengths, np.finfo(np.float64).tiny)


def _checked(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> StylesAbout:
    """The conditions, if they fit the tensors; raises ValueError, KeyError or TypeError where `save` wrote neither."""
    checked = StylesAbout(**(about | {"styles": tuple(about["styles"])}))
    vectors, style, piece = tensors["vectors"], tensors["style"], tensors["piece"]
    if vectors.ndim != 2 or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError("its vectors are no finite float32 [W, D]")
    if style.shape != (len(vectors),) or piece.shape != style.shape or style.dtype.kind + piece.dtype.kind != "ii":
        raise ValueError("its windows have no style or piece each")
    if sorted(set(style.tolist())) != list(range(len(checked.styles))) or checked.writer not in CLAMP_WRITERS:
        raise ValueError("its styles are not those it names")
    return checked
