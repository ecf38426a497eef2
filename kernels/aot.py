"""Compiles every kernel ahead of time, without a GPU: `python -m fastsmart.kernels.aot [sm_90 ...]`.

Prints registers, spills and shared memory of each configuration in a kernel file's `SHIPPED` list; exit code 1 when one
spills registers, 2 when Triton is not installed.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Footprint:
    """Resources of a compiled kernel: registers a thread, bytes of spill stores and loads a thread, bytes of shared
    memory a block."""

    registers: int
    spills: int
    shared: int


def main(arguments: Sequence[str]) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled; read when they are imported
    # Registers and spills are told where ptxas runs, which it does not for a kernel that Triton has kept
    os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    spilled = False
    print(f"{'kernel':36} {'target':7} {'registers':>9} {'spills, B':>9} {'shared, B':>9}")
    for shipped in shipped_kernels():
        for architecture in arguments or ARCHITECTURES:
            if int(architecture.removeprefix("sm_")) < shipped.since:
                continue
            found = footprint(shipped, architecture)
            spilled |= found.spills > 0
            print(
                f"{shipped.name:36} {architecture:7} {found.registers:9} {found.spills:9} {found.shared:9}", flush=True
            )
    return int(spilled)


def shipped_kernels() -> Iterator[Any]:
    """Every `Shipped` of every kernel file."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != "aot":
            yield from getattr(importlib.import_module(f"fastsmart.kernels.{module.name}"), "SHIPPED", [])


def compiled(shipped: Any, architecture: str) -> Any:
    """One configuration, compiled: its `asm["ptx"]` and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    capability = int(architecture.removeprefix("sm_"))
    names = shipped.kernel.arg_names
    constants = {name: value for name, value in shipped.constants.items() if name in names}
    if "PDL" in names:  # as `fastsmart.kernels.jit.overlapped` says
        constants["PDL"] = capability >= 90
    types = {name: kind for name, kind in shipped.types.items() if name in names}
    # as at a launch: torch's memory is aligned, and so is what `Shipped.aligned` names
    multiples = [name for name, kind in types.items() if kind[0] == "*" or name in shipped.aligned]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(shipped.kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def footprint(shipped: Any, architecture: str) -> Footprint:
    """Compile one configuration, and read what ptxas says that it takes."""
    said = io.StringIO()
    with redirect_stdout(said):
        kernel = compiled(shipped, architecture)
    told = said.getvalue() or ptxas(kernel.asm["ptx"], int(architecture.removeprefix("sm_")))
    registers = re.search(r"Used (\d+) registers", told)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", told)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas said nothing of registers and spills: {told}")
    return Footprint(int(registers[1]), sum(map(int, spills)), kernel.metadata.shared)


def ptxas(code: str, capability: int) -> str:
    """What ptxas says of a kernel's PTX, where Triton keeps to itself what its own call was told."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(code)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        done = subprocess.run([*command, str(ptx), "-o", os.devnull], capture_output=True, text=True, check=True)
    return done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
