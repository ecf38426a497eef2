"""Audiobox weights in their two published forms, from a file, a folder or the hub; and random ones in the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.machine.files import file_hash, os_errors_as_user_errors
from fastsmart.machine.hub import cached, fetch
from fastsmart.machine.torch_checkpoints import first_difference, read_plain
from fastsmart.reward.audiobox.architecture import Size, encoder_shapes, head_shapes, size_of
from fastsmart.reward.settings import AUDIOBOX_AXES

HUB_ID = "facebook/audiobox-aesthetics"
HUB_FILES = ("config.json", "model.safetensors")
_RANDOM = "random_seed"  # marks weights that were drawn, not trained


@dataclass(frozen=True)
class HeadConfig:
    """Shape of the heads as a checkpoint has it, by upstream's names; the published model fixes the rest."""

    proj_num_layer: int
    proj_ln: bool
    proj_dropout: float
    nth_layer: int
    proj_act_fn: str = "gelu"
    use_weighted_layer_sum: bool = True
    precision: str = "32"
    normalize_embed: bool = True
    output_dim: int = 1


@dataclass(frozen=True)
class Weights:
    """A checkpoint as read and checked.

    state  : tensors by upstream's names
    target : mean and standard deviation of the raters, by axis
    random : whether the tensors were drawn and not trained
    """

    head: HeadConfig
    state: dict[str, Tensor]
    target: dict[str, dict[str, float]]
    random: bool


