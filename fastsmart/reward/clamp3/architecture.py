"""The networks of M3, CLaMP 2 and CLaMP 3: their sizes, and the names and shapes of the tensors that are read.

All three hold one encoder of music, below different names: BERT (Devlin et al. 2019) over patches of 64 characters, the
embedding of a patch being a linear layer over its characters one-hot. CLaMP 2 (Wu et al. 2024, arXiv 2410.13267) and 3
(2025, arXiv 2502.10362) have a linear layer on top and XLM-R with another for text; M3, the first stage of CLaMP 2, has
neither.

Shape letters: D width, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastsmart.reward.clamp3.mtf import PATCH

CHARACTERS = 128
HEAD = 64  # width of an attention head
SEGMENT = 512  # patches that are read at once
TEXT_SEGMENT = 128  # tokens of text that are read at once
NORM_EPS = 1e-12


@dataclass(frozen=True)
class Kind:
    """One of the published models, by the names its tensors begin with; "" = it has no such part."""

    name: str
    music: str
    music_projection: str = ""
    text: str = ""
    text_projection: str = ""


# M3 last: "encoder" is a name that others use, too
KINDS = (
    Kind("CLaMP 3", "symbolic_model", "symbolic_proj", "text_model", "text_proj"),
    Kind("CLaMP 2", "music_model", "music_proj", "text_model", "text_proj"),
    Kind("M3", "encoder"),
)


@dataclass(frozen=True)
class Size:
    """Sizes that the shapes of the tensors leave open; the defaults are the published ones.

    out : of the vectors of a model with a projection
    """

    width: int = 768
    ffn: int = 3072
    layers: int = 12
    out: int = 768


def kind_of(names: Mapping[str, object]) -> Kind | None:
    """The model whose tensors have these names, None for another's."""
    for kind in KINDS:
        if f"{kind.music}.patch_embedding.weight" in names:
            return kind
    return None


def size_of(state: Mapping[str, Tensor], kind: Kind) -> Size:
    """The sizes of a state dict; raises KeyError, ValueError or IndexError where what tells them is missing."""
    layer = re.compile(rf"{re.escape(kind.music)}\.base\.encoder\.layer\.(\d+)\.")
    numbers = [int(m[1]) for name in state if (m := layer.match(name))]
    width = state[f"{kind.music}.patch_embedding.weight"].shape[0]
    if width % HEAD:
        raise ValueError(f"a width of {width} is no multiple of {HEAD}")
    ffn = state[f"{kind.music}.base.encoder.layer.0.intermediate.dense.weight"].shape[0]
    out = state[f"{kind.music_projection}.weight"].shape[0] if kind.music_projection else width
    return Size(width, ffn, max(numbers) + 1, out)


def music_shapes(kind: Kind, size: Size) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the encoder of music and its projection, by its name in a checkpoint."""
    d = size.width
    shapes = _pair("patch_embedding", d, PATCH * CHARACTERS)
    embeddings = "base.embeddings"
    shapes |= {
        f"{embeddings}.word_embeddings.weight": (1, d),
        f"{embeddings}.position_embeddings.weight": (SEGMENT, d),
        f"{embeddings}.token_type_embeddings.weight": (2, d),
    }
    shapes |= _pair(f"{embeddings}.LayerNorm", d) | _pair("base.pooler.dense", d, d)
    for i in range(size.layers):
        layer = f"base.encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _pair(f"{layer}.attention.{name}", d, d)
        shapes |= _pair(f"{layer}.intermediate.dense", size.ffn, d) | _pair(f"{layer}.output.dense", d, size.ffn)
        shapes |= _pair(f"{layer}.attention.output.LayerNorm", d) | _pair(f"{layer}.output.LayerNorm", d)
    shapes = {f"{kind.music}.{name}": shape for name, shape in shapes.items()}
    return shapes | (_pair(kind.music_projection, size.out, d) if kind.music_projection else {})


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
