"""Weights of M3, CLaMP 2 and CLaMP 3 from their published files, from the hub, or drawn at random.

A published file also holds an optimizer and encoders of text and audio, several times what is needed to read notes. It
is mapped, not read; what is needed is kept as safetensors in the cache, and the file is not opened again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_file, cache_folder
from fastsmart.machine.hub import fetch
from fastsmart.machine.torch_checkpoints import first_difference, read_plain
from fastsmart.reward.clamp3.architecture import KINDS, Kind, Size, kind_of, music_shapes, size_of

# name of a published model -> hub repository and file
PUBLISHED = {
    "m3": (
        "sander-wood/clamp2",
        "weights_m3_p_size_64_p_length_512_t_layers_3_p_layers_12_h_size_768_lr_0.0001_batch_16_mask_0.45.pth",
    ),
    "clamp2": (
        "sander-wood/clamp2",
        "weights_clamp2_h_size_768_lr_5e-05_batch_128_scale_1_t_length_128_t_model_FacebookAI_xlm-roberta-base_"
        "t_dropout_True_m3_True.pth",
    ),
    "clamp3": (
        "sander-wood/clamp3",
        "weights_clamp3_c2_h_size_768_t_model_FacebookAI_xlm-roberta-base_t_length_128_a_size_768_a_layers_12_"
        "a_length_128_s_size_768_s_layers_12_p_size_64_p_length_512.pth",
    ),
}
_POSITIONS = ".position_ids"  # 0, 1, 2 ...: a buffer that older transformers saved
_RANDOM = "random_seed"  # marks weights that were drawn, not trained


@dataclass(frozen=True)
class Weights:
    """The encoder of music of a checkpoint, as read and checked.

    state  : float32 tensors by upstream's names
    sha256 : of the tensors, whatever file they came in
    random : whether they were drawn and not trained
    """

    kind: Kind
    size: Size
    state: dict[str, Tensor]
    sha256: str
    random: bool


def read_weights(checkpoint: str | Path) -> Weights:
    """The encoder of music of a published file, or of the name of one, see `PUBLISHED`; "random" draws one of seed 0.

    Raises UserError when it is missing, truncated, of another model, or holds anything but tensors and plain values.
    """
    if str(checkpoint) == "random":
        kind = next(kind for kind in KINDS if kind.name == "CLaMP 2")
        return Weights(kind, Size(), random_state(kind, Size(), 0), "random", random=True)
    path = checkpoint_path(checkpoint)
    kept = cache_folder("clamp") / f"{_mark(path)}.safetensors"
    if kept.is_file():
        with suppress(UserError):  # damaged: made anew
            return _from_cache(kept)
    content = _load(path)
    kind, state = _music(path, content["model"])
    size = _size(path, kind, state)
    if wrong := first_difference(state, music_shapes(kind, size)):
        raise UserError(f"{path} holds the weights of another model than {kind.name}: {wrong}")
    state = {name: tensor.float() for name, tensor in state.items()}
    weights = Weights(kind, size, state, _hash(state), _RANDOM in content)
    with suppress(UserError):  # without a cache it is only slower
        _keep(kept, weights)
    return weights


def read_text_state(checkpoint: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder of text of a published file by transformers' names, and its projection's `weight` and `bias`.

    The tensors are mapped from the file. Raises UserError as `read_weights` does, and where the model has none.
    """
    path = checkpoint_path(checkpoint)
    model = _load(path)["model"]
    kind, _ = _music(path, model)
    text, projection = _below(model, kind.text), _below(model, kind.text_projection)
    if not kind.text or set(projection) != {"weight", "bias"}:
        raise UserError(f"{path} has no encoder of text ({kind.name}); name the published file of CLaMP 2 or CLaMP 3")
    return text, projection


def checkpoint_path(checkpoint: str | Path) -> Path:
    """Path of a checkpoint, fetched from the hub where it is the name of one; raises UserError where there is none."""
    if str(checkpoint) in PUBLISHED:
        repository, name = PUBLISHED[str(checkpoint)]
        try:
            return fetch(repository, name)
        except UserError as error:
            raise UserError(f"cannot fetch {repository} from the hub; {_how_to_get_them()}") from error
    if not str(checkpoint):
        raise UserError(f"reward.clamp_checkpoint names no weights; {_how_to_get_them()}")
    if not Path(checkpoint).is_file():
        raise UserError(f"no weights of CLaMP at {checkpoint}; {_how_to_get_them()}")
    return Path(checkpoint)


