"""A Python as a bare GPU machine has it, made of links to the packages of this one."""

from __future__ import annotations

import re
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

THERE = ("torch", "numpy", "numba", "safetensors", "triton", "pytest", "hypothesis")  # and what these need


def bare_python(folder: Path) -> Path:
    """The interpreter of a new virtual environment in `folder`, in which nothing but `THERE` is installed.

    No fastsmart, no miditok, symusic, mido, pyfluidsynth, soundfile, tomli_w, vllm.
    """
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in with_requirements(THERE).values():
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (site / top).symlink_to(Path(str(package.locate_file(top))))
    return folder / "bin" / "python"


def with_requirements(names: tuple[str, ...]) -> dict[str, Distribution]:
    """Those of the named packages that are installed, and what they require, without their extras."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        needed = [requirement for requirement in found[name].requires or () if "extra ==" not in requirement]
        waiting += [re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in needed]
    return found