def read_weights(checkpoint: str | Path) -> Weights:
    """Read a checkpoint in either of its published forms; see `AudioboxReward`. "random" draws weights of seed 0.

    Raises UserError when it is missing, truncated, of another model, or holds anything but tensors and plain values.
    """
    if not checkpoint or str(checkpoint) == HUB_ID:
        return _read_safetensors(_from_hub())
    if str(checkpoint) == "random":
        return _random_weights(Size(), 0)
    path = Path(checkpoint)
    if path.is_dir():
        inside = [path / "model.safetensors", path / "checkpoint.pt"]
        found = [file for file in inside if file.exists()]
        if not found:
            raise UserError(f"{path} holds neither model.safetensors nor checkpoint.pt; name the folder that does")
        path = found[0]
    if not path.is_file():
        raise UserError(f"no Audiobox weights at {path}; {_how_to_get_them()}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def cached_checkpoint() -> Path | None:
    """The published weights, if this machine's hub cache holds them."""
    found = [cached(HUB_ID, file) for file in HUB_FILES]
    return found[-1] if all(found) else None


def make_random_weights(path: str | Path, seed: int = 0, size: Size | None = None) -> Path:
    """Write weights drawn at random in the published format: `checkpoint.pt`, or safetensors with a config beside it.

    Scores made with them mean nothing, but cost and vary as real ones do: the tensors have the published names, shapes
    and dtype, and both our reader and upstream's load them. Files are marked, so that whoever reads them can say so.

    path : a name ending in .safetensors, or any other for the form of `checkpoint.pt`
    size : of the network; the published one by default

    Raises UserError when the file cannot be written.
    """
    from safetensors.torch import save_file

    path, weights = Path(path), _random_weights(size or Size(), seed)
    head, target = asdict(weights.head), weights.target
    with os_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(weights.state, path, metadata={_RANDOM: str(seed)})
            config = json.dumps(head | {"target_transform": target}, indent=2)
            path.with_name("config.json").write_text(config + "\n", encoding="utf-8")
        else:
            state = {f"model.{name}": tensor for name, tensor in weights.state.items()}
            torch.save({"state_dict": state, "model_cfg": head, "target_transform": target, _RANDOM: seed}, path)
    return path


def _random_weights(size: Size, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    head = HeadConfig(size.head_layers, True, 0.0, size.layers + 1)
    shapes = encoder_shapes(size) | head_shapes(size, layer_norm=True, dropout=False)
    state = {name: _drawn(name, shape, generator) for name, shape in shapes.items()}
    target = {axis: {"mean": 5.0 + 0.5 * i, "std": 1.5} for i, axis in enumerate(AUDIOBOX_AXES)}
    return Weights(head, state, target, random=True)


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A tensor whose scale keeps signals alive all the way up, so that clips that differ get scores that differ."""
    noise = torch.randn(shape, generator=generator)
    if name.startswith("layer_weights"):
        return noise
    if name.endswith(("grep_a", "weight_g")) or (name.endswith("weight") and len(shape) == 1):  # norms
        return 1.0 + 0.1 * noise
    if name.endswith("bias"):
        return 0.05 * noise
    if name.endswith("relative_attention_bias.weight"):
        return noise
    gain = 2.0**0.5 if "conv_layers" in name else 0.5
    if "proj_layer" in name:
        gain = 1.0 if shape[0] == 1 else 3.0  # ratings of clips that differ lie about a point apart, as people's do
    return noise * gain / noise[0].numel() ** 0.5


def _read_torch(path: Path) -> Weights:
    content = read_plain(path, _how_to_get_them())
    try:
        state = {re.sub(r"^model\.", "", key): tensor for key, tensor in content["state_dict"].items()}
        config, target = content["model_cfg"], content["target_transform"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an Audiobox checkpoint, it lacks {error}; {_how_to_get_them()}") from error
    return _checked(path, state, config, target, _RANDOM in content)


def _read_safetensors(path: Path) -> Weights:
    import safetensors

    beside = path.with_name("config.json")
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        target = config["target_transform"]
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            random = _RANDOM in (file.metadata() or {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read Audiobox weights from {path} and {beside.name} beside it ({error})") from error
    return _checked(path, state, config, target, random)


def _checked(path: Path, state: Mapping[str, Any], config: Any, target: Any, random: bool) -> Weights:
    """The weights, if they are those of the network we know; raises UserError naming the first thing that is not."""
    try:
        target = {axis: {key: float(target[axis][key]) for key in ("mean", "std")} for axis in AUDIOBOX_AXES}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say the mean and std of every axis in target_transform ({error})") from error
    try:
        required = {key: config[key] for key in ("proj_num_layer", "proj_ln", "proj_dropout", "nth_layer")}
        head = HeadConfig(**required | {key: config[key] for key in HeadConfig.__dataclass_fields__ if key in config})
        size = size_of(state, head.proj_num_layer)
        expected = encoder_shapes(size) | head_shapes(size, head.proj_ln, bool(head.proj_dropout))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not a checkpoint of Audiobox Aesthetics, it lacks {error}") from error
    wrong = first_difference(state, expected)
    fixed = {"proj_act_fn": "gelu", "use_weighted_layer_sum": True, "output_dim": 1, "nth_layer": size.layers + 1}
    for key, value in fixed.items():
        if getattr(head, key) != value:
            wrong = wrong or f"{key} is {getattr(head, key)!r} and not {value!r}"
    if wrong:
        raise UserError(f"{path} holds the weights of another model than Audiobox Aesthetics: {wrong}")
    return Weights(head, dict(state), target, random)


def _from_hub() -> Path:
    """Path of the published safetensors, from the cache or the network; `config.json` is fetched beside it."""
    try:
        path = [fetch(HUB_ID, file) for file in HUB_FILES][-1]
    except UserError as error:
        raise UserError(f"cannot fetch {HUB_ID} from the hub; {_how_to_get_them()}") from error
    digest = path.resolve().name  # the cache names a large file by its SHA-256
    if re.fullmatch(r"[0-9a-f]{64}", digest) and file_hash(path) != digest:
        raise UserError(f"{path} is damaged, its checksum is wrong; delete {path.resolve()} and run this again")
    return path


def _how_to_get_them() -> str:
    return (
        f"download {' and '.join(HUB_FILES)} (or checkpoint.pt) of the hub model {HUB_ID} into one folder and name it "
        f"in reward.audiobox_checkpoint (or --checkpoint); to try things out, name 'random', whose scores mean nothing"
    )