def random_state(kind: Kind, size: Size, seed: int) -> dict[str, Tensor]:
    """Tensors drawn at random, of a scale that keeps clips that differ apart."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in music_shapes(kind, size).items():
        noise = torch.randn(shape, generator=generator)
        if "LayerNorm" in name:
            state[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif len(shape) == 1:
            state[name] = 0.05 * noise
        else:  # 64 rows of a patch's embedding are added up
            state[name] = noise * (0.125 if "embedding" in name else 0.7 / shape[1] ** 0.5)
    return state


def make_random_weights(path: str | Path, kind: Kind, seed: int = 0, size: Size | None = None) -> Path:
    """Write weights drawn at random as a published file holds them, without an encoder of text and with an optimizer.

    Vectors made with them mean nothing, but cost and vary as real ones do. The file is marked, so that whoever reads it
    can say so. Raises UserError when it cannot be written.
    """
    state = random_state(kind, size or Size(), seed)
    content = {"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 1, _RANDOM: seed}
    with atomic_file(path) as part:
        torch.save(content, part)
    return Path(path)


def _load(path: Path) -> dict[str, Any]:
    """Content of a published file, its tensors mapped; raises UserError for any other file."""
    content = read_plain(path, _how_to_get_them(), mapped=True)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path} is no checkpoint of CLaMP, it lacks 'model'; {_how_to_get_them()}")
    return content


def _music(path: Path, model: Mapping[str, Any]) -> tuple[Kind, dict[str, Any]]:
    """The model that it is, and its tensors that read music."""
    kind = kind_of(model)
    if kind is None:
        raise UserError(f"{path} holds another model than M3, CLaMP 2 or CLaMP 3; {_how_to_get_them()}")
    heads = tuple(f"{part}." for part in (kind.music, kind.music_projection) if part)
    names = [name for name in model if name.startswith(heads) and not name.endswith(_POSITIONS)]
    return kind, {name: model[name] for name in names}


def _size(path: Path, kind: Kind, state: Mapping[str, Tensor]) -> Size:
    try:
        return size_of(state, kind)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no whole checkpoint of {kind.name} ({error}); {_how_to_get_them()}") from error


def _below(model: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """Tensors whose name begins with that of a part, without it."""
    found = {name.removeprefix(f"{part}."): tensor for name, tensor in model.items() if name.startswith(f"{part}.")}
    return {name: tensor for name, tensor in found.items() if not name.endswith(_POSITIONS.removeprefix("."))}


def _hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of float32 tensors and their names, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().data)
    return digest.hexdigest()


def _mark(path: Path) -> str:
    """Name under which the tensors of a file are kept: it changes when the file does."""
    status = path.resolve().stat()
    text = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _keep(kept: Path, weights: Weights) -> None:
    from safetensors.torch import save_file

    about = {"kind": weights.kind.name, "sha256": weights.sha256} | ({_RANDOM: "0"} if weights.random else {})
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {kept}: {error.strerror}") from error
    with atomic_file(kept) as part:
        save_file(weights.state, part, metadata=about)


def _from_cache(kept: Path) -> Weights:
    """Weights that `_keep` wrote; raises UserError where it is damaged."""
    import safetensors

    try:
        with safetensors.safe_open(kept, framework="pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        kind = next(kind for kind in KINDS if kind.name == about["kind"])
        sha256 = about["sha256"]
    except (OSError, KeyError, StopIteration, safetensors.SafetensorError) as error:
        raise UserError(f"{kept} is damaged ({error}); delete it") from error
    size = _size(kept, kind, state)
    if wrong := first_difference(state, music_shapes(kind, size)):
        raise UserError(f"{kept} is damaged: {wrong}; delete it")
    return Weights(kind, size, state, sha256, _RANDOM in about)


def _how_to_get_them() -> str:
    names = "', '".join(PUBLISHED)
    return (
        f"download the .pth of the hub model sander-wood/clamp2 or sander-wood/clamp3 and name it in "
        f"reward.clamp_checkpoint (or --checkpoint), or name '{names}', which fetch it; to try things out, name "
        f"'random', whose scores mean nothing"
    )
