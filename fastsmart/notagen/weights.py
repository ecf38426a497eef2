"""NotaGen's weights from the files its authors publish, recognised by their tensors; and random ones in their form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.machine.files import atomic_file
from fastsmart.machine.hub import fetch
from fastsmart.machine.torch_checkpoints import first_difference, read_plain
from fastsmart.notagen.model import HEAD_SIZE, NotaGen, NotaGenSize, shapes
from fastsmart.policy.hf_format import step_folders

HUB_ID = "ElectricAlexis/NotaGen"
SUFFIXES = (".pth", ".pt")
CHECKPOINTS = "checkpoints"  # of a run folder
HEAD = "char_level_decoder.base.lm_head.weight"
WORDS = "char_level_decoder.base.transformer.wte.weight"
_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")  # which older versions of transformers store
SMALL, MEDIUM, LARGE = NotaGenSize(12, 3, 768, 2048), NotaGenSize(16, 3, 1024, 2048), NotaGenSize(20, 6, 1280, 1024)


@dataclass(frozen=True)
class Published:
    """A checkpoint of the hub repository: its file, its size, and whether it knows style prompts."""

    file: str
    size: NotaGenSize
    styled: bool = False


def _pretrained(layers: str, rate: str, batch: int) -> str:
    return f"weights_notagen_pretrain_p_size_16_{layers}_lr_{rate}_batch_{batch}.pth"


PUBLISHED = {
    "notagen-small": Published(_pretrained("p_length_2048_p_layers_12_c_layers_3_h_size_768", "0.0002", 8), SMALL),
    "notagen-medium": Published(_pretrained("p_length_2048_p_layers_16_c_layers_3_h_size_1024", "0.0001", 4), MEDIUM),
    "notagen-large": Published(_pretrained("p_length_1024_p_layers_20_c_layers_6_h_size_1280", "0.0001", 4), LARGE),
    "notagen-finetuned": Published(
        "weights_notagen_pretrain-finetune_p_size_16_p_length_1024_p_layers_c_layers_6_20_h_size_1280_lr_1e-05_"
        "batch_1.pth",
        LARGE,
        True,
    ),
    "notagen-rl3": Published(
        "weights_notagen_pretrain-finetune-RL3_beta_0.1_lambda_10_p_size_16_p_length_1024_p_layers_20_c_layers_6_"
        "h_size_1280_lr_1e-06_batch_1.pth",
        LARGE,
        True,
    ),
    "notagen-x": Published("weights_notagenx_p_size_16_p_length_1024_p_layers_20_h_size_1280.pth", LARGE, True),
}


def is_notagen(source: str) -> bool:
    """Whether a person who names this policy means NotaGen: a published name, a file, a folder of one, or a run's."""
    path = _newest(Path(source))
    return source in PUBLISHED or path.suffix.lower() in SUFFIXES or (path.is_dir() and bool(_files(path)))


def load_notagen(source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> NotaGen:
    """A network in eval mode from a published name, a checkpoint file, a folder that holds one, or a run folder.

    Nothing in the file is run; its optimizer state, where it has one, is left on the disk. Raises UserError when it is
    missing, truncated, of another model, or holds numbers that are not finite.
    """
    path = _located(source)
    tensors = _checked(path, _read(path))
    size = size_of(tensors)
    with torch.device("meta"):
        model = NotaGen(size)
    model.adopt({name: tensor.to(device, dtype) for name, tensor in tensors.items()})
    return model.eval()


def size_of(tensors: Mapping[str, Tensor]) -> NotaGenSize:
    """The size that these tensors have; raises KeyError or ValueError where they are no NotaGen's."""
    positions = tensors["patch_level_decoder.base.wpe.weight"]
    layers = [
        1 + max(int(m[1]) for name in tensors if (m := re.match(rf"{re.escape(level)}\.h\.(\d{{1,4}})\.", name)))
        for level in ("patch_level_decoder.base", "char_level_decoder.base.transformer")
    ]
    patches, hidden = positions.shape
    if hidden % HEAD_SIZE:
        raise ValueError(f"a width of {hidden} is no multiple of {HEAD_SIZE}")
    return NotaGenSize(layers[0], layers[1], hidden, patches)


def random_model(size: NotaGenSize, seed: int = 0, scale: float = 1.0) -> NotaGen:
    """A network whose weights are drawn at random: what it writes means nothing, and costs what a real one costs.

    scale : of the matrices and embeddings; at 1 they are as GPT-2 begins, and characters nearly equally likely
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = NotaGen(size)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(size).items():
        noise = torch.randn(shape, generator=generator).mul_(0.02)
        if ".ln_" in name:
            tensors[name] = noise + float(name.endswith("weight"))
        else:
            tensors[name] = noise if name.endswith("bias") else noise.mul_(scale)
    return model.adopt(tensors).eval()


def save_published(model: NotaGen, path: str | Path, **more: Any) -> Path:
    """Write a network as the published files hold one: below `model`, the head beside the embedding it is tied to.

    more : what else such a file has, as `optimizer` or `epoch`

    Raises UserError when it cannot be written.
    """
    state = {name: p.detach().cpu() for name, p in model.named_parameters()}
    with atomic_file(path) as part:
        torch.save({"model": state | {HEAD: state[WORDS]}, **more}, part)
    return Path(path)


def _newest(path: Path) -> Path:
    """The newest checkpoint of a run folder; anything else is itself."""
    found = step_folders(path / CHECKPOINTS) if (path / CHECKPOINTS).is_dir() else []
    return found[-1] if found else path


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())


def _located(source: str | Path) -> Path:
    path = Path(source)
    if str(source) in PUBLISHED and not path.exists():
        try:
            return fetch(HUB_ID, PUBLISHED[str(source)].file)
        except UserError as error:
            raise UserError(f"{error}; {_how_to_get_them()}") from error
    path = _newest(path)
    if path.is_dir():
        found = _files(path)
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise UserError(f"{path} must hold one checkpoint of NotaGen to be named as a policy, it holds {names}")
        return found[0]
    if not path.is_file():
        raise UserError(f"no NotaGen weights at {path}; {_how_to_get_them()}")
    return path


def _read(path: Path) -> dict[str, Any]:
    """The tensors of a file, which stay on the disk until they are read."""
    content = read_plain(path, _how_to_get_them(), mapped=True)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} is not a checkpoint of NotaGen: it has no weights under 'model'; {_how_to_get_them()}")
    return state


def _checked(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters, if they are those of the network we know; raises UserError naming the first that is not."""
    state = {name: tensor for name, tensor in state.items() if not _MASK.search(name)}
    head = state.pop(HEAD, None)
    try:
        size = size_of(state)
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint of NotaGen ({error}); {_how_to_get_them()}") from error
    wrong = first_difference(state, shapes(size))
    if not wrong and head is not None and not torch.equal(head, state[WORDS]):
        wrong = f"{HEAD} is not the embedding it should be tied to"
    if wrong:
        raise UserError(f"{path} holds the weights of another model than NotaGen: {wrong}")
    return state


def _how_to_get_them() -> str:
    return f"download one of the .pth files of the hub repository {HUB_ID} and name it"
