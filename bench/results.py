"""Results of benchmarks, each with the machine, the commit and the command that made it."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastsmart.machine.files import cpu_cores, processor
from fastsmart.machine.hardware import (
    cpu_family,
    installed_version,
    instruction_sets,
    library_limits,
    load_average,
    waiting,
)
from fastsmart.run.provenance import PACKAGES

# beside what fastsmart itself is built on
PEERS = ("transformers", "trl", "triton", "tinysoundfont", "liger_kernel", "onnxruntime", "openvino", "nncf", "torchao")


def write_result(path: str | Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON together with where they come from."""
    commit = ""
    if shutil.which("git"):
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "machine": {
            "processor": processor(),
            "family": cpu_family(),
            "instruction_sets": instruction_sets(),
            "held_back_by": library_limits(),
            "load_average": load_average(),
            "threads_wait": waiting(),
            "cores": cpu_cores(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
        },
        "packages": {name: version for name in (*PACKAGES, *PEERS) if (version := installed_version(name))},
        **figures,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
