"""Policies on disk, as Hugging Face and vLLM read them: config.json, model.safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastsmart.errors import UserError
from fastsmart.limits import require_kind, require_name
from fastsmart.machine.files import atomic_folder, os_errors_as_user_errors, read_file
from fastsmart.policy.device import usable_device
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.tokens.styles import STYLES_FILE
from fastsmart.tokens.vocabulary import TOKENIZER_FILE, Vocabulary, load_vocabulary

CONFIG_FILE = "config.json"
STATE_FILE = "state.json"  # of a run's checkpoint
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"  # of checkpoints split over several files


def save_policy(policy: Policy, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a policy as a Phi-3 checkpoint folder, with its MidiTok JSON; the folder appears in one step.

    Raises UserError when it cannot be written; what was there before then stays.
    """
    require_kind(policy, Policy, "policy", "what load_policy gives")
    require_kind(folder, (str, Path), "folder", "the name of a folder")
    with atomic_folder(folder) as part, os_errors_as_user_errors(Path(folder)):
        write_policy(policy, part, dtype)


def write_policy(policy: Policy, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The files of `save_policy`, into a folder that exists."""
    config = json.dumps(to_hf_config(policy.size, policy.vocab, dtype), indent=2)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    policy.vocab.save(folder)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in policy.named_parameters()}
    save_tensors(tensors, folder / WEIGHTS_FILE)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file; raises OSError when the disk is full, which the library itself calls otherwise."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_policy(
    source: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", vocabulary: str = ""
) -> Policy:
    """A policy in eval mode from a shipped name, a checkpoint folder, a run folder (its newest), or a hub id.

    vocabulary : preset or MidiTok JSON to use when the checkpoint has no tokenizer.json of its own

    Raises UserError when there is no such checkpoint, it is not of the Phi-3 layout, a tensor is missing or of the
    wrong shape, or the vocabulary is of another size than the weights; TypeError naming the argument.
    """
    require_name(source, "source", "the name or the folder of a policy")
    require_name(vocabulary, "vocabulary", "a preset or a MidiTok JSON")
    require_kind(dtype, torch.dtype, "dtype", "one of torch, such as torch.float32")
    usable_device(str(device), "device")
    locate = _locator(source)
    size = policy_size(source)
    if vocabulary:
        vocab = load_vocabulary(vocabulary)
    else:
        with suppress(UserError):
            locate(STYLES_FILE)  # from the hub, so that it lies beside the vocabulary
        try:
            vocab = load_vocabulary(locate(TOKENIZER_FILE))
        except UserError as error:
            raise UserError(f"{error}; name the vocabulary of this checkpoint with policy.vocabulary") from error
    if len(vocab) != size.vocab_size:
        raise UserError(
            f"{source} has weights for {size.vocab_size} tokens, but its vocabulary has {len(vocab)}; "
            "put the MidiTok JSON it was trained with beside it"
        )
    with torch.device("meta"):
        policy = Policy(size, vocab)
    tensors = _read_tensors(locate, source)
    expected = {name: tuple(p.shape) for name, p in policy.named_parameters()}
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{source} has no tensor {name}, which a Phi-3 policy of its config needs")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{source}: tensor {name} is {tuple(tensors[name].shape)}, its config says {shape}")
    policy.adopt({name: tensors[name].to(dtype) for name in expected})
    return policy.to(device=device, dtype=dtype).eval()


def policy_source(text: str) -> str:
    """Resolve what a person names as a policy: a run folder stands for its newest checkpoint, all else for itself.

    Raises UserError for a run that has no checkpoint yet.
    """
    folder = Path(text)
    if (folder / CONFIG_FILE).is_file():
        return text
    if (folder / "policy" / CONFIG_FILE).is_file():  # a pre-training run: its best
        return str(folder / "policy")
    found = step_folders(folder / "checkpoints")
    if not found and (folder / "config.toml").is_file():
        raise UserError(f"the run in {text} has no checkpoint yet")
    return str(found[-1]) if found else text


def step_folders(folder: Path, whole: bool = True) -> list[Path]:
    """The folders `step-000040`, oldest first; of those `whole` only what holds the file that is written last."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name)]
    return sorted((path for path in found if not whole or (path / STATE_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def policy_size(source: str | Path) -> PolicySize:
    """The size of the policy that `load_policy` would load, from its config.json; raises UserError as that does."""
    path = _locator(source)(CONFIG_FILE)
    try:
        return from_hf_config(json.loads(read_file(path).decode("utf-8")), str(path))
    except KeyError as error:
        raise UserError(f"{path} is not a Phi-3 configuration: it has no {error}; copy or save it again") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a Phi-3 configuration: {error}; copy or save it again") from error


def shipped_policies() -> list[str]:
    """Names of the policies inside the package."""
    root = resources.files("fastsmart.policy") / "shipped"
    return sorted(entry.name for entry in root.iterdir() if (entry / CONFIG_FILE).is_file()) if root.is_dir() else []


def shipped_file(name: str, file: str) -> Path:
    """Path of one file of a shipped policy."""
    return Path(str(resources.files("fastsmart.policy") / "shipped" / name / file))


def to_hf_config(size: PolicySize, vocab: Vocabulary, dtype: torch.dtype) -> dict:
    """The config.json of a Phi-3 checkpoint."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "max_position_embeddings": size.max_positions,
        "original_max_position_embeddings": size.max_positions,
        "rope_theta": size.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": size.rms_norm_eps,
        "tie_word_embeddings": size.tied_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "initializer_range": 0.02,
        "sliding_window": None,
        "use_cache": True,
        "pad_token_id": vocab.pad_id,
        "bos_token_id": vocab.bos_id,
        "eos_token_id": vocab.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def from_hf_config(config: dict, name: str) -> PolicySize:
    """The size of a Phi-3 checkpoint; raises UserError for what fastsmart's policy does not compute.

    Attention is over all positions before, so the longest sequence is no longer than a `sliding_window`.
    """
    if not isinstance(config, dict):
        raise UserError(f"{name} is not a Phi-3 configuration: it is no JSON object; copy or save it again")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    for bad, what in (
        (config.get("model_type") != "phi3", f"model_type {config.get('model_type')!r}, not 'phi3'"),
        (kind != "default", f"rotary scaling {kind!r}"),
        (partial != 1.0, f"partial_rotary_factor {partial}"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act {config.get('hidden_act')!r}"),
        (config.get("attention_bias", False), "attention_bias"),
    ):
        if bad:
            raise UserError(f"{name} has {what}, which fastsmart's policy does not compute")
    positions = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    return PolicySize(
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=int(config["num_attention_heads"]),
        num_kv_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        max_positions=min(positions, int(window)) if window else positions,
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def _locator(source: str | Path) -> Callable[[str], Path]:
    """A function from file name to path inside the checkpoint; it raises UserError for a file that is not there."""
    path = Path(policy_source(str(source)))
    if not path.is_dir() and str(source) in shipped_policies():
        path = shipped_file(str(source), "")
    if path.is_dir():

        def local(name: str) -> Path:
            if not (path / name).is_file():
                raise UserError(f"{path} is not a checkpoint folder: it has no {name}")
            return path / name

        return local
    if str(source).count("/") != 1 or path.is_absolute() or str(source).startswith("."):
        known = ", ".join(shipped_policies()) or "none"
        raise UserError(f"no policy {source}: give a checkpoint folder, a shipped name ({known}) or a hub id")
    from fastsmart.machine.hub import fetch

    return lambda name: fetch(str(source), name)


def _weight_files(index: Path) -> list[str]:
    """The files over which an index says the weights are split, all of them beside it."""
    try:
        names = sorted(set(json.loads(read_file(index).decode("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{index} is damaged: {error}; copy or save it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names the file {name!r}, which is not one beside it; copy or save it again")
    return names


def _read_tensors(locate: Callable[[str], Path], source: str | Path) -> dict[str, torch.Tensor]:
    try:
        files = [locate(WEIGHTS_FILE)]
    except UserError as error:
        try:
            path = locate(WEIGHTS_INDEX)
        except UserError:
            raise UserError(f"{error}; fastsmart reads safetensors only") from error
        files = [locate(name) for name in _weight_files(path)]
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                tensors.update({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged: {error}; copy or save it again") from error
    return tensors


class HasParameters(Protocol):
    """A network, or what holds one."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


def weights_hash(policy: HasParameters) -> str:
    """sha256 of the names and values of all parameters, hex."""
    digest = hashlib.sha256()
    for name, parameter in policy.named_parameters():
        digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
