"""Parts of Triton that every kernel file needs; importable on a machine that has none.

The kernels keep to what Triton 3.6 (that of torch 2.11) to 3.9 have in common. A file declares the configurations it
runs with in a module-level list `SHIPPED`, which `python -m fastsmart.kernels.aot` compiles.

The interpreter of Triton 3.6 needs a numpy below 2.5, which refuses a tensor of one number as a bound of `range`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastsmart.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with the CUDA build of torch only
    triton = tl = None

KERNELS = ("auto", "torch", "triton")
# Triton decides this when it sees `@jit`: the variable must be set before the first import of a kernel file.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Shipped:
    """A configuration a kernel runs with, as the ahead-of-time compiler needs it.

    name      : what the table calls it
    kernel    : the function under `@jit`
    types     : Triton type of each argument by name, "*fp32" or "i32"; names the kernel does not have are left out
    constants : value of each tl.constexpr argument by name; names the kernel does not have are left out
    num_warps : as at the launch
    aligned   : integer arguments that are multiples of 16 at the launch, which Triton compiles for
    num_stages: of the pipeline of a loop, as at the launch
    since     : compute capability below which it is not launched so: 90 = Hopper
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    aligned: Sequence[str] = ()
    num_stages: int = 3
    since: int = 0


def jit(kernel: Callable[..., None] | None = None, *, varying: Sequence[str] = ()) -> Any:
    """`triton.jit` where there is Triton; elsewhere the function as it is, which nobody calls.

    varying : integer arguments that change from launch to launch. Triton would compile the kernel again for the first
              of them that is 1 or a multiple of 16, one to two seconds in the middle of a run.
    """
    if kernel is None:
        return partial(jit, varying=varying)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=list(varying))


def choose_kernel(kernel: str, device: torch.device) -> str:
    """ "torch" or "triton" for one of `KERNELS`: "auto" is Triton on a GPU that has it, else torch.

    Raises UserError when "triton" is asked for where it cannot run.
    """
    able = triton is not None and (device.type == "cuda" or INTERPRETED)
    if kernel == "auto":
        return "triton" if able and device.type == "cuda" else "torch"
    if kernel == "triton" and not able:
        raise UserError(
            f'kernel "triton" needs the triton package and an NVIDIA GPU, not {device.type}; set it to "auto"'
        )
    if kernel not in KERNELS:
        raise UserError(f'kernel must be one of {", ".join(KERNELS)}; got "{kernel}"')
    return kernel


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: what a block must be to hold n numbers."""
    return 1 << (n - 1).bit_length()


def overlapped(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel that may start while the one before it ends, and waits for that by itself.

    That is programmatic dependent launch, of compute capability 9 and above; such a kernel has a constant `PDL`, and
    `tl.extra.cuda.gdc_wait()` before it reads what others write.
    """
    able = device.type == "cuda" and not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}
